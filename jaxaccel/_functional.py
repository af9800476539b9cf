"""A Flax model as ``(fn, params)``: a pure function and a nested dict of arrays."""

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

if TYPE_CHECKING:
    from flax import linen, nnx

Params: TypeAlias = dict[str, Any]
Path: TypeAlias = tuple[Any, ...]

# Linen has no train()/eval(): a module takes one of these arguments, by custom.
_MODES = {
    "train": True,
    "training": True,
    "is_training": True,
    "deterministic": False,
    "use_running_average": False,
}


def functional(
    model: "nnx.Module | linen.Module",
    variables: Mapping[str, Any] | None = None,
    *,
    mode: str | None = None,
) -> "tuple[NNXFunction | LinenFunction, Params]":
    """Split a Flax model into a pure function and its parameters.

    The function ``fn(params, *args)`` runs the model as for inference (no dropout, running
    averages). ``fn.train(params, key, *args)`` runs it as for training and returns
    ``(outputs, updates)``, where `updates` holds the new value of every collection but
    ``"params"``. ``fn.module(params)`` gives the Flax model back.

    Args:
        model: a ``flax.nnx.Module``, or a ``flax.linen.Module`` together with its `variables`.
            The model is copied, never changed.
        variables: what ``module.init`` returned; Linen only.
        mode: name of the Linen module's argument that tells training from inference. By default
            the one of ``train``, ``training``, ``is_training`` (true in training),
            ``deterministic``, ``use_running_average`` (false in training) that ``__call__`` has.

    Returns:
        ``(fn, params)``, with `params` as nested dicts under ``"params"`` and, only where the
        model has them, ``"batch_stats"`` and other collections.

    Raises:
        TypeError: `model` is neither, or `variables` are missing or not wanted.

    >>> import jax, jax.numpy as jnp
    >>> from flax import nnx
    >>> fn, params = functional(nnx.Linear(3, 2, rngs=nnx.Rngs(0)))
    >>> jax.tree.map(jnp.shape, params)
    {'params': {'bias': (2,), 'kernel': (3, 2)}}
    >>> jax.jit(fn)(params, jnp.ones((5, 3))).shape
    (5, 2)
    """
    from flax import linen, nnx

    if isinstance(model, nnx.Module):
        if variables is not None or mode is not None:
            raise TypeError("variables= and mode= are for Linen; an nnx.Module holds its own state")
        return _from_nnx(model)
    if isinstance(model, linen.Module):
        if variables is None:
            raise TypeError("a Linen module needs its variables: jx.functional(module, variables)")
        return LinenFunction(model, mode), jax.tree.map(jnp.asarray, _as_dict(variables))
    raise TypeError(
        f"jx.functional takes a flax.nnx.Module or a flax.linen.Module, not {type(model).__name__};"
        " any other JAX function fn(params, *args) is used as it is"
    )


def _as_dict(tree: Any) -> Any:
    """Nested plain dicts with string keys, whatever kind of mapping comes in."""
    if isinstance(tree, Mapping):
        return {str(key): _as_dict(value) for key, value in tree.items()}
    return tree


class NNXFunction:
    """The pure function of an ``nnx.Module``; made by `functional`."""

    def __init__(self, model: "nnx.Module", collections: Mapping[Path, str]):
        from flax import nnx

        evaluation, training = nnx.clone(model), nnx.clone(model)
        evaluation.eval()
        training.train()
        self._graph, state = nnx.split(model)
        self._evaluation, self._training = nnx.graphdef(evaluation), nnx.graphdef(training)
        self._variables = dict(nnx.to_flat_state(state))
        self._collections = collections  # path inside the module -> collection

    def __call__(self, params: Params, *args: Any) -> Any:
        """Inference mode."""
        return self._merge(self._evaluation, params)(*args)

    def train(self, params: Params, key: Array, *args: Any) -> tuple[Any, Params]:
        """Training mode: ``(outputs, updates)``; `key` seeds every random stream."""
        from flax import nnx

        model = self._merge(self._training, params, key)
        outputs = model(*args)
        values = dict(nnx.to_flat_state(nnx.state(model)))
        updates = {
            (collection, *map(str, path)): values[path].get_value()
            for path, collection in self._collections.items()
            if collection != "params"
        }
        return outputs, _nest(updates)

    def module(self, params: Params) -> "nnx.Module":
        """A new NNX module that holds `params`, in the mode the original was in."""
        return self._merge(self._graph, params)

    def _merge(self, graph: Any, params: Params, key: Array | None = None) -> Any:
        from flax import nnx

        given = dict(_leaves(params))
        self._check(given)
        state = []
        for path, variable in self._variables.items():
            if path in self._collections:
                variable = variable.replace(given[self._collections[path], *map(str, path)])
            elif key is not None and isinstance(variable, nnx.RngKey):
                variable = variable.replace(_like(variable.get_value(), key, len(state)))
            state.append((path, variable))
        # A copy: a Variable may only be mutated at the trace level that made it.
        return nnx.merge(graph, nnx.from_flat_state(state), copy=True)

    def _check(self, given: Mapping[Path, Any]) -> None:
        wanted = {(name, *map(str, path)) for path, name in self._collections.items()}
        missing, unknown = wanted - given.keys(), given.keys() - wanted
        if missing or unknown:
            path = "/".join(min(missing or unknown))
            what = "is missing from" if missing else "is not a parameter of the model, but is in"
            raise ValueError(
                f"{path}: {what} the given tree; pass one like the params of jx.functional(model)"
            )
        for path, leaf in given.items():
            if not isinstance(leaf, jax.Array | np.ndarray | np.generic):
                raise TypeError(
                    f"{'/'.join(path)}: expected an array, got {type(leaf).__name__}; "
                    "a quantized tree goes through jx.quantize.dequantize first"
                )


