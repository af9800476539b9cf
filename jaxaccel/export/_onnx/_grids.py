"""What int8 has beside the primitives of JAX: numbers on a grid, layers of integers, means.

Each computes in real numbers what the engines compute on integers: they find the integers by the
pairs of ``QuantizeLinear`` and ``DequantizeLinear`` around an operation.
"""

from collections.abc import Sequence
from math import prod
from typing import Any, TypeAlias

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from jaxaccel._graph import Node
from jaxaccel.export._onnx import _ops
from jaxaccel.export._onnx._elements import Rule, each
from jaxaccel.export._onnx._moved import (
    Constant,
    Held,
    Kernel,
    Moved,
    Reshaped,
    moved,
    ordered,
    plain,
    reshaped,
    shape_of,
)
from jaxaccel.export._onnx._ops import primitive
from jaxaccel.export._onnx._products import axes_of
from jaxaccel.export._onnx._windows import convolved, padded, pooled
from jaxaccel.fold._contractions import Contraction, over_outputs
from jaxaccel.quantize._arithmetic import Clip, Grid
from jaxaccel.quantize._correction import both, per_channel

Padding: TypeAlias = tuple[tuple[int, int, int], ...]

ALL = Clip()
_ZERO = 128  # from int8 to uint8, which the engines' fastest kernels read
SCALED = "jaxaccel_scaled"
_MOST_BIAS = 2**29  # so that it fits 32 bits with the sum


def on_grid(
    x: Array,
    grid: Grid,
    limits: Clip = ALL,
    gives: float | None = None,
    padding: Padding | None = None,
) -> Array:
    """The nearest numbers of a grid; between the limits, in steps of `gives`, with zeros around."""
    gives = grid.scale if gives is None else gives
    return on_grid_p.bind(x, grid=grid, limits=limits, gives=gives, padding=padding)


def _on_grid(x: Array, *, grid: Grid, limits: Clip, gives: float, padding: Padding | None) -> Array:
    steps = jnp.round(x.astype(jnp.float32) / np.float32(grid.scale))
    low, high = (bound - grid.zero_point for bound in limits)
    made = jnp.clip(steps, low, high) * np.float32(gives)
    return made if padding is None else lax.pad(made, np.float32(0), padding)


def layer(c: Contraction, x: Array, values: Array, scale: Array, bias: Array | None, data: float):
    """The contraction with ``values * scale``, and ``bias * scale * data`` added to it."""
    given = [x, values, scale, *([] if bias is None else [bias])]
    return layer_p.bind(*given, contraction=c, data=data)


def _layer(x: Array, values: Array, scale: Array, *bias: Array, contraction: Any, data: float):
    c, kernel = contraction, scaled(values, over_outputs(contraction, scale))
    (out,) = c.node.run(both(c, x.astype(jnp.float32), kernel), preferred_element_type=np.float32)
    added = [per_channel(b * (scale * np.float32(data)), c.labels) for b in bias]
    return sum(added, start=out)


def scaled(values: Array, scale: Array) -> Array:
    """``values * scale``, of a kernel in 8 bits."""
    return scaled_p.bind(values, scale)


def mean(x: Array, axes: tuple[int, ...]) -> Array:
    """Over some axes."""
    return mean_p.bind(x, axes=axes)


def average(x: Array, window: Sequence[int], strides: Sequence[int]) -> Array:
    """Of each window."""
    return average_p.bind(x, window_dimensions=tuple(window), window_strides=tuple(strides))


def _average(x: Array, *, window_dimensions: Any, window_strides: Any) -> Array:
    total = lax.reduce_window(x, np.float32(0), lax.add, window_dimensions, window_strides, "VALID")
    return total * np.float32(1 / prod(window_dimensions))


def apart(x: Array) -> Array:
    """The same numbers; openvino, which has faults in it, combines nothing across it."""
    return apart_p.bind(x)


