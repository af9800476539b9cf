"""Primitives that work element by element: axes go together; where is the result zero?"""

import operator
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeAlias

import jax
import numpy as np

from jaxaccel._axes import OPAQUE, Axes, Axis, Free, Labels, Ties
from jaxaccel._graph import Node
from jaxaccel._rules._table import Results, Tie, add

# zero(t, node, operands, zeros, k): at which indices of axis k the result is zero when masked,
# given where each operand is.
Zero: TypeAlias = Callable[[Ties, Node, Sequence[Axes], list[np.ndarray], int], np.ndarray]


def elementwise(zero: Zero) -> Tie:
    """Operands of the result's shape, of size 1 along some axes, or scalars."""

    def tie(t: Ties, node: Node, *operands: Axes) -> Results:
        axes: list[Axis] = []
        for k, size in enumerate(node.outputs[0].shape):
            has_axis = [k < len(x) and x.shape[k] == size for x in operands]
            together = [x[k] for x, has in zip(operands, has_axis, strict=True) if has]
            if any(isinstance(axis, Labels) for axis in together):
                pairs = zip(operands, has_axis, strict=True)
                zeros = [
                    np.broadcast_to(_is_zero(x, x[k] if has else None), size) for x, has in pairs
                ]
                axes.append(t.same(*together, zero=zero(t, node, operands, zeros, k)))
            else:
                axes.append(t.same(*together))
        return [axes]

    return tie


def _is_zero(x: Axes, axis: Axis | None) -> Any:
    if x.constant is not None:
        return np.bool_(x.constant == 0)
    return axis.zero if isinstance(axis, Labels) else np.bool_(axis is OPAQUE)


def never(
    t: Ties, node: Node, operands: Sequence[Axes], zeros: list[np.ndarray], k: int
) -> np.ndarray:
    return np.zeros_like(zeros[0])


def any_factor(
    t: Ties, node: Node, operands: Sequence[Axes], zeros: list[np.ndarray], k: int
) -> np.ndarray:
    return np.logical_or.reduce(zeros)


def first_operand(
    t: Ties, node: Node, operands: Sequence[Axes], zeros: list[np.ndarray], k: int
) -> np.ndarray:
    return zeros[0]


def numerator(
    t: Ties, node: Node, operands: Sequence[Axes], zeros: list[np.ndarray], k: int
) -> np.ndarray:
    t.singular(operands[1], k, zeros[1])
    return zeros[0]


def every_case(
    t: Ties, node: Node, operands: Sequence[Axes], zeros: list[np.ndarray], k: int
) -> np.ndarray:
    if operands[0].constant is not None:
        return zeros[1 + int(operands[0].constant)]
    return np.logical_and.reduce(zeros[1:])


def unknown_at_zero(
    t: Ties, node: Node, operands: Sequence[Axes], zeros: list[np.ndarray], k: int
) -> np.ndarray:
    """Not zero, and perhaps not finite."""
    for operand, zero in zip(operands, zeros, strict=True):
        t.singular(operand, k, zero)
    return np.zeros_like(zeros[0])


def value_at_zero(name: str) -> Zero:
    """What the function itself gives where its operands are zero or known constants."""

    def zero(
        t: Ties, node: Node, operands: Sequence[Axes], zeros: list[np.ndarray], k: int
    ) -> np.ndarray:
        if name == "pow" and operands[1].constant is None:
            return unknown_at_zero(t, node, operands[:1], zeros[:1], k)
        varying = [i for i, x in enumerate(operands) if x.constant is None]
        every = np.logical_and.reduce([zeros[i] for i in varying])
        value = _value(name, node, [x.constant or 0 for x in operands])
        if not np.isfinite(value):
            for i in varying:
                t.singular(operands[i], k, every)
        return every & np.bool_(value == 0)

    return zero


def _value(name: str, node: Node, numbers: Sequence[float]) -> float:
    with np.errstate(all="ignore"):
        if name == "integer_pow":
            return float(np.power(np.float64(numbers[0]), node.params["y"]))
        return float(_FUNCTIONS[name](*map(np.float64, numbers)))


def constant(node: Node, operands: Sequence[Axes]) -> float | None:
    """The number that every element of the node's result is, where that follows."""
    numbers = [x.constant for x in operands]
    if not numbers or any(number is None for number in numbers):
        return None
    if node.name in _KEEP_VALUES:
        return numbers[0]
    if node.name not in _FUNCTIONS or node.name in _AT_ZERO_ALONE:
        return None
    value = _value(node.name, node, [number or 0.0 for number in numbers])
    return _rounded(value, node.outputs[0].aval.dtype) if np.isfinite(value) else None