def _from_nnx(model: "nnx.Module") -> tuple[NNXFunction, Params]:
    from flax import nnx

    variables = dict(nnx.to_flat_state(nnx.state(model)))
    collections = {path: name for path, v in variables.items() if (name := collection(v))}
    params = {(name, *map(str, p)): variables[p].get_value() for p, name in collections.items()}
    return NNXFunction(model, collections), {"params": {}} | _nest(params)


def collection(variable: Any) -> str | None:
    """Linen's name for a kind of variable; None for random streams, sown values, bare arrays."""
    from flax import nnx

    none = nnx.RngState | nnx.Intermediate
    if isinstance(variable, none) or not isinstance(variable, nnx.Variable):
        return None
    if isinstance(variable, nnx.Param):
        return "params"
    return "batch_stats" if isinstance(variable, nnx.BatchStat) else type(variable).__name__.lower()


def _leaves(tree: Any, path: Path = ()):
    """Leaves under dicts alone, so that any other node stands out as what it is."""
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from _leaves(value, (*path, str(key)))
    else:
        yield path, tree


def _nest(flat: Mapping[Path, Any]) -> Params:
    tree: Params = {}
    for path, value in flat.items():
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = value
    return tree


def _like(stream: Array, key: Array, index: int) -> Array:
    """A stream's key drawn from `key`: many where layers are stacked, typed as NNX wants it."""
    typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    key = jax.random.fold_in(key if typed else jax.random.wrap_key_data(key), index)
    return jax.random.split(key, stream.shape) if stream.shape else key


class LinenFunction:
    """The pure function of a ``linen.Module``; made by `functional`."""

    def __init__(self, module: "linen.Module", mode: str | None):
        accepted = inspect.signature(type(module).__call__).parameters
        if mode is not None and mode not in _MODES and mode not in accepted:
            raise TypeError(
                f"mode={mode!r} is not an argument of {type(module).__name__}.__call__; "
                f"its arguments are: {', '.join(accepted)}"
            )
        self._module = module
        self._apply: Any = module.apply  # its signature cannot know the module's own flags
        self._modes = [mode] if mode else [name for name in _MODES if name in accepted]

    def __call__(self, params: Params, *args: Any) -> Any:
        """Inference mode."""
        return self._apply(params, *args, **self._flags(training=False))

    def train(self, params: Params, key: Array, *args: Any) -> tuple[Any, PyTree]:
        """Training mode: ``(outputs, updates)``; `key` seeds every random stream."""
        mutable = [name for name in params if name != "params"]
        # Linen falls back to the "params" stream for any other name, with its own counter.
        rngs = {"params": key, "dropout": jax.random.fold_in(key, 1)}
        outputs, updates = self._apply(
            params, *args, mutable=mutable, rngs=rngs, **self._flags(training=True)
        )
        return outputs, _as_dict(updates)

    def module(self, params: Params) -> "linen.Module":
        """The Linen module, bound to `params`."""
        return self._module.bind(params)

    def _flags(self, *, training: bool) -> dict[str, bool]:
        return {name: _MODES.get(name, True) == training for name in self._modes}
