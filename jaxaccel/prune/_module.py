"""A Flax NNX module that holds the smaller parameters and computes with them."""

from collections.abc import Callable, Iterator
from functools import lru_cache, wraps
from inspect import getattr_static
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from jaxaccel._functional import collection, functional

if TYPE_CHECKING:
    from flax import nnx

    from jaxaccel.prune._plan import Plan


def smaller(plan: "Plan", model: "nnx.Module") -> "nnx.Module":
    """The module with shrunk parameters; its class is a subclass of the model's."""
    from flax import nnx

    if not isinstance(model, nnx.Module):
        raise TypeError(
            f"plan.module takes a flax.nnx.Module, not {type(model).__name__}; for anything else "
            "use plan.rewrite(fn) and plan.shrink(params)"
        )
    fn, params = functional(model)
    made: Any = fn.module(plan.shrink(params))
    made.__class__ = _subclass(type(model), plan)
    return made


@lru_cache
def _subclass(base: type, plan: "Plan") -> type:
    """Its methods compute what the original's do, without the pruned channels."""
    methods = {name: _rewritten(plan, base, name) for name in _methods(base)}
    return type(f"Pruned{base.__name__}", (base,), methods | {"__module__": base.__module__})


def _methods(base: type) -> Iterator[str]:
    """`__call__` and the public methods that the class adds to those of every module."""
    from flax import nnx

    for name in dir(base):
        own = name == "__call__" or not (name.startswith("_") or hasattr(nnx.Module, name))
        found = getattr_static(base, name)
        if own and callable(found) and not isinstance(found, type | staticmethod | classmethod):
            yield name


def _rewritten(plan: "Plan", base: type, name: str) -> Callable:
    original = getattr(base, name)

    @wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        if name != "__call__" and not any(map(_is_array, jax.tree.leaves((args, kwargs)))):
            return original(self, *args, **kwargs)
        return _call(plan, original, base, self, args, kwargs)

    return method


def _call(plan: "Plan", method: Any, base: type, module: Any, args: Any, kwargs: Any) -> Any:
    """Calls the original on a copy of the original shapes, and keeps what it changes."""
    from flax import nnx

    leaves, tree = jax.tree.flatten((args, kwargs), is_leaf=_is_node)
    if any(isinstance(leaf, nnx.Optimizer) for leaf in leaves):
        raise TypeError(
            f"{method.__qualname__} takes an nnx.Optimizer, which a method of a smaller module "
            "cannot; write the step as a function of the module and the optimizer"
        )
    nodes = {_SELF: module} | {str(k): leaf for k, leaf in enumerate(leaves) if _is_node(leaf)}
    arrays = {k: leaf for k, leaf in enumerate(leaves) if _is_array(leaf)}
    graph, state = nnx.split(nodes)
    flat = nnx.to_flat_state(state)
    params, others = _parts(flat)
    copies: dict[str, Any] = {}

    def original(params: Any, others: Any, arrays: Any) -> Any:
        values = params | others
        given = [(path, _with(v, values[_name(path, v)])) for path, v in flat]
        copies.update(nnx.merge(graph, nnx.from_flat_state(given), copy=True))
        copies[_SELF].__class__ = base  # what it calls of itself is not rewritten again
        mixed = [copies.get(str(k), arrays.get(k, leaf)) for k, leaf in enumerate(leaves)]
        args, kwargs = jax.tree.unflatten(tree, mixed)
        out = method(copies[_SELF], *args, **kwargs)
        after = nnx.to_flat_state(nnx.state(copies))
        changed = [(p, v) for p, v in after if _value(v) is not values.get(_name(p, v))]
        return out, nnx.from_flat_state(changed)

    out, changed = plan.rewrite(original)(params, others, arrays)
    if changed:
        nnx.update(nodes, changed)
    _set_plain(nodes, copies)
    return out


_SELF = "self"


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray)


def _is_node(leaf: Any) -> bool:
    from flax import nnx

    return isinstance(leaf, nnx.Pytree | nnx.Variable)


def _parts(flat: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Values by the paths of `jaxaccel.functional`; random streams and arguments apart."""
    params, others = {}, {}
    for path, variable in flat:
        kept = params if path[0] == _SELF and collection(variable) else others
        kept[_name(path, variable)] = _value(variable)
    return params, others


def _name(path: tuple[Any, ...], variable: Any) -> str:
    top, *below = map(str, path)
    return "/".join(((collection(variable) if top == _SELF else None) or f"others {top}", *below))


def _value(variable: Any) -> Any:
    """That of a variable; arrays that are attributes stand for themselves."""
    from flax import nnx

    return variable.get_value() if isinstance(variable, nnx.Variable) else variable


def _with(variable: Any, value: Any) -> Any:
    from flax import nnx

    return variable.replace(value) if isinstance(variable, nnx.Variable) else value


def _set_plain(nodes: Any, copies: Any) -> None:
    """Gives the modules what the call has set of attributes that are no arrays."""
    from flax import nnx

    own = dict(nnx.iter_graph(nodes))
    for path, copy in nnx.iter_graph(copies):
        if isinstance(copy, nnx.Pytree) and path in own:
            for name, value in vars(copy).items():
                data = _is_array(value) or nnx.is_data(value) or name.startswith("_pytree__")
                if not data and value is not vars(own[path]).get(name):
                    setattr(own[path], name, value)
