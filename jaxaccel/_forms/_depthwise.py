"""Convolutions of each channel alone, as sums that XLA fuses."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxaccel._apart import apart
from jaxaccel._forms._conv import Conv, accumulator, indices, out_size, padded, tap

# Rows summed by unrolled code before XLA's slower reduction. From 16 on XLA:CPU does not fuse the
# slices of a tap into it; with 8 more is left to the reduction.
_UNROLLED_ROWS = 14


def shifted(x: Array, kernel: Array, conv: Conv) -> Array:
    """Sum over the taps of the slice of the images a tap sees times the tap, per channel."""
    wide, total = _wide(x, conv), accumulator(conv.dtype)
    size = out_size(x.shape, kernel.shape, conv)
    # A channel with several outputs is that many equal channels.
    x = jnp.repeat(padded(x, conv).astype(wide), kernel.shape[3] // x.shape[3], 3)
    products = [
        tap(x, index, size, conv.strides, conv.rhs_dilation) * kernel[index][0].astype(wide)
        for index in indices(kernel.shape[:2])
    ]
    sums = [product.astype(total) for product in products]
    return sum(sums[1:], start=sums[0]).astype(conv.dtype)


def summed(x: Array, kernel: Array, conv: Conv) -> Array:
    """The kernel's gradient: for each of its places, products of two images, summed.

    Here the images' channels come as the batch (`batch_groups` of one each), and the batch as the
    channels. Rows are added up first, by code that XLA vectorises, apart from the reduction
    behind it.
    """
    wide = _wide(x, conv)
    places = out_size(x.shape, kernel.shape, conv)
    images = padded(x.transpose(3, 1, 2, 0), conv).astype(wide)
    images = jnp.repeat(images, kernel.shape[3] // x.shape[0], 3)
    g = kernel.astype(wide).transpose(2, 0, 1, 3)

    def rows_of(images: Array, g: Array) -> tuple[Array, ...]:
        size, steps = g.shape[1:3], (conv.rhs_dilation, conv.strides)
        return tuple(_row_sums(tap(images, p, size, *steps), g) for p in indices(places))

    sums = [rows.sum((0, 1, 2)) for rows in apart(rows_of, images, g)]
    return jnp.stack(sums).reshape(1, *places, kernel.shape[3]).astype(conv.dtype)


def _wide(x: Array, conv: Conv) -> Any:
    """The dtype to multiply in; int16 holds a product of int8, not the sum of two."""
    if x.dtype == np.int8:
        return np.int16
    return jnp.promote_types(jnp.promote_types(x.dtype, conv.dtype), jnp.float32)


def _row_sums(a: Array, b: Array) -> Array:
    """The products of two images, with rows added up."""
    rows = a.shape[1]
    step = rows // -(-rows // _UNROLLED_ROWS)
    whole = rows // step * step
    every = [a[:, r:whole:step] * b[:, r:whole:step] for r in range(step)]
    total = sum(every[1:], start=every[0])
    rest = [a[:, r : r + 1] * b[:, r : r + 1] for r in range(whole, rows)]
    return jnp.concatenate([total, sum(rest[1:], start=rest[0])], 1) if rest else total
