"""The numbers: the coefficients of a chain, and the kernels, biases and scales with them."""

from collections.abc import Mapping
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array

from jaxaccel._dataflow import evaluate
from jaxaccel._graph import Value
from jaxaccel.fold._chains import Steps
from jaxaccel.fold._contractions import over_inputs, over_outputs, response, spread
from jaxaccel.fold._match import Fold, Matches
from jaxaccel.fold._view import Keys, Labels, View


class Affine(NamedTuple):
    """``y * scale + shift``, both per channel."""

    scale: Array
    shift: Array


def coefficients(
    v: View, matches: Matches, leaves: Mapping[Value, Array]
) -> tuple[list[tuple[Affine, Affine]], list[Affine]]:
    """Of each fold the map before and the map after the contraction; of each merge the map."""
    chains = [f.steps for f in matches.folds] + [m.steps for m in matches.merges]
    others = {s.other for steps in chains for s in steps if isinstance(s.other, Value)}
    values = dict(zip(others, evaluate(v.graph, leaves, list(others)), strict=True))
    folds = [
        (
            compose(f.before, f.order, values),
            compose(f.after, tuple(range(len(f.contraction.outs))), values),
        )
        for f in matches.folds
    ]
    return folds, [compose(m.steps, m.channels, values) for m in matches.merges]


def compose(steps: Steps, order: Labels, values: Mapping[Value, Array]) -> Affine:
    """The steps as one map, with an axis for each label of `order`."""
    dtype = jnp.float32
    for s in steps:
        dtype = jnp.promote_types(dtype, s.y.aval.dtype)
    scale, shift = jnp.ones((), dtype), jnp.zeros((), dtype)
    for node, _, other, left, labels in steps:
        x = values[other] if isinstance(other, Value) else getattr(other, "val", -1.0)
        x = _per_channel(jnp.asarray(x), labels, order).astype(dtype)
        if node.name in ("mul", "neg"):
            scale, shift = scale * x, shift * x
        elif node.name == "div":
            scale, shift = scale / x, shift / x
        elif node.name == "add":
            shift = shift + x
        else:
            scale, shift = (scale, shift - x) if left else (-scale, x - shift)
    return Affine(scale, shift)


def _per_channel(x: Array, labels: Labels, order: Labels) -> Array:
    """A coefficient of a value with these labels, one axis for each label of `order`."""
    if x.ndim == 0:
        return x
    here = [
        order.index(label) if label in order and label is not None else None for label in labels
    ]
    x = x[tuple(0 if place is None else slice(None) for place in here)]
    return spread(x, tuple(place for place in here if place is not None), len(order))


def new_leaves(
    v: View, matches: Matches, leaves: Mapping[Value, Array]
) -> tuple[dict[Keys, Array], list[list[Array]]]:
    """The new kernels, biases and scales, and the coefficients of every chain."""
    folds, merges = coefficients(v, matches, leaves)
    stored: dict[Keys, Array] = {}
    for f, maps in zip(matches.folds, folds, strict=True):
        stored[v.leaves[f.leaf]], bias = _fold(f, leaves[f.leaf], *maps)
        if bias is not None and (keys := f.bias_keys(v)) is not None:
            stored[keys] = bias
    for m, affine in zip(matches.merges, merges, strict=True):
        for x, leaf in zip(affine, (m.scale, m.bias), strict=True):
            if leaf is not None:
                stored[v.leaves[leaf]] = _like(jnp.broadcast_to(x, m.sizes), leaf)
    return stored, [[*before, *after] for before, after in folds] + [[*m] for m in merges]


def _fold(f: Fold, leaf: Array, before: Affine, after: Affine) -> tuple[Array, Array | None]:
    c = f.contraction
    dtype = jnp.promote_types(leaf.dtype, jnp.promote_types(before.scale.dtype, after.scale.dtype))
    before, after = (Affine(a.astype(dtype), b.astype(dtype)) for a, b in (before, after))
    wide = leaf.astype(dtype)
    factor = over_inputs(c, before.scale) * over_outputs(c, after.scale)
    kernel = (wide * _to_leaf(factor, f.axes, leaf.ndim)).astype(leaf.dtype)
    if not any(s.shifts for s in f.steps):
        return kernel, None
    shift = jnp.broadcast_to(after.shift, c.sizes)
    if any(s.shifts for s in f.before):
        shift = shift + after.scale * response(c, _to_operand(wide, f.axes), before.shift)
    if f.bias is not None:
        return kernel, _like(shift, f.bias)
    return kernel, shift.astype(jnp.promote_types(leaf.dtype, f.end.aval.dtype))


def _like(x: Array, leaf: Value) -> Array:
    return x.reshape(leaf.shape).astype(leaf.aval.dtype)


def _to_leaf(x: Array, axes: Labels, rank: int) -> Array:
    """From the axes of the operand of a contraction to those of the leaf."""
    x = x.squeeze(tuple(i for i, axis in enumerate(axes) if axis is None))
    return spread(x, tuple(axis for axis in axes if axis is not None), rank)


def _to_operand(x: Array, axes: Labels) -> Array:
    kept = [axis for axis in axes if axis is not None]
    x = x.transpose(*kept, *(i for i in range(x.ndim) if i not in kept))
    places = tuple(i for i, axis in enumerate(axes) if axis is not None)
    return spread(x.reshape(x.shape[: len(kept)]), places, len(axes))
