"""A rule held against its meaning: removed must equal set to zero."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxaccel._axes import Axes, Labels
from jaxaccel._labels import Labelling, label
from jaxaccel._shrink import Shrunk
from jaxaccel._trace import Trace, trace

_TRIALS = 5


@dataclass(frozen=True)
class RuleReport:
    """What `check_rule` found: each operand's axes are "free", "pinned: why", or "whole".

    An axis is whole where the operand is no parameter or the axis has size 1.
    """

    axes: tuple[tuple[str, ...], ...]

    def __str__(self) -> str:
        return "\n".join(
            f"operand {place}: " + ", ".join(f"axis {k} {word}" for k, word in enumerate(words))
            for place, words in enumerate(self.axes)
        )


def check_rule(fn: Callable, *operands: Any, seed: int = 0) -> RuleReport:
    """Tests the rules of the primitives that `fn` runs, on random numbers and random cuts.

    Each floating operand is taken as a parameter. Random sets of the labels that the rules leave
    free are dropped; the results on the smaller operands must be those on operands with zeros
    there, cut; and results said to be zero where masked must be zero.

    Args:
        fn: applies the primitive to its operands.
        operands: arrays, or a `jax.ShapeDtypeStruct` for normally distributed numbers. Integer
            operands are taken as they are, whole.
        seed: of the random numbers and cuts.

    Returns:
        Which axes are free and which pinned. Look at it: a rule that pins all is never wrong.

    Raises:
        ValueError: a result differs, or the primitive does not run on what is left; the message
            names the primitives, the result and the dropped indices.

    >>> import jax
    >>> print(check_rule(lambda x: x.sum(1), jax.ShapeDtypeStruct((4, 3), "float32")))
    operand 0: axis 0 free, axis 1 free
    >>> print(check_rule(lambda x: x.max(1), jax.ShapeDtypeStruct((4, 3), "float32")))
    operand 0: axis 0 free, axis 1 pinned: 'reduce_max' over it at ...
    """
    random = np.random.default_rng(seed)
    values = [_value(operand, random) for operand in operands]
    traced = trace(lambda *args: jax.tree.leaves(fn(*args)), *values)
    floats = [i for i, value in enumerate(values) if jnp.issubdtype(value.dtype, jnp.inexact)]
    labelling, inputs = label(traced, floats, keep_outputs=False)
    for _ in range(_TRIALS):
        _compare(fn, values, traced, labelling, inputs, random)
    return RuleReport(tuple(tuple(_word(labelling, axis) for axis in axes) for axes in inputs))


def _value(operand: Any, random: np.random.Generator) -> Any:
    if not isinstance(operand, jax.ShapeDtypeStruct):
        return jnp.asarray(operand)
    return jnp.asarray(random.normal(size=operand.shape), operand.dtype)


def _compare(
    fn: Callable,
    values: list[Any],
    traced: Trace,
    labelling: Labelling,
    inputs: list[Axes],
    random: np.random.Generator,
) -> None:
    labels = [axis.ids for axes in inputs for axis in axes if isinstance(axis, Labels)]
    roots = {root for ids in labels for root in labelling.roots(ids)} - labelling.pinned.keys()
    dropped = [root for root in sorted(roots) if random.random() < 0.4]
    shrunk = Shrunk(labelling, dropped)
    small = [_cut(shrunk, value, axes) for value, axes in zip(values, inputs, strict=True)]
    masked = [
        value if place in labelling.unmasked else _masked(shrunk, value, axes)
        for place, (value, axes) in enumerate(zip(values, inputs, strict=True))
    ]
    names = ", ".join(sorted({node.name for node in traced.graph.nodes}))
    where = f"the rule of one of {names} is wrong: without {_gone(shrunk, inputs)}, "
    try:
        results = shrunk.run(traced.graph, small)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}it does not run: {error}") from error
    for place, (result, full) in enumerate(zip(results, jax.tree.leaves(fn(*masked)), strict=True)):
        axes = labelling.outputs[traced.graph][place]
        if not np.allclose(result, _cut(shrunk, full, axes), rtol=1e-4, atol=1e-5, equal_nan=True):
            raise ValueError(f"{where}result {place} is not the one with zeros in their place")
        for k, axis in enumerate(axes):
            kept = shrunk.kept(axis)
            if isinstance(axis, Labels) and kept is not None:
                zero = np.setdiff1d(np.flatnonzero(axis.zero), kept)
                if np.any(jnp.take(full, zero, k)):
                    raise ValueError(
                        f"{where}result {place} is not zero where masked, on axis {k}; if that is "
                        "right, the rule must say so: t.same(axis, zero=False)"
                    )


def _gone(shrunk: Shrunk, inputs: list[Axes]) -> str:
    parts = []
    for place, axes in enumerate(inputs):
        for k, (axis, size) in enumerate(zip(axes, axes.shape, strict=True)):
            kept = shrunk.kept(axis)
            if kept is not None:
                indices = np.setdiff1d(np.arange(size), kept).tolist()
                parts.append(f"{indices} of operand {place} axis {k}")
    return " and ".join(parts) or "nothing"


def _cut(shrunk: Shrunk, value: Any, axes: Axes) -> Any:
    for k, axis in enumerate(axes):
        kept = shrunk.kept(axis)
        if isinstance(axis, Labels) and kept is not None:
            value = jnp.take(value, kept, axis=k)
    return value


def _masked(shrunk: Shrunk, value: Any, axes: Axes) -> Any:
    for k, axis in enumerate(axes):
        kept = shrunk.kept(axis)
        if kept is not None:
            gone = np.setdiff1d(np.arange(value.shape[k]), kept)
            value = value.at[(slice(None),) * k + (gone,)].set(0)
    return value


def _word(labelling: Labelling, axis: Any) -> str:
    if not isinstance(axis, Labels):
        return "whole"
    reasons = {labelling.pinned[r] for r in labelling.roots(axis.ids) if r in labelling.pinned}
    return "pinned: " + "; ".join(sorted(reasons)) if reasons else "free"
