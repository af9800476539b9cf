"""Rules for what is done to the elements, or to whole axes, of values held in any order."""

from collections.abc import Callable, Sequence
from math import prod
from typing import Any, TypeAlias

import numpy as np
from jax import lax
from jaxtyping import Array

from jaxaccel._graph import Node
from jaxaccel._slices import is_symbolic
from jaxaccel.export._onnx import _ops
from jaxaccel.export._onnx._converted import at, only_example
from jaxaccel.export._onnx._moved import (
    Constant,
    Held,
    Moved,
    Reshaped,
    dtype_of,
    inverse,
    is_constant,
    moved,
    ordered,
    plain,
    reshaped,
    shape_of,
)

# rule(node, operands) -> results, or None where the node runs on plain operands.
Rule: TypeAlias = Callable[[Node, list[Held]], Sequence[Held] | None]


def elementwise(node: Node, operands: list[Held]) -> Sequence[Held] | None:
    """In the order of most of the operands."""
    order = _common(operands)
    return None if order is None else _in(order, operands, node.run)


def _in(
    order: tuple[int, ...], operands: Sequence[Held], run: Callable[..., Sequence[Any]]
) -> list[Held]:
    arrays = [ordered(x, order) if len(shape_of(x)) else plain(x) for x in operands]
    return [moved(out, order) for out in run(arrays)]


def _common(operands: Sequence[Held]) -> tuple[int, ...] | None:
    """The order of axes that needs the fewest transposes; None where that is their own."""
    if len({len(shape_of(x)) for x in operands} - {0}) != 1:
        return None
    wide = [x for x in operands if not is_constant(x) and len(shape_of(x))]
    orders = [_order(x) for x in sorted(wide, key=lambda x: not isinstance(x, Moved))]
    best = max(orders, key=orders.count, default=())
    return None if best == tuple(range(len(best))) else best


def rounding(node: Node, operands: list[Held]) -> Sequence[Held] | None:
    """ONNX rounds halves to even, as `jax.numpy` does; `lax.round` away from zero."""
    if node.params["rounding_method"] != lax.RoundingMethod.AWAY_FROM_ZERO:
        return elementwise(node, operands)

    def away(x: Array) -> Array:
        size = lax.abs(x)
        floor = lax.floor(size)
        half = lax.ge(lax.sub(size, floor), np.asarray(0.5, x.dtype))
        return lax.mul(lax.sign(x), lax.add(floor, half.astype(x.dtype)))

    return each(operands[0], away)


def limited(node: Node, operands: list[Held]) -> Sequence[Held] | None:
    """A relu by its name, and an upper bound as a clip: so they are fused with what is before."""
    for x, other in (operands, operands[::-1]):
        number, largest = _number(other), node.name == "max"
        whole = shape_of(x) == tuple(node.outputs[0].shape)
        if is_constant(x) or number is None or not whole or not _is_float(x):
            continue
        if largest and number == 0:
            return each(x, _ops.relu)
        low, high = (number, np.inf) if largest else (-np.inf, number)
        return _clipped(x, low, high)
    return elementwise(node, operands)


def clamp(node: Node, operands: list[Held]) -> Sequence[Held] | None:
    """A clip by its name, between two numbers."""
    low, x, high = operands
    if None in (_number(low), _number(high)) or not _is_float(x):
        return elementwise(node, operands)
    return _clipped(x, _number(low), _number(high))


def _clipped(x: Held, low: float | None, high: float | None) -> list[Held]:
    limits = [np.asarray(bound, dtype_of(x)) for bound in (low, high)]
    return each(x, lambda x: _ops.clip(x, *limits))


def each(x: Held, run: Callable[[Any], Any]) -> list[Held]:
    """Of each element, however it is held."""
    if isinstance(x, Moved | Reshaped):
        return [x._replace(array=run(x.array))]
    return [run(plain(x))]


def same(node: Node, operands: list[Held]) -> Sequence[Held] | None:
    return operands


def remainder(node: Node, operands: list[Held]) -> Sequence[Held] | None:
    """Of which jax2onnx's form needs to know all sizes."""
    arrays = [plain(x) for x in operands]
    return [_ops.remainder(*arrays)]


