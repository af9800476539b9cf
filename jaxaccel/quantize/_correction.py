"""What a zero point adds to an accumulator: computed from the kernel, so that it may be pruned.

``sum((q - z) * w) = sum(q * w) - z * sum(w)``. Where an image has edges, a place sums over the
taps that lie on the image alone; the places that see the same taps share one correction.
"""

from collections.abc import Sequence
from itertools import groupby
from math import prod
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Int8, Int16, Int32

from jaxaccel._apart import apart
from jaxaccel._graph import Node
from jaxaccel.fold._contractions import Contraction, spread

_MOST_RUNS = 8
_CHUNK = 16  # rows added by unrolled code; XLA:CPU's own reduction of bytes takes 8 times as long


def both(c: Contraction, data: Array, kernel: Array) -> list[Array]:
    """The operands in the order of the node."""
    return [data, kernel] if c.node.inputs[0] is c.data else [kernel, data]


def accumulate(node: Node, operands: list[Array], **changed: Any) -> Int32[Array, "..."]:
    """The sums of products."""
    wide = {"preferred_element_type": np.dtype(np.int32), "precision": None}
    (acc,) = node.run(operands, **wide, **changed)
    return acc


def sums(
    c: Contraction, q: Int8[Array, "..."], kernel: Int8[Array, "..."], zero_point: int
) -> Int32[Array, "..."]:
    """``sum((q - zero_point) * kernel)``."""
    if not zero_point:
        return accumulate(c.node, both(c, q, kernel))
    if c.padded and c.groups > 1 and c.kernel.shape[c.ins[0]] == 1:
        return _of_each_channel(c, q, kernel, zero_point)
    return accumulate(c.node, both(c, q, kernel)) - correction(c, kernel, zero_point)


def _of_each_channel(c: Contraction, q: Array, kernel: Array, zero_point: int) -> Array:
    """Of a depthwise convolution, whose forms pad the images in any case: with the zero point."""
    p, spec = c.node.params, c.node.params["dimension_numbers"].lhs_spec
    edges = [(0, 0, 0)] * q.ndim
    for axis, (low, high), gap in zip(spec[2:], p["padding"], p["lhs_dilation"], strict=True):
        edges[axis] = (int(low), int(high), int(gap) - 1)
    ones = (1,) * len(edges[2:])
    images = apart(lambda q: lax.pad(q, jnp.int8(zero_point), edges), q)
    acc = accumulate(c.node, [images, kernel], padding=((0, 0),) * len(ones), lhs_dilation=ones)
    whole = _sum(_outs_last(c, kernel, ()))
    return acc - per_channel(whole, c.labels) * zero_point


def correction(c: Contraction, kernel: Int8[Array, "..."], zero_point: int) -> Int32[Array, "..."]:
    """What is to be taken from the accumulator of ``c``, of a shape that broadcasts to it."""
    if c.node.name == "dot_general":
        sums = _sum(_outs_last(c, kernel, ()))
        return per_channel(sums.reshape(c.sizes), c.labels) * zero_point
    numbers = c.node.params["dimension_numbers"]
    hits = [_hits(c, axis) for axis in range(len(numbers.rhs_spec) - 2)]
    taps = numbers.rhs_spec[2:]
    if all(hit.all() for hit in hits):
        return per_channel(_sum(_outs_last(c, kernel, ())), c.labels) * zero_point
    per_tap = _sum(_outs_last(c, kernel, taps))  # [tap, out]
    classes, places = zip(
        *(np.unique(hit, axis=0, return_inverse=True) for hit in hits), strict=True
    )
    seen = np.ones((1, 1), np.int32)
    for one in classes:
        seen = np.kron(seen, one.astype(np.int32))
    few = (seen[:, :, None] * per_tap).sum(1)
    whole = few.reshape(*(len(one) for one in classes), -1)
    for axis, place in enumerate(places):
        whole = _taken(whole, place.reshape(-1).tolist(), axis)
    return spread(whole, (*numbers.out_spec[2:], numbers.out_spec[1]), len(c.labels)) * zero_point


def _taken(x: Array, places: Sequence[int], axis: int) -> Array:
    """These indices along an axis: runs of equal ones, which XLA copies faster than it gathers."""
    runs = [(place, len(list(same))) for place, same in groupby(places)]
    if len(runs) > _MOST_RUNS:
        return jnp.take(x, np.array(places), axis=axis)
    parts = [lax.slice_in_dim(x, place, place + 1, axis=axis) for place, _ in runs]
    shapes = [(*x.shape[:axis], count, *x.shape[axis + 1 :]) for _, count in runs]
    return jnp.concatenate(
        [jnp.broadcast_to(part, shape) for part, shape in zip(parts, shapes, strict=True)], axis
    )


def _hits(c: Contraction, axis: int) -> np.ndarray:
    """Of each place of the result along an axis of the image, which taps lie on a pixel."""
    p, numbers = c.node.params, c.node.params["dimension_numbers"]
    size, taps = (
        c.data.shape[numbers.lhs_spec[axis + 2]],
        c.kernel.shape[numbers.rhs_spec[axis + 2]],
    )
    out = c.node.outputs[0].shape[numbers.out_spec[axis + 2]]
    first = np.arange(out)[:, None] * p["window_strides"][axis] - p["padding"][axis][0]
    at = first + np.arange(taps) * p["rhs_dilation"][axis]
    gap = p["lhs_dilation"][axis]
    return (at >= 0) & (at <= (size - 1) * gap) & (at % gap == 0)


def _outs_last(c: Contraction, kernel: Array, kept: Sequence[int]) -> Array:
    """[kept, summed over, out]; without `kept`: [summed over, out]."""
    rest = [i for i in range(kernel.ndim) if i not in (*kept, *c.outs)]
    sizes = [prod(kernel.shape[i] for i in axes) for axes in (kept, rest, c.outs)]
    x = kernel.transpose(*kept, *rest, *c.outs)
    return x.reshape(sizes if kept else sizes[1:])


def _sum(x: Int8[Array, "... terms out"]) -> Int32[Array, "... out"]:
    terms = x.shape[-2]
    whole = terms // _CHUNK * _CHUNK
    parts = [x[..., whole:, :].sum(-2, dtype=jnp.int32)] if whole < terms else []
    if whole:
        parts.append(apart(_rows, x[..., :whole, :]).sum(-2, dtype=jnp.int32))
    return sum(parts[1:], start=parts[0])


def _rows(x: Int8[Array, "... terms out"]) -> Int16[Array, "... rows out"]:
    """Every sixteenth of the rows, added up."""
    parts = x.reshape(*x.shape[:-2], _CHUNK, -1, x.shape[-1])
    rows = [parts[..., i, :, :].astype(jnp.int16) for i in range(_CHUNK)]
    return sum(rows[1:], start=rows[0])


def per_channel(x: Array, labels: Sequence[int | None]) -> Array:
    """A number for each output channel, beside a value whose axes have these labels."""
    kept = [label for label in range(x.ndim) if label in labels]
    x = x.reshape([x.shape[label] for label in kept])
    return spread(x, tuple(labels.index(label) for label in kept), len(labels))
