"""Every integer step of a quantized function against `int8_reference`, on the same integers."""

import numpy as np

from jaxaccel.quantize._layers import Bounds, Layer
from jaxaccel.quantize._program import Joined, Mean, Product, Same, Sum
from tests import int8_reference as reference


def along(x, labels):
    """Numbers per output channel, as the axes of a value with these labels."""
    kept = [i for i in range(np.ndim(x)) if i in labels]
    x = np.asarray(x).reshape([np.shape(x)[i] for i in kept])
    order = [kept.index(label) for label in labels if label is not None]
    return np.transpose(x, order).reshape(
        [np.shape(x)[kept.index(label)] if label is not None else 1 for label in labels]
    )


def limits(segment, bounds):
    _, zero = segment.grid
    return [reference.bound(limit, segment.grid.scale, zero) for limit in bounds]


def check(segment):
    """Raises an AssertionError where a step differs in one integer."""
    checks = {Layer: layer, Product: product, Sum: add, Mean: mean, Joined: joined, Same: same}
    operands = [np.asarray(x) for x in segment.operands]
    checks[type(segment.step)](segment, operands, np.asarray(segment.result))


def layer(segment, operands, result):
    step, c = segment.step, segment.step.contraction
    zero = segment.grids[0].zero_point if segment.grids else 0
    data_first = c.node.inputs[0] is c.data
    if c.node.name == "conv_general_dilated":
        acc = reference.convolution(operands[0], operands[1], zero, c.node.params)
    else:
        first, second = operands if data_first else operands[::-1]
        zeros = (zero, 0) if data_first else (0, zero)
        acc = reference.dot(first, second, zeros, c.node.params)
    np.testing.assert_array_equal(np.asarray(segment.accumulator), acc)
    if segment.constants is None:  # dynamic: what follows is real
        return
    for node in step.tail.moves:
        if node.name == "reduce_window_max":
            acc = reference.largest(acc, node.params)
        elif node.name != "convert_element_type":
            acc = np.asarray(node.run([acc.astype(np.int32)])[0])
    multiplier, bias, bits = (
        None if x is None else along(x, step.tail.labels) for x in segment.constants
    )
    bias = 0 if bias is None else bias
    if segment.grid is None:
        total = acc + bias if np.issubdtype(np.asarray(bias).dtype, np.integer) else acc
        expected = reference.to_float(total, 0 if total is not acc else bias, multiplier)
        low, high = step.tail.bounds
        np.testing.assert_array_equal(result, np.clip(expected, low, high).astype(result.dtype))
    elif bits is None:
        found = limits(segment, step.tail.bounds)
        expected = reference.requantized(acc, bias, multiplier, segment.grid.zero_point, *found)
        np.testing.assert_array_equal(result, expected)
    else:
        found = limits(segment, step.tail.bounds)
        expected = reference.shifted(acc, bias, bits, segment.grid.zero_point, *found)
        np.testing.assert_array_equal(result, expected)


def product(segment, operands, result):
    acc = reference.dot(operands[0], operands[1], (0, 0), segment.step.node.params)
    np.testing.assert_array_equal(np.asarray(segment.accumulator), acc)


def add(segment, operands, result):
    zeros, scales = [g.zero_point for g in segment.grids], [g.scale for g in segment.grids]
    expected = reference.rescaled(
        operands, zeros, scales, segment.grid, 255, limits(segment, segment.step.tail.bounds)
    )
    np.testing.assert_array_equal(result, expected)


def mean(segment, operands, result):
    step, (grid,) = segment.step, segment.grids
    p, x = step.node.params, operands[0].astype(np.int64) - grid.zero_point
    if step.node.name == "reduce_sum":
        total = x.sum(p["axes"])
    else:
        ones = {"window_strides": p["window_strides"], "padding": p["padding"]}
        total = windows(x, p["window_dimensions"], **ones)
    np.testing.assert_array_equal(np.asarray(segment.accumulator), total)
    expected = reference.rescaled(
        [total], [0], [grid.scale * step.factor], segment.grid, 255 * step.terms,
        limits(segment, step.tail.bounds),
    )  # fmt: skip
    np.testing.assert_array_equal(result, expected)


def windows(x, sizes, window_strides, padding):
    x = np.pad(x, padding)
    seen = np.lib.stride_tricks.sliding_window_view(x, sizes)
    seen = seen[tuple(slice(None, None, step) for step in window_strides)]
    return seen.sum(tuple(range(x.ndim, 2 * x.ndim)))


def joined(segment, operands, result):
    parts = [
        x if grid == segment.grid
        else reference.rescaled([x], [grid.zero_point], [grid.scale], segment.grid, 255)
        for x, grid in zip(operands, segment.grids, strict=True)
    ]  # fmt: skip
    axis = segment.step.node.params["dimension"]
    np.testing.assert_array_equal(result, np.concatenate(parts, axis))


def same(segment, operands, result):
    """The same node on what the integers stand for."""
    step, (grid,) = segment.step, segment.grids
    assert segment.grid == grid
    if step.bounds != Bounds():
        low, high = limits(segment, step.bounds)
        expected = np.clip(operands[0], low, high)
    else:
        real = operands[0].astype(np.float32) - grid.zero_point
        rest = [np.float32(0) for _ in step.node.inputs[1:]]  # a pad's edge
        expected = np.asarray(step.node.run([real, *rest])[0]) + grid.zero_point
    np.testing.assert_array_equal(result, expected)


def all_exact(fn, params, *args):
    """Checks each step."""
    segments = fn.segments(params, *args)
    for segment in segments:
        check(segment)
    return segments
