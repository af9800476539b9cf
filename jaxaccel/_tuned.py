"""Ops that take their form when they are lowered: primitives that stand for XLA's own.

A tuned op has the parameters of the op it stands for, and a tuner. It differentiates and batches
into tuned ops of the same tuner, so that every derivative of any order chooses its own form, for
the shapes that are left after `vmap`. To every other transform it is the op it stands for.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, Protocol

import jax
import jax.extend.core.primitives as originals
import jax.numpy as jnp
from jax import lax
from jax.extend import source_info_util
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.sharding import AxisType
from jaxtyping import Array

from jaxaccel import _graph, _rewritten
from jaxaccel._forms import FORMS, XLA, Op, concerns, rule
from jaxaccel._graph import TUNED, Node, graph_of
from jaxaccel._rewritten import everywhere, rewritten

# An op's source is the line that called it, not these files.
for _file in (_graph.__file__, _rewritten.__file__, __file__):
    source_info_util.register_exclusion(str(_file))


class Tuner(Protocol):
    """Chooses forms; equal ones choose alike."""

    def choose(self, op: Op, platform: str, devices: int) -> str:
        """`XLA`, or the name of one of ``_forms.candidates(op)``."""
        ...


@dataclass(frozen=True)
class ByRules:
    """By the rules of `_forms`."""

    def choose(self, op: Op, platform: str, devices: int) -> str:
        """As `Tuner` says."""
        return rule(op, platform)


RULES = ByRules()
_BASES: dict[str, Primitive] = {name: getattr(originals, f"{name}_p") for name in FORMS}


def by_rules(fn: Callable) -> Callable:
    """The function with the forms that the rules choose; what another tuner chooses stays."""
    return rewritten(fn, partial(_tune, RULES), lambda node: has_forms(node) and not node.tuner)


def retuned(fn: Callable, tuner: Tuner) -> Callable:
    """The function with `tuner` in the place of every other."""
    return rewritten(fn, partial(_tune, tuner), lambda node: node.tuner is not None)


def untuned(fn: Callable) -> Callable:
    """The function with XLA's own ops."""

    base = lambda node, operands: node.run(operands, _BASES[node.name])
    return rewritten(fn, base, lambda node: node.tuner is not None)


def tuned(graph: _graph.Graph, arguments: Sequence[Any], tuner: Tuner) -> list[Any]:
    """Runs a graph in which `tuner` chooses the form of every op that has some."""
    return everywhere(graph, arguments, partial(_tune, tuner), has_forms)


def has_forms(node: Node) -> bool:
    return node.name in _TUNED and concerns(op_of(node))


def op_of(node: Node) -> Op:
    avals: list[Any] = [atom.aval for atom in node.inputs]
    return _op(node.name, avals, node.params)


def _op(name: str, avals: Sequence[Any], params: Mapping[str, Any]) -> Op:
    return Op(name, tuple(a.shape for a in avals), tuple(a.dtype for a in avals), params)


def original(name: str, *operands: Any, **params: Any) -> Array:
    """XLA's own op."""
    return _BASES[name].bind(*operands, **params)


def _tune(tuner: Tuner, node: Node, operands: Sequence[Array]) -> list[Array]:
    return node.run(operands, _TUNED[node.name], tuner=tuner)


def conv_general_dilated(lhs: Array, rhs: Array, *args: Any, **kwargs: Any) -> Array:
    """`jax.lax.conv_general_dilated` in the form that the rules choose."""
    return by_rules(lambda x, kernel: lax.conv_general_dilated(x, kernel, *args, **kwargs))(
        lhs, rhs
    )


def max_pool(x: Array, window: int, strides: int | None = None, pad: int = 0) -> Array:
    """The largest of each square of pixels, in the form that the rules choose.

    Raises:
        ValueError: ``window`` is below 1.
    """
    if window < 1:
        raise ValueError(f"window: {window} is below 1; give the side of the square in pixels")
    square, step = (1, window, window, 1), strides or window
    pads = ((0, 0), (pad, pad), (pad, pad), (0, 0))
    pooled = by_rules(
        lambda x: lax.reduce_window(x, -jnp.inf, lax.max, square, (1, step, step, 1), pads)
    )
    return pooled(x)


