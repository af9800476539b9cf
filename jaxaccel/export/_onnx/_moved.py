"""Values of a graph on their way to ONNX: held in whatever order of axes costs least.

ONNX has convolutions and poolings of images with channels first only. Where a network has them
last, a value is held as it came out of one, and is only transposed where something needs it so.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from jaxaccel._slices import is_symbolic
from jaxaccel.export._onnx._ops import dequantized, named, reshape


class Moved(NamedTuple):
    """A value as ``array = transpose(value, order)``."""

    array: Array
    order: tuple[int, ...]


class Reshaped(NamedTuple):
    """A value as ``reshape(array, shape)``; a reshape of it is one of the array."""

    array: Array
    shape: tuple[Any, ...]


class Constant(NamedTuple):
    """An array that is in the file, under a name."""

    array: np.ndarray
    name: str


class Kernel(NamedTuple):
    """A constant of integers that stand for numbers: with a scale, along an axis if that is one."""

    values: Constant
    scale: Any
    zero_point: Any
    axis: int | None


Held: TypeAlias = Any  # one of these, or a traced array, or a number


def inverse(order: Sequence[int]) -> tuple[int, ...]:
    return tuple(sorted(range(len(order)), key=order.__getitem__))


def shape_of(value: Held) -> tuple[Any, ...]:
    """Of the value, in its own order of axes."""
    if isinstance(value, Moved):
        return tuple(value.array.shape[place] for place in inverse(value.order))
    if isinstance(value, Kernel):
        return value.values.array.shape
    if isinstance(value, Reshaped):
        return value.shape
    return tuple(value.array.shape) if isinstance(value, Constant) else jnp.shape(value)


def dtype_of(value: Held) -> Any:
    if isinstance(value, Kernel):
        return dtype_of(value.scale)
    held = isinstance(value, Moved | Reshaped | Constant)
    return value.array.dtype if held else jnp.result_type(value)


def is_constant(value: Held) -> bool:
    return not isinstance(value, jax.core.Tracer | Moved | Reshaped)


def moved(array: Array, order: Sequence[int]) -> Held:
    """The value whose axes are in this order in the array."""
    order = tuple(order)
    return array if order == tuple(range(len(order))) else Moved(array, order)


def reshaped(value: Held, shape: Sequence[Any]) -> Held:
    """The value with another shape."""
    if isinstance(value, Constant) and not is_symbolic(shape):
        return value._replace(array=value.array.reshape(shape))
    array = value.array if isinstance(value, Reshaped) else plain(value)
    return array if array.shape == tuple(shape) else Reshaped(array, tuple(shape))


def ordered(value: Held, order: Sequence[int]) -> Array:
    """``transpose(value, order)``, as an array."""
    order = tuple(order)
    if isinstance(value, Moved):
        return _transposed(value.array, [value.order.index(axis) for axis in order])
    if isinstance(value, Kernel):
        values = value.values._replace(array=value.values.array.transpose(order))
        axis = None if value.axis is None else order.index(value.axis)
        return dequantized(plain(values), plain(value.scale), plain(value.zero_point), axis)
    if isinstance(value, Constant):
        return _in_file(value.array.transpose(order), value.name)
    if isinstance(value, Reshaped):
        value = reshape(value.array, value.shape)
    return _transposed(value, order)


def plain(value: Held) -> Any:
    """The value as an array in its own order."""
    if isinstance(value, Moved | Reshaped | Constant | Kernel):
        return ordered(value, range(len(shape_of(value))))
    return value


def _in_file(array: np.ndarray, name: str) -> Array:
    with jax.ensure_compile_time_eval():
        made = jnp.asarray(np.ascontiguousarray(array).reshape(array.shape))
    return named(made, name) if array.ndim else made


def _transposed(array: Array, order: Sequence[int]) -> Array:
    order = tuple(order)
    wide = [axis for axis in order if array.shape[axis] != 1]
    if wide == sorted(wide):  # no element is moved
        shape = tuple(array.shape[axis] for axis in order)
        return array if shape == array.shape else reshape(array, shape)
    return lax.transpose(array, order)