on_grid_p = primitive("jaxaccel_on_grid", _on_grid)
layer_p = primitive("jaxaccel_layer", _layer)
scaled_p = primitive(SCALED, lambda values, scale: values.astype(scale.dtype) * scale)
mean_p = primitive("jaxaccel_mean", lambda x, axes: jnp.mean(x, axes))
average_p = primitive("jaxaccel_average", _average)
apart_p = primitive("jaxaccel_apart", lambda x: x)


def _on_grid_rule(node: Node, operands: list[Held]) -> Sequence[Held] | None:
    """In whatever order and shape the value is held."""
    (x,), p = operands, node.params
    zero = np.uint8(p["grid"].zero_point + _ZERO)
    if p["padding"] is not None and isinstance(x, Reshaped):
        x = plain(x)
    (q,) = each(x, lambda x: _ops.quantized(x, np.float32(p["grid"].scale), zero))
    if p["padding"] is not None:
        q = padded(q, zero, p["padding"])
    if p["limits"] != ALL:
        low, high = (np.uint8(bound + _ZERO) for bound in p["limits"])
        (q,) = each(q, lambda q: _ops.clip(q, low, high))
    return each(q, lambda q: _ops.dequantized(q, np.float32(p["gives"]), zero))


def _layer_rule(node: Node, operands: list[Held]) -> Sequence[Held] | None:
    x, values, scale, *bias = operands
    c, data = node.params["contraction"], node.params["data"]
    if bias:
        values, scale, bias = _fitting(c, values, scale, bias[0])
    p = c.node.params
    if c.node.name == "conv_general_dilated":
        numbers = p["dimension_numbers"]
        taps = _kernel(values, scale, numbers.rhs_spec, None, 0)
        images = ordered(x, numbers.lhs_spec)
        added = _bias(bias, scale, data) if bias else None
        made = convolved(images, taps, added, p | {"preferred_element_type": None})
        return [moved(made, numbers.out_spec)]
    return [_dense(c, x, values, scale, bias, data)]


def _fitting(c: Contraction, values: Constant, scale: Constant, bias: Constant) -> Any:
    """With coarser steps in the channels whose bias would not fit 32 bits."""
    steps = np.asarray(bias.array, np.float64)
    most = np.maximum(np.abs(steps) / _MOST_BIAS, 1)
    grow = np.broadcast_to(np.exp2(np.ceil(np.log2(most))), c.sizes)
    sizes = np.ones(len(c.kernel.shape), int)
    sizes[list(c.outs)] = c.sizes
    by_kernel = grow.transpose(np.argsort(c.outs)).reshape(sizes)
    kept = np.rint(values.array / by_kernel).astype(np.int8)
    whole = np.rint(steps / grow).astype(np.int32)
    wide = (scale.array * grow).astype(np.float32)
    return values._replace(array=kept), scale._replace(array=wide), [bias._replace(array=whole)]


def _kernel(values: Held, scale: Held, order: Sequence[int], shape: Any, axis: int) -> Array:
    """The integers in this order and shape, with a scale for each index of an axis."""
    if isinstance(values, Constant) and isinstance(scale, Constant):
        array = values.array.transpose(order)
        return plain(
            kernel(values._replace(array=array.reshape(shape or array.shape)), scale, axis)
        )
    size = prod(shape_of(scale))
    q, flat = ordered(values, order), plain(reshaped(scale, (size,)))
    q = _ops.reshape(q, shape) if shape else q
    return _ops.dequantized(q, flat, np.zeros(size, np.int8), axis)


def _bias(bias: Sequence[Constant], scale: Constant, data: float) -> Array:
    (steps,) = bias
    name = steps.name
    unit = Constant(scale.array.reshape(-1) * np.float32(data), f"{name}/scale")
    zeros = Constant(np.zeros(unit.array.shape, np.int32), f"{name}/zero_point")
    flat = Constant(steps.array.reshape(-1), name)
    return _ops.dequantized(plain(flat), plain(unit), plain(zeros), 0)