def _primitive(name: str) -> Primitive:
    made = Primitive(f"{TUNED}{name}")
    made.def_impl(partial(_called, made))
    made.def_effectful_abstract_eval(partial(_abstract, name))
    ad.primitive_jvps[made] = partial(_jvp, name)
    ad.primitive_transposes[made] = partial(_transpose, name)
    batching.primitive_batchers[made] = partial(_batch, name)
    for platform in (None, "cpu", "cuda"):
        mlir.register_lowering(made, partial(_lower, name, platform or ""), platform=platform)
    return made


def _abstract(name: str, *avals: Any, tuner: Tuner, **params: Any) -> Any:
    return _BASES[name].abstract_eval(*avals, **params)


def _again(tuner: Tuner, fn: Callable, *operands: Any) -> list[Any]:
    """The results of a function of the original ops, in tuned ones."""
    graph, _ = graph_of(fn, *map(jax.typeof, operands))
    return tuned(graph, operands, tuner)


def _jvp(name: str, primals: Any, tangents: Any, *, tuner: Tuner, **params: Any) -> Any:
    active = [i for i, t in enumerate(tangents) if not isinstance(t, ad.Zero)]

    def moved(*args: Any) -> Any:
        full, moving = list(args[: len(primals)]), args[len(primals) :]

        def called(*values: Any) -> Any:
            for i, value in zip(active, values, strict=True):
                full[i] = value
            return original(name, *full, **params)

        return jax.jvp(called, tuple(full[i] for i in active), moving)

    return tuple(_again(tuner, moved, *primals, *(tangents[i] for i in active)))


def _transpose(name: str, ct: Any, *operands: Any, tuner: Tuner, **params: Any) -> list[Any]:
    linear = [i for i, value in enumerate(operands) if ad.is_undefined_primal(value)]
    if isinstance(ct, ad.Zero):
        return [ad.Zero(v.aval) if i in linear else None for i, v in enumerate(operands)]
    known = [value for i, value in enumerate(operands) if i not in linear]
    avals = tuple(operands[i].aval for i in linear)

    def pulled(ct: Any, *known: Any) -> Any:
        rest = iter(known)
        fixed = [None if i in linear else next(rest) for i in range(len(operands))]

        def called(*values: Any) -> Any:
            full, given = list(fixed), iter(values)
            return original(name, *(next(given) if v is None else v for v in full), **params)

        return jax.linear_transpose(called, *avals)(ct)

    found = iter(_again(tuner, pulled, ct, *known))
    return [next(found) if i in linear else None for i in range(len(operands))]


def _batch(name: str, operands: Any, axes: Any, *, tuner: Tuner, **params: Any) -> Any:
    base = lambda *args: original(name, *args, **params)
    (result,) = _again(tuner, jax.vmap(base, tuple(axes)), *operands)
    return result, 0


def _lower(name: str, platform: str, ctx: Any, *values: Any, tuner: Tuner, **params: Any) -> Any:
    context = ctx.module_context.axis_context
    devices = getattr(context, "num_devices", None) or context.mesh.size
    chosen = tuner.choose(_op(name, ctx.avals_in, params), platform, devices)
    form = partial(formed, name, chosen, **params)
    return mlir.lower_fun(form, multiple_results=False)(ctx, *values)


def formed(name: str, chosen: str, *operands: Array, **params: Any) -> Array:
    """The op in the form of this name."""
    if chosen == XLA:
        return original(name, *operands, **params)
    form: Any = partial(FORMS[name][chosen].run, **params)
    sharding = _BASES[name].abstract_eval(*map(jax.typeof, operands), **params)[0].sharding
    if AxisType.Explicit in sharding.mesh.axis_types:  # forms say nothing of shardings
        axes = sharding.mesh.explicit_axes
        form = jax.sharding.auto_axes(form, axes=axes, out_sharding=sharding)
    # Of the caller's settings, only those of precision concern a form.
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        return form(*operands)


def _called(made: Primitive, *operands: Array, **params: Any) -> Array:
    """Outside of any trace."""
    with jax.disable_jit(False):
        return _compiled(made, tuple(sorted(params.items())))(*operands)


@lru_cache(512)
def _compiled(made: Primitive, params: Any) -> Callable[..., Array]:
    return jax.jit(partial(made.bind, **dict(params)))


_TUNED = {name: _primitive(name) for name in FORMS}
