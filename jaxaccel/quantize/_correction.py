"""What a zero point adds to an accumulator: computed from the kernel, so that it may be pruned.

``sum((q - z) * w) = sum(q * w) - z * sum(w)``. Where an image has edges, a place sums over the
taps that lie on the image alone; the places that see the same taps share one correction.
"""

from collections.abc import Sequence
from math import prod

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int8, Int16, Int32

from jaxaccel._apart import apart
from jaxaccel.fold._contractions import Contraction, spread

_CHUNK = 16  # rows added by unrolled code; XLA:CPU's own reduction of bytes takes 8 times as long


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
        whole = jnp.take(whole, place.reshape(-1), axis=axis)
    return spread(whole, (*numbers.out_spec[2:], numbers.out_spec[1]), len(c.labels)) * zero_point


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
    parts = [x[..., whole:, :].astype(jnp.int32).sum(-2)] if whole < terms else []
    if whole:
        parts.append(apart(_rows, x[..., :whole, :]).astype(jnp.int32).sum(-2))
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
