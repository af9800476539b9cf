"""Pooling and the gradient of max pooling: maxima, sums and selections of strided slices.

Where values tie the first in row-major order is taken, as XLA takes it. A window that holds a
NaN, or at an edge nothing but -inf, may pass its gradient to another pixel than XLA's, or to none.
"""

from collections.abc import Mapping, Sequence
from functools import reduce
from itertools import product
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jaxaccel._apart import apart


def _edges(params: Mapping[str, Any]) -> list[tuple[int, int, int]]:
    return [(int(low), int(high), 0) for low, high in params["padding"]]


def _lowest(dtype: Any) -> float:
    """What no number of this dtype is below."""
    return -jnp.inf if jnp.issubdtype(dtype, jnp.floating) else jnp.iinfo(dtype).min


def _pixels(
    x: Array, size: Sequence[int], params: Mapping[str, Any], edge: float | None = None
) -> list[Array]:
    """The pixels of every window, one array per place in the window, in row-major order."""
    edge = _lowest(x.dtype) if edge is None else edge
    x = lax.pad(x, jnp.asarray(edge, x.dtype), _edges(params))
    window, strides = params["window_dimensions"], params["window_strides"]
    found = []
    for start in product(*(range(n) for n in window)):
        stop = [a + (n - 1) * s + 1 for a, n, s in zip(start, size, strides, strict=True)]
        found.append(lax.slice(x, start, stop, strides))
    return found


def _size(x: Array, params: Mapping[str, Any]) -> list[int]:
    window, strides = params["window_dimensions"], params["window_strides"]
    return [
        (n + low + high - w) // s + 1
        for n, (low, high, _), w, s in zip(x.shape, _edges(params), window, strides, strict=True)
    ]


def maxima(x: Array, **params: Any) -> Array:
    """The largest of the pixels of each window, not computed anew by what reads it."""
    return apart(lambda x: reduce(lax.max, _pixels(x, _size(x, params), params)), x)


def sums(x: Array, **params: Any) -> Array:
    """The sum of the pixels of each window: average pooling, and with stride 1 its gradient."""

    def run(x: Array) -> Array:
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        return reduce(lax.add, _pixels(wide, _size(x, params), params, 0.0)).astype(x.dtype)

    return apart(run, x)


def scattered(g: Array, x: Array, **params: Any) -> Array:
    """Each window's gradient to its first largest pixel.

    First which place of its window that is; then, for each place between the windows' strides,
    the sum of the windows that reach it.
    """

    def run(g: Array, x: Array, best: Array) -> Array:
        pixels = _pixels(x, g.shape, params)
        first = jnp.full(g.shape, len(pixels) - 1, jnp.int32)
        for i, value in reversed(list(enumerate(pixels[:-1]))):
            first = jnp.where(value == best, i, first)
        return _sent_back(g, first, x.shape, params)

    return apart(run, g, x, maxima(x, **params))


def _sent_back(g: Array, first: Array, shape: Sequence[int], params: Mapping[str, Any]) -> Array:
    strides, rank = params["window_strides"], len(shape)
    grid = [-(-n // s) for n, s in zip(shape, strides, strict=True)]
    places = product(*(range(s) for s in strides))
    parts = jnp.stack([_reaching(g, first, place, grid, params) for place in places])
    between = [axis for k in range(rank) for axis in (rank + k, k)]
    parts = parts.reshape(*strides, *grid).transpose(between)
    whole = parts.reshape([n * s for n, s in zip(grid, strides, strict=True)])
    return lax.slice(whole, [0] * rank, shape)


def _reaching(
    g: Array, first: Array, place: Sequence[int], grid: Sequence[int], params: Mapping[str, Any]
) -> Array:
    """What the pixels at `place`, and every stride from it, get from the windows over them."""
    window, strides, edges = params["window_dimensions"], params["window_strides"], _edges(params)
    total = jnp.zeros(grid, g.dtype)
    for number, index in enumerate(product(*(range(n) for n in window))):
        offsets = [r + low - i for r, (low, _, _), i in zip(place, edges, index, strict=True)]
        if any(offset % s for offset, s in zip(offsets, strides, strict=True)):
            continue
        shift = [
            (-(offset // s), n + offset // s - size, 0)
            for offset, s, n, size in zip(offsets, strides, grid, g.shape, strict=True)
        ]
        here = lax.pad(first, jnp.int32(-1), shift) == number
        total += jnp.where(here, lax.pad(g, jnp.zeros((), g.dtype), shift), 0)
    return total
