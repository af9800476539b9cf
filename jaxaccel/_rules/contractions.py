"""Products with sums: dot_general and every kind of convolution."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxaccel._axes import OPAQUE, Axes, Axis, Free, Labels, Ties
from jaxaccel._graph import Node, shape_of
from jaxaccel._rules._table import Cut, Results, add


def _dot_general(t: Ties, node: Node, lhs: Axes, rhs: Axes) -> Results:
    (contract_l, contract_r), (batch_l, batch_r) = node.params["dimension_numbers"]
    for i, j in zip(contract_l, contract_r, strict=True):
        t.contract(lhs[i], rhs[j])
    pairs = zip(batch_l, batch_r, strict=True)
    batch = [t.product(lhs[i], rhs[j]) for i, j in pairs]
    left = [lhs[k] for k in range(len(lhs)) if k not in (*contract_l, *batch_l)]
    right = [rhs[k] for k in range(len(rhs)) if k not in (*contract_r, *batch_r)]
    return [[*batch, *left, *right]]


def _ragged_dot(t: Ties, node: Node, lhs: Axes, rhs: Axes, sizes: Axes) -> Results:
    """The rows of the left operand come in groups, each with a right operand of its own."""
    how = node.params["ragged_dot_dimension_numbers"]
    (contract_l, contract_r), (batch_l, batch_r) = how.dot_dimension_numbers
    counted = [*(lhs[k] for k in how.lhs_ragged_dimensions), *sizes]
    counted += [rhs[k] for k in how.rhs_group_dimensions]
    counted += [lhs[k] for k in batch_l] if len(sizes) > 1 else []
    for axis in counted:
        t.pin(axis, "the group sizes of a ragged product count it")
    for i, j in zip(contract_l, contract_r, strict=True):
        t.contract(lhs[i], rhs[j])
    batch = [t.product(lhs[i], rhs[j]) for i, j in zip(batch_l, batch_r, strict=True)]
    grouped = [t.whole] if set(how.lhs_ragged_dimensions) <= set(contract_l) else []
    left = [lhs[k] for k in range(len(lhs)) if k not in (*contract_l, *batch_l)]
    gone = (*contract_r, *batch_r, *how.rhs_group_dimensions)
    return [[*grouped, *batch, *left, *(rhs[k] for k in range(len(rhs)) if k not in gone)]]


def _conv(t: Ties, node: Node, x: Axes, kernel: Axes) -> Results:
    p, layout = node.params, node.params["dimension_numbers"]
    (batch, features, *pixels), (out, into, *taps) = layout.lhs_spec, layout.rhs_spec
    for axis in [*(x[k] for k in pixels), *(kernel[k] for k in taps)]:
        t.pin(axis, "a convolution slides over it")
    images: Axis = x[batch]
    if p["batch_group_count"] > 1:
        t.contract(x[features], kernel[into])
        images, made = _batch_groups(t, p["batch_group_count"], x, kernel, batch, out)
    elif p["feature_group_count"] == 1:
        t.contract(x[features], kernel[into])
        made = kernel[out]
    elif kernel.shape[into] == 1:
        made = _depthwise(t, x[features], kernel[out], kernel.shape[out] // x.shape[features])
    else:
        made = _grouped(t, p["feature_group_count"], x[features], kernel[into], kernel[out])
    axes: list[Axis] = [OPAQUE] * len(x)
    axes[layout.out_spec[0]], axes[layout.out_spec[1]] = images, made
    return [axes]


def _depthwise(t: Ties, features: Axis, out: Axis, multiplier: int) -> Axis:
    """Each input channel makes `multiplier` outputs in a row, of its own."""
    if multiplier > 1 and isinstance(features, Labels):
        features = features.map(lambda part: np.repeat(part, multiplier))
    elif multiplier > 1 and isinstance(features, Free):
        features = OPAQUE
    return t.product(features, out)


def _grouped(t: Ties, groups: int, features: Axis, into: Axis, out: Axis) -> Axis:
    """Groups stay of one size: the j-th channels of all groups go together."""
    if isinstance(features, Labels):
        rows = features.map(lambda part: part.reshape(groups, -1))
        t.tie(rows.ids, rows.ids[:1])
        features = Labels(rows.ids[0], np.all(rows.zero, 0))
    elif isinstance(features, Free):
        features = OPAQUE
    t.contract(features, into)
    if isinstance(out, Labels):
        rows = out.ids.reshape(groups, -1)
        t.tie(rows, rows[:1])
    return Free() if isinstance(out, Free) else out


def _batch_groups(
    t: Ties, groups: int, x: Axes, kernel: Axes, batch: int, out: int
) -> tuple[Axis, Axis]:
    """The gradient of a depthwise convolution: group i of the batch meets outputs i."""
    if x.shape[batch] == groups:
        multiplier = kernel.shape[out] // groups
        return OPAQUE, _depthwise(t, x[batch], kernel[out], multiplier)
    for axis in (x[batch], kernel[out]):
        t.pin(axis, "a convolution groups it along the batch")
    return OPAQUE, OPAQUE


def _resized_conv(node: Node, operands: Sequence[Array], cut: Cut) -> Sequence[Array]:
    p, layout = node.params, node.params["dimension_numbers"]
    x, kernel = operands[0].shape, operands[1].shape
    if 0 in (*x, *kernel):  # a convolution wants channels
        return [jnp.zeros(cut.shapes[0], node.outputs[0].aval.dtype)]
    counts = {}
    if p["batch_group_count"] == shape_of(node.inputs[0])[layout.lhs_spec[0]] > 1:
        counts["batch_group_count"] = x[layout.lhs_spec[0]]
    elif p["feature_group_count"] > 1 and kernel[layout.rhs_spec[1]] == 1:
        counts["feature_group_count"] = x[layout.lhs_spec[1]]
    return node.run(operands, **counts)


add("dot_general", _dot_general)
add("ragged_dot_general", _ragged_dot)
add("conv_general_dilated", _conv, _resized_conv)
