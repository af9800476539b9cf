"""The rule for products: a matrix product of ONNX, of axes that were put side by side."""

from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple

import numpy as np
from jax import lax
from jaxtyping import Array

from jaxaccel._graph import Node
from jaxaccel._graph import shape_of as atom_shape
from jaxaccel._slices import is_symbolic
from jaxaccel.export._onnx import _ops
from jaxaccel.export._onnx._elements import Rule
from jaxaccel.export._onnx._moved import (
    Held,
    dtype_of,
    is_constant,
    moved,
    ordered,
    plain,
    shape_of,
)


class Axes(NamedTuple):
    """Those of one operand."""

    batch: tuple[int, ...]
    free: tuple[int, ...]
    summed: tuple[int, ...]


def contraction(node: Node, operands: list[Held]) -> Sequence[Held] | None:
    """As a ``MatMul`` or a ``Gemm``; None where two sizes that are not known would be merged."""
    wanted = node.params["preferred_element_type"]
    axes = [axes_of(node, place) for place in (0, 1)]
    first, second = [_cast(x, wanted) for x in operands]
    if not axes[0].summed:
        return [_outer(first, second, axes)]
    if is_constant(first) and not is_constant(second):
        return _swapped(node, second, first, axes[::-1])
    made = multiplied(first, second, *axes)
    return None if made is None else [made]


def axes_of(node: Node, place: int) -> Axes:
    summed, batch = (pair[place] for pair in node.params["dimension_numbers"])
    rank = len(atom_shape(node.inputs[place]))
    free = tuple(axis for axis in range(rank) if axis not in (*summed, *batch))
    return Axes(tuple(batch), free, tuple(summed))


def _cast(x: Held, wanted: Any) -> Held:
    if wanted is None or dtype_of(x) == wanted:
        return x
    return lax.convert_element_type(plain(x), wanted)


def _swapped(node: Node, data: Held, kernel: Held, axes: Sequence[Axes]) -> Sequence[Held] | None:
    """A kernel that comes first: as if it came second, as the libraries have it."""
    made = multiplied(data, kernel, *axes)
    if made is None:
        return None
    batch, free, outs = (len(part) for part in (axes[0].batch, axes[0].free, axes[1].free))
    order = [*range(batch), *range(batch + outs, batch + outs + free)]
    return [moved(made, [*order, *range(batch, batch + outs)])]


def multiplied(first: Held, second: Held, a: Axes, b: Axes) -> Array | None:
    """Axes of the batch, then those of the first operand, then those of the second."""
    sizes = lambda x, axes: [shape_of(x)[axis] for axis in axes]
    batch, frees, outs = sizes(first, a.batch), sizes(first, a.free), sizes(second, b.free)
    terms = prod(sizes(first, a.summed))
    if is_symbolic((terms, *outs)) or 0 in (terms, *outs):
        return None
    # With a kernel of no batch, the axes of the data need not be merged.
    rows = frees if frees and not batch else [prod(frees)]
    if sum(map(is_symbolic, [[size] for size in (*batch, *rows)])) > 1:
        return None
    x = _shaped(ordered(first, (*a.batch, *a.free, *a.summed)), (*batch, *rows, terms))
    y = _shaped(ordered(second, (*b.batch, *b.summed, *b.free)), (*batch, terms, prod(outs)))
    flat = x.ndim == y.ndim == 2 and np.issubdtype(x.dtype, np.floating)
    made = _ops.dense(x, y) if flat else _ops.product(x, y)
    return _shaped(made, (*batch, *frees, *outs))


def _shaped(x: Array, shape: tuple[Any, ...]) -> Array:
    return x if x.shape == shape else _ops.reshape(x, shape)


def _outer(first: Held, second: Held, axes: Sequence[Axes]) -> Array:
    """Of which nothing is summed: of jax2onnx's ``Einsum`` the shapes would be wrong."""
    a, b = axes
    x, y = ordered(first, (*a.batch, *a.free)), ordered(second, (*b.batch, *b.free))
    batch, outs = x.shape[: len(a.batch)], y.shape[len(b.batch) :]
    wide = _ops.reshape(x, (*x.shape, *[1] * len(outs)))
    return lax.mul(wide, _ops.reshape(y, (*batch, *[1] * len(a.free), *outs)))


RULES: dict[str, Rule] = {"dot_general": contraction}