def _order(x: Held) -> tuple[int, ...]:
    return x.order if isinstance(x, Moved) else tuple(range(len(shape_of(x))))


def _number(x: Held) -> float | None:
    """The one number that all elements of a constant are."""
    array = x.array if isinstance(x, Constant) else x
    if not is_constant(x) or not isinstance(array, np.ndarray | np.generic | int | float):
        return None
    array = np.asarray(array)
    alike = array.size > 0 and bool((array == array.flat[0]).all())
    return float(array.flat[0]) if alike and array.dtype.kind in "if" else None


def _is_float(x: Held) -> bool:
    return np.issubdtype(dtype_of(x), np.floating)


def transpose(node: Node, operands: list[Held]) -> Sequence[Held] | None:
    """Only noted: what reads it may want another order."""
    (x,) = operands
    permutation = node.params["permutation"]
    if is_constant(x):
        return None
    array = x.array if isinstance(x, Moved) else plain(x)
    return [moved(array, [inverse(permutation)[axis] for axis in _order(x)])]


def reduction(node: Node, operands: list[Held]) -> Sequence[Held] | None:
    """What is left keeps its order."""
    (x,) = operands
    if not isinstance(x, Moved):
        return None
    axes = node.params["axes"]
    places = tuple(sorted(x.order.index(axis) for axis in axes))
    rest = [axis for axis in x.order if axis not in axes]
    order = [sorted(rest).index(axis) for axis in rest]
    return [moved(out, order) for out in node.run([x.array], axes=places)]


def concatenate(node: Node, operands: list[Held]) -> Sequence[Held] | None:
    """Without those that have no elements, as the edges of JAX's padding."""
    axis = node.params["dimension"]
    operands = [x for x in operands if shape_of(x)[axis] != 0]
    if len(operands) == 1:
        return operands
    order = _common(operands)
    if order is None:
        return node.run(list(map(plain, operands)))
    return _in(order, operands, lambda arrays: node.run(arrays, dimension=order.index(axis)))


def stack(node: Node, operands: list[Held]) -> Sequence[Held] | None:
    axis, sizes = node.params["axis"], list(shape_of(operands[0]))
    wide = (*sizes[:axis], 1, *sizes[axis:])
    return [lax.concatenate([plain(reshaped(x, wide)) for x in operands], axis)]


def tile(node: Node, operands: list[Held]) -> Sequence[Held] | None:
    repeats = tuple(node.params["reps"])
    if is_symbolic(repeats) or len(repeats) != len(shape_of(operands[0])):
        return None
    return [_ops.tiled(plain(operands[0]), repeats)]


def piece(node: Node, operands: list[Held]) -> Sequence[Held] | None:
    """A slice, along those axes alone that are not kept whole."""
    (x,), p = operands, node.params
    sizes, strides = shape_of(x), p["strides"] or [1] * len(shape_of(x))
    cut = {
        axis: (start, end, step)
        for axis, (start, end, step) in enumerate(
            zip(p["start_indices"], p["limit_indices"], strides, strict=True)
        )
        if (start, end, step) != (0, sizes[axis], 1)
    }
    if is_constant(x) or any(map(is_symbolic, cut.values())):
        return None
    order = _order(x)
    places = {order.index(axis): numbers for axis, numbers in cut.items()}
    return _in(order, [x], lambda arrays: [_ops.sliced(arrays[0], places)])


def flip(node: Node, operands: list[Held]) -> Sequence[Held] | None:
    """As a slice; of it alone jax2onnx writes eight nodes."""
    (x,), axes = operands, node.params["dimensions"]
    order, sizes = _order(x), shape_of(x)
    if is_constant(x) or is_symbolic([sizes[axis] for axis in axes]):
        return None
    places = {order.index(axis): (-1, -sizes[axis] - 1, -1) for axis in axes}
    return _in(order, [x], lambda arrays: [_ops.sliced(arrays[0], places)])


