"""Sums of products of int8 in int32, as XLA's libraries take them: equal to the last bit."""

from math import prod
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from jaxaccel._forms._conv import Conv, ConvForm, ordered, out_size, padded

FOUR = 4  # channels are packed by fours
SIXTEEN = 16  # channels in and out up to which XLA:CPU takes a loop of its own
EXACT = 2**24 // 128**2  # products of int8 whose sum float32 holds


def product(a: Array, b: Array) -> Array:
    """The last axis of `a` with the first of `b`."""
    rows = a.reshape(-1, a.shape[-1])
    return matrix_product(rows, b, 0).reshape(*a.shape[:-1], b.shape[1])


def matrix_product(rows: Array, b: Array, axis: int) -> Array:
    """[m, k] with this axis of [k, n] or [n, k]. XLA:CPU has no fast code for one row or column."""
    m, n = rows.shape[0], b.shape[1 - axis]
    zero, none = jnp.zeros((), np.int8), (0, 0, 0)
    if m == 1:
        rows = lax.pad(rows, zero, [(0, 1, 0), none])
    if n == 1:
        wider = [(0, FOUR - 1, 0), none]
        b = lax.pad(b, zero, wider if axis else wider[::-1])
    found = lax.dot_general(rows, b, (((1,), (axis,)), ((), ())), preferred_element_type=np.int32)
    return found[:m, :n]


def by_rows(a: Array, b: Array, **params: Any) -> Array:
    """A matrix product with what is summed over last in `a`, and first or last in `b`."""
    (left, right), _ = params["dimension_numbers"]
    free = [[i for i in range(x.ndim) if i not in axes] for x, axes in ((a, left), (b, right))]
    shape = [a.shape[i] for i in free[0]] + [b.shape[i] for i in free[1]]
    terms = prod(a.shape[i] for i in left)
    rows = ordered(a, (*free[0], *left)).reshape(-1, terms)
    if (*right, *free[1]) == tuple(range(b.ndim)):
        return matrix_product(rows, b.reshape(terms, -1), 0).reshape(shape)
    return matrix_product(rows, ordered(b, (*free[1], *right)).reshape(-1, terms), 1).reshape(shape)


def for_library(x: Array, kernel: Array, conv: Conv) -> Array:
    """The convolution as XLA:CPU's library takes it.

    Channels by fours, more than sixteen of them on one side; no more places, and no larger kernel,
    than pixels; no spread images. What lacks of this are zeros.
    """
    x, kernel = _with_channels(x, kernel)
    sizes = zip(out_size(x.shape, kernel.shape, conv), kernel.shape, x.shape[1:3], strict=False)
    if conv.lhs_dilation > (1, 1) or any(max(n, k) > pixels for n, k, pixels in sizes):
        x, conv = padded(x, conv), conv._replace(pads=((0, 0), (0, 0)), lhs_dilation=(1, 1))
    # An edge that XLA folds into the convolution makes it wrong (JAX 0.10) or fail (JAX 0.11).
    return conv(lax.optimization_barrier(x), kernel)


def _with_channels(x: Array, kernel: Array) -> tuple[Array, Array]:
    channels, out = kernel.shape[2:]
    more = -channels % FOUR if max(channels, out) > SIXTEEN else SIXTEEN + FOUR - channels
    if not more:
        return x, kernel
    zero, none = jnp.zeros((), np.int8), (0, 0, 0)
    images = lax.pad(x, zero, [none, none, none, (0, more, 0)])
    return images, lax.pad(kernel, zero, [none, none, (0, more, 0), none])


def block_diagonal(form: ConvForm) -> ConvForm:
    """All groups as one, under a kernel with zeros between them: more products, one call."""

    def run(x: Array, kernel: Array, conv: Conv) -> Array:
        groups, (*taps, channels, out) = conv.groups, kernel.shape
        own = jnp.eye(groups, dtype=bool)[:, None, :, None]
        spread = kernel.reshape(*taps, 1, channels, groups, out // groups)
        whole = jnp.where(own, spread, jnp.zeros((), np.int8))
        whole = whole.reshape(*taps, groups * channels, out)
        return form(x, whole, conv._replace(groups=1))

    return run


def float32_results(x: Array, kernel: Array, conv: Conv) -> Array:
    """By convolutions with float32 results, of so few channels each that these are exact.

    XLA:GPU has none of int8 with int32 results. Its library takes channels by 4, and faster by 32.
    """
    most = EXACT // prod(kernel.shape[:2])
    most = next(most - most % by for by in (32, FOUR, 1) if most >= by)
    single, channels = conv._replace(dtype=np.dtype(np.float32)), kernel.shape[2]
    parts = [slice(start, start + most) for start in range(0, channels, most)]
    found = [single(x[..., part], kernel[:, :, part]).astype(np.int32) for part in parts]
    return sum(found[1:], start=found[0])
