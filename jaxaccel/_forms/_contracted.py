"""Convolutions as matrix products, and a matrix product as a sum."""

from math import prod
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from jaxaccel._forms._conv import Conv, accumulator, indices, out_size, padded, tap
from jaxaccel._forms._integers import product


def dot(a: Array, b: Array, conv: Conv) -> Array:
    """The last axis of `a` with the first of `b`, accumulated in float32 at least."""
    if a.dtype == np.int8:
        return product(a, b)
    axes = ((a.ndim - 1,), (0,))
    return lax.dot_general(
        a,
        b,
        (axes, ((), ())),
        precision=conv.precision,
        preferred_element_type=accumulator(conv.dtype),
    )


def _taps(x: Array, kernel: Array, conv: Conv) -> list[Array]:
    """The pixels that each tap of the kernel meets."""
    size, x = out_size(x.shape, kernel.shape, conv), padded(x, conv)
    return [
        tap(x, index, size, conv.strides, conv.rhs_dilation) for index in indices(kernel.shape[:2])
    ]


def im2col(x: Array, kernel: Array, conv: Conv) -> Array:
    """One product: the pixels under each tap beside each other. 1x1: the images themselves."""
    patches = jnp.concatenate(_taps(x, kernel, conv), 3)
    return dot(patches, kernel.reshape(-1, kernel.shape[3]), conv).astype(conv.dtype)


def summed_dots(x: Array, kernel: Array, conv: Conv) -> Array:
    """The sum over the taps of the product of what a tap meets with it."""
    taps = zip(_taps(x, kernel, conv), indices(kernel.shape[:2]), strict=True)
    products = [dot(seen, kernel[index], conv) for seen, index in taps]
    return sum(products[1:], start=products[0]).astype(conv.dtype)


def row_im2col(x: Array, kernel: Array, conv: Conv) -> Array:
    """The sum over the kernel's rows of one product: the taps of a row beside each other."""
    taps, (rows, columns) = _taps(x, kernel, conv), kernel.shape[:2]
    products = []
    for r in range(rows):
        row = jnp.concatenate(taps[r * columns : (r + 1) * columns], 3)
        products.append(dot(row, kernel[r].reshape(-1, kernel.shape[3]), conv))
    return sum(products[1:], start=products[0]).astype(conv.dtype)


def scattered_dots(x: Array, kernel: Array, conv: Conv) -> Array:
    """One product of every pixel with every tap, each added where the tap takes it.

    For a kernel that moves by one: an input gradient with few channels to give.
    """
    taps, out = indices(kernel.shape[:2]), kernel.shape[3]
    every = dot(x, kernel.transpose(2, 0, 1, 3).reshape(x.shape[3], -1), conv)
    size, total = out_size(x.shape, kernel.shape, conv), None
    for number, index in enumerate(taps):
        part = every[..., number * out : (number + 1) * out]
        edges = [
            (low - i * d, n - (low - i * d) - (pixels - 1) * gap - 1, gap - 1)
            for i, d, (low, _), gap, n, pixels in zip(
                index, conv.rhs_dilation, conv.pads, conv.lhs_dilation, size, x.shape[1:3],
                strict=True,
            )
        ]  # fmt: skip
        part = lax.pad(part, jnp.zeros((), part.dtype), [(0, 0, 0), *edges, (0, 0, 0)])
        total = part if total is None else total + part
    assert total is not None
    return total.astype(conv.dtype)


def _windows(x: Array, kernel: Array, conv: Conv) -> list[Array]:
    """What the whole kernel meets at each place of the result, batch last."""
    places, images = out_size(x.shape, kernel.shape, conv), padded(x, conv)
    images = images.transpose(3, 1, 2, 0)
    return [
        tap(images, index, kernel.shape[:2], conv.rhs_dilation, conv.strides)
        for index in indices(places)
    ]


def _assembled(found: Array, x: Array, kernel: Array, conv: Conv) -> Array:
    """[place, batch, out] -> [batch, height, width, out]."""
    places = out_size(x.shape, kernel.shape, conv)
    found = found.reshape(*places, x.shape[0], kernel.shape[3])
    return found.transpose(2, 0, 1, 3).astype(conv.dtype)


def gathered(x: Array, kernel: Array, conv: Conv) -> Array:
    """One product over the whole window, for a large kernel at few places: a kernel's gradient."""
    windows = jnp.concatenate(_windows(x, kernel, conv), 3)
    rows = prod(windows.shape[:3])
    flat = kernel.transpose(2, 0, 1, 3).reshape(rows, -1)
    found = dot(windows.reshape(rows, -1).T, flat, conv)
    return _assembled(found, x, kernel, conv)


def by_place(x: Array, kernel: Array, conv: Conv) -> Array:
    """The same with one product for each place."""
    flat = kernel.transpose(2, 0, 1, 3).reshape(-1, kernel.shape[3])
    found = [dot(seen.reshape(len(flat), -1).T, flat, conv) for seen in _windows(x, kernel, conv)]
    return _assembled(jnp.stack(found), x, kernel, conv)


def gathered_rows(x: Array, kernel: Array, conv: Conv) -> Array:
    """The same with one product for each row of places."""
    windows, (rows, columns) = _windows(x, kernel, conv), out_size(x.shape, kernel.shape, conv)
    flat = kernel.transpose(2, 0, 1, 3).reshape(-1, kernel.shape[3])
    found = []
    for r in range(rows):
        row = jnp.concatenate(windows[r * columns : (r + 1) * columns], 3)
        found.append(dot(row.reshape(len(flat), -1).T, flat, conv))
    return _assembled(jnp.concatenate(found), x, kernel, conv)


def outer_products(a: Array, b: Array, **params: Any) -> Array:
    """A matrix product over few numbers, as the sum of a product for each, which XLA fuses."""
    ((left,), (right,)), _ = params["dimension_numbers"]
    result = params["preferred_element_type"] or jnp.promote_types(a.dtype, b.dtype)
    wide = jnp.promote_types(result, jnp.float32)
    columns = jnp.moveaxis(a.astype(wide), left, 0)
    rows = jnp.moveaxis(b.astype(wide), right, 0)
    columns = columns.reshape(*columns.shape, *(1 for _ in rows.shape[1:]))
    products = [columns[k] * rows[k] for k in range(len(rows))]
    return sum(products[1:], start=products[0]).astype(result)