def split(node: Node, operands: list[Held]) -> Sequence[Held] | None:
    (x,) = operands
    if not isinstance(x, Moved):
        return None
    made = node.run([x.array], axis=x.order.index(node.params["axis"]))
    return [moved(part, x.order) for part in made]


def shuffle(node: Node, operands: list[Held]) -> Sequence[Held] | None:
    """Of the groups of an axis, as of channels: in whatever order of axes."""
    (x,), places = operands, node.params["order"]
    groups = _groups(places)
    if groups is None:
        return node.run([plain(x)])
    order = _order(x)
    axis = order.index(node.params["axis"])

    def swapped(arrays: list[Array]) -> list[Array]:
        sizes = arrays[0].shape
        parts = (*sizes[:axis], groups, len(places) // groups, *sizes[axis + 1 :])
        swap = [*range(axis), axis + 1, axis, *range(axis + 2, len(parts))]
        return [_ops.reshape(lax.transpose(_ops.reshape(arrays[0], parts), swap), sizes)]

    return [x] if groups == 1 else _in(order, [x], swapped)


def _groups(places: np.ndarray) -> int | None:
    """Of how many groups these are the first of each, then the second, and so on."""
    numbers = np.arange(len(places))
    parts = (groups for groups in numbers + 1 if len(places) % groups == 0)
    swaps = (n for n in parts if np.array_equal(numbers.reshape(n, -1).T.ravel(), places))
    return next(map(int, swaps), None)


def reshape(node: Node, operands: list[Held]) -> Sequence[Held] | None:
    """Noted as well: the last of several is the one that counts."""
    shape, before = node.outputs[0].shape, shape_of(operands[0])
    if is_symbolic(before) and prod(before) != prod(shape):  # which JAX leaves for later
        raise ValueError(only_example(f"{at(node.name, node.source)} makes {before} {shape}"))
    order = node.params["dimensions"] if node.name == "reshape" else None  # as of order="F"
    return [reshaped(operands[0] if order is None else ordered(operands[0], order), shape)]


def broadcast(node: Node, operands: list[Held]) -> Sequence[Held] | None:
    """Without computing sizes, where none is new that is not known."""
    (x,), shape = operands, node.outputs[0].shape
    places = node.params["broadcast_dimensions"]
    sizes = dict(zip(places, shape_of(x), strict=True))
    wide = tuple(sizes.get(axis, 1) for axis in range(len(shape)))
    if wide == tuple(shape):
        return [reshaped(x, shape)]
    kept = [1 if had == size else size for had, size in zip(wide, shape, strict=True)]
    if is_symbolic(kept):
        return None
    return [_ops.expanded(plain(reshaped(x, wide)), tuple(kept), tuple(shape))]


ELEMENTWISE = (
    *("abs", "add", "add_any", "and", "cbrt", "ceil", "convert_element_type", "cos"),
    *("div", "eq", "erf", "erfc", "exp", "exp2", "expm1", "floor", "ge", "gt", "integer_pow"),
    *("is_finite", "le", "log", "log1p", "logistic", "lt", "mul", "ne", "neg", "not", "or"),
    *("pow", "rsqrt", "select_n", "sign", "sin", "sqrt", "square"),
    *("sub", "tan", "tanh"),
)
REDUCTIONS = (
    *("reduce_and", "reduce_max", "reduce_min", "reduce_or", "reduce_prod", "reduce_sum"),
    *("argmax", "argmin"),
)
RULES: dict[str, Rule] = {
    **dict.fromkeys(ELEMENTWISE, elementwise),
    **dict.fromkeys(REDUCTIONS, reduction),
    **dict.fromkeys(("copy", "copy_p", "stop_gradient", "optimization_barrier"), same),
    **dict.fromkeys(("max", "min"), limited),
    "round": rounding,
    "clamp": clamp,
    "rem": remainder,
    "transpose": transpose,
    "concatenate": concatenate,
    "stack": stack,
    "tile": tile,
    "slice": piece,
    "rev": flip,
    "split": split,
    "channel_shuffle": shuffle,
    "reshape": reshape,
    "squeeze": reshape,
    "broadcast_in_dim": broadcast,
}