def _dense(
    c: Contraction, x: Held, values: Held, scale: Held, bias: Sequence[Constant], data: float
) -> Held:
    """As one product of two axes, which has a bias."""
    place = 0 if c.node.inputs[0] is c.data else 1
    a, b = axes_of(c.node, place), axes_of(c.node, 1 - place)
    frees = [shape_of(x)[axis] for axis in a.free]
    outs = [shape_of(values)[axis] for axis in b.free]
    terms = prod(shape_of(values)[axis] for axis in b.summed)
    kernel = _kernel(values, scale, (*b.summed, *b.free), (terms, prod(outs)), 1)
    rows = _flat(x, (*a.free, *a.summed), (prod(frees), terms))
    made = _ops.dense(rows, kernel, _bias(bias, scale, data) if bias else None)
    if place == 0:
        return reshaped(made, (*frees, *outs))
    return reshaped(ordered(made, (1, 0)), (*outs, *frees))


def _flat(x: Held, order: Sequence[int], shape: tuple[Any, ...]) -> Array:
    array = ordered(x, order)
    return array if array.shape == shape else _ops.reshape(array, shape)


def _scaled_rule(node: Node, operands: list[Held]) -> Sequence[Held] | None:
    """As a kernel; where it has several axes of scales, the integers times these."""
    values, scale = operands
    wide = [axis for axis, size in enumerate(shape_of(scale)) if size != 1]
    if isinstance(values, Constant) and isinstance(scale, Constant) and len(wide) == 1:
        return [kernel(values, scale, wide[0])]
    q = _ops.dequantized(plain(values), np.float32(1), np.int8(0))
    return [lax.mul(q, plain(scale))]


def kernel(values: Constant, scale: Constant, axis: int) -> Kernel:
    """Integers with a scale for each index of an axis, all under the name of the kernel."""
    name, size = values.name.removesuffix("/values"), scale.array.size
    steps = Constant(scale.array.reshape(size), f"{name}/scale")
    zeros = Constant(np.zeros(size, np.int8), f"{name}/zero_point")
    return Kernel(values._replace(name=name), steps, zeros, axis)


def _mean_rule(node: Node, operands: list[Held]) -> Sequence[Held] | None:
    """A global pooling, if it can be: engines have that on integers."""
    (x,), axes = operands, node.params["axes"]
    order = x.order if isinstance(x, Moved) else tuple(range(len(shape_of(x))))
    rest = [axis for axis in order if axis not in axes]
    if len(rest) != 2 or len(axes) > 3:
        total = lax.reduce_sum(plain(x), axes)
        return [total * np.float32(1 / prod(shape_of(x)[axis] for axis in axes))]
    images = ordered(x, (*rest, *(axis for axis in order if axis in axes)))
    if images.ndim == 3:  # which openvino transposes together with the mean, wrongly
        images = _ops.reshape(images, (*images.shape, 1))
    places = tuple(range(2, images.ndim))
    made = _ops.operation("GlobalAveragePool", lambda x: jnp.mean(x, places, keepdims=True), images)
    flat = reshaped(made, images.shape[:2])
    return [flat if rest == sorted(rest) else moved(plain(flat), (1, 0))]


def _average_rule(node: Node, operands: list[Held]) -> Sequence[Held] | None:
    rank = len(shape_of(operands[0]))
    ones = dict.fromkeys(("window_dilation", "base_dilation"), (1,) * rank)
    found = pooled(operands[0], node.params | ones | {"padding": ((0, 0),) * rank}, "AveragePool")
    return None if found is None else [found]


def _apart_rule(node: Node, operands: list[Held]) -> Sequence[Held] | None:
    least = np.float32(np.finfo(np.float32).min)
    return each(operands[0], lambda x: _ops.operation("Max", jnp.maximum, x, least))


RULES: dict[str, Rule] = {
    "jaxaccel_on_grid": _on_grid_rule,
    "jaxaccel_layer": _layer_rule,
    SCALED: _scaled_rule,
    "jaxaccel_mean": _mean_rule,
    "jaxaccel_average": _average_rule,
    "jaxaccel_apart": _apart_rule,
}