def _rounded(value: float, dtype: Any) -> float | None:
    """The number as an array of this type would hold it."""
    if np.issubdtype(dtype, np.integer):
        return float(np.int64(value).astype(dtype))
    if np.issubdtype(dtype, np.complexfloating) or dtype == jax.dtypes.float0:
        return None
    with np.errstate(all="ignore"):
        return float(np.asarray(value).astype(dtype))


def _at_zero(value: float, x: Any) -> float:
    """For functions of which nothing but their value at zero matters."""
    return value if x == 0 else np.nan


_KEEP_VALUES = ("broadcast_in_dim", "reshape", "squeeze", "transpose", "copy", "slice")

_AT_ZERO = {
    "stop_gradient reduce_precision name real imag conj erf erf_inv copy "
    "bessel_i1e population_count sign floor ceil round integer_pow": 0.0,
    "exp2 cos cosh logistic erfc not is_finite bessel_i0e acos clz": 1.0,
    "digamma lgamma acosh": np.inf,
}

# Of these nothing but the value at zero is right below.
_AT_ZERO_ALONE = {*" ".join(_AT_ZERO).split(), "or", "xor", "zeros_like"} - {"integer_pow"}

# Each function at zero decides whether "zero where masked" survives it.
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    **{name: partial(_at_zero, v) for names, v in _AT_ZERO.items() for name in names.split()},
    "convert_element_type": float,
    "neg": operator.neg,
    "abs": abs,
    "square": np.square,
    "exp": np.exp,
    "log": np.log,
    "log2": np.log2,
    "one_minus_square": lambda x: 1 - x * x,
    "log1p": np.log1p,
    "expm1": np.expm1,
    "sin": np.sin,
    "tan": np.tan,
    "asin": np.arcsin,
    "atan": np.arctan,
    "sinh": np.sinh,
    "tanh": np.tanh,
    "asinh": np.arcsinh,
    "atanh": np.arctanh,
    "sqrt": np.sqrt,
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "cbrt": np.cbrt,
    "add": operator.add,
    "add_any": operator.add,
    "sub": operator.sub,
    "max": np.maximum,
    "min": np.minimum,
    "pow": np.power,
    "clamp": lambda low, x, high: np.minimum(np.maximum(x, low), high),
    "gt": np.greater,
    "ge": np.greater_equal,
    "lt": np.less,
    "le": np.less_equal,
    "eq": np.equal,
    "ne": np.not_equal,
    "eq_to": np.equal,
    "lt_to": np.less,
    "le_to": np.less_equal,
    "zeros_like": np.zeros_like,
    "or": np.maximum,
    "xor": np.not_equal,
}

for _name in _FUNCTIONS:
    add(_name, elementwise(value_at_zero(_name)))
add("mul and", elementwise(any_factor))
add("shift_left shift_right_logical shift_right_arithmetic", elementwise(first_operand))
add("div rem", elementwise(numerator))
add("select_n", elementwise(every_case))
add("nextafter atan2 complex mulhi", elementwise(never))
add("igamma igammac polygamma zeta", elementwise(unknown_at_zero))


def _unchanged(t: Ties, node: Node, *operands: Axes) -> Results:
    return [list(x) for x in operands]


def _reduced_over_mesh(t: Ties, node: Node, *operands: Axes) -> Results:
    """A sum over the devices of a mesh; `axes` may name array axes too, then nothing is known."""
    if all(isinstance(axis, str) for axis in node.params.get("axes", ())):
        return _unchanged(t, node, *operands)
    for axis in [axis for x in operands for axis in x]:
        t.pin(axis, f"'{node.name}' over an array axis")
    return [[OPAQUE] * len(out.shape) for out in node.outputs]


def _bits(t: Ties, node: Node, x: Axes) -> Results:
    """Zero bits are zero in every type; a change of width adds or takes the last axis."""
    rank = len(node.outputs[0].shape)
    for axis in x.axes[rank:]:
        t.pin(axis, "its bits are put together")
    return [[*x.axes[:rank], *[OPAQUE] * (rank - len(x))]]


def _generated(t: Ties, node: Node, *operands: Axes) -> Results:
    """Random numbers and the like: computed whole, whatever comes in."""
    for axis in [axis for x in operands for axis in x]:
        t.pin(axis, f"'{node.name}' needs all of its operand")
    return [[Free() for _ in out.shape] for out in node.outputs]


add(
    "optimization_barrier device_put sharding_constraint reshard layout_constraint pvary",
    _unchanged,
)
add("bitcast_convert_type", _bits)
add("psum psum_invariant pmax pmin ppermute", _reduced_over_mesh)
add(
    "iota random_bits random_seed random_wrap random_unwrap random_fold_in random_split "
    "random_gamma random_clone threefry2x32 rng_bit_generator rng_uniform axis_index "
    "empty create_token",
    _generated,
)
