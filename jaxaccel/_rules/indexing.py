"""Primitives that read or write at indices: gather, scatter and the dynamic slices."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxaccel._axes import Axes, Axis, Free, Labels, Ties
from jaxaccel._graph import Node, shape_of
from jaxaccel._rules._table import Cut, Results, add, changed, pinned


def _dynamic_slice(t: Ties, node: Node, x: Axes, *starts: Axes) -> Results:
    sizes = node.params["slice_sizes"]
    why = "a dynamic slice takes a part of it"
    return [
        [
            axis if n == full else pinned(t, axis, why)
            for axis, n, full in zip(x, sizes, x.shape, strict=True)
        ]
    ]


def _dynamic_update_slice(t: Ties, node: Node, x: Axes, part: Axes, *starts: Axes) -> Results:
    axes = []
    for k in range(len(x)):
        if x.shape[k] == part.shape[k]:
            axes.append(t.same(x[k], part[k]))
        else:
            t.pin(part[k], "a dynamic update writes a part of an axis")
            axes.append(pinned(t, x[k], "a dynamic update writes a part of it"))
    return [axes]


def _picked(node: Node, indices: Axes) -> tuple[int, np.ndarray] | None:
    """The one axis that a gather takes known indices of, and these."""
    how = node.params["dimension_numbers"]
    single = len(how.start_index_map) == 1 and not how.operand_batching_dims
    if indices.elements is None or not single or len(indices) != 2:
        return None
    (axis,), picks = how.start_index_map, indices.elements[:, 0]
    inside = (picks >= 0) & (picks < shape_of(node.inputs[0])[axis])
    return (axis, picks) if axis in how.collapsed_slice_dims and inside.all() else None


def _gather(t: Ties, node: Node, x: Axes, indices: Axes) -> Results:
    how, sizes = node.params["dimension_numbers"], node.params["slice_sizes"]
    t.pin(indices[-1], "indexes with it")
    out: list[Axis | None] = [None] * len(node.outputs[0].shape)
    slots = iter(how.offset_dims)
    batch = dict(zip(how.operand_batching_dims, how.start_indices_batching_dims, strict=True))
    rows: list[Axis] = [t.same(axis, zero=False) for axis in indices.axes[:-1]]  # 0 reads no zero
    picked = _picked(node, indices)
    for k, axis in enumerate(x):
        if k in batch:
            zero = axis.zero if isinstance(axis, Labels) else False
            rows[batch[k]] = t.same(axis, indices[batch[k]], zero=zero)
        elif picked and picked[0] == k and isinstance(axis, Labels):
            rows = [axis[picked[1]]]
        elif k in how.collapsed_slice_dims:
            t.pin(axis, "'gather' picks indices of it")
        else:
            whole = sizes[k] == x.shape[k] and k not in how.start_index_map
            out[next(slots)] = axis if whole else pinned(t, axis, "'gather' takes a part of it")
    rest = iter(rows)
    fill = node.params.get("fill_value")  # NaN is the mark of an error, not a value that stays
    axes = [axis if axis is not None else next(rest) for axis in out]
    return [
        axes if fill in (None, 0) or fill != fill else [t.same(axis, zero=False) for axis in axes]
    ]


def _resized_gather(node: Node, operands: Sequence[Array], cut: Cut) -> Sequence[Array]:
    x, indices = operands
    how, full = node.params["dimension_numbers"], shape_of(node.inputs[0])
    sizes = zip(node.params["slice_sizes"], full, x.shape, strict=True)
    sizes = tuple(left if n == all_of_it else n for n, all_of_it, left in sizes)
    kept = cut.operands[0][how.start_index_map[0]] if len(how.start_index_map) == 1 else None
    if kept is not None:  # of an axis whose indices were known: they count what is left
        (row,) = (k for k in range(len(cut.results[0])) if k not in how.offset_dims)
        rows = cut.results[0][row]
        indices = indices if rows is None else indices[rows]
        indices = jnp.searchsorted(kept, indices).astype(indices.dtype)
    return node.run([x, indices], slice_sizes=sizes)


def _scatter(t: Ties, node: Node, x: Axes, indices: Axes, updates: Axes) -> Results:
    how = node.params["dimension_numbers"]
    t.pin(indices[-1], "indexes with it")
    batch = dict(zip(how.operand_batching_dims, how.scatter_indices_batching_dims, strict=True))
    in_window = iter(how.update_window_dims)
    rows = [k for k in range(len(updates)) if k not in how.update_window_dims]
    for j, row in enumerate(rows):
        both = t.same(indices[j], updates[row], zero=False)
        if j not in batch.values():
            adds = node.name in ("scatter-add", "scatter-sub")
            t.total(updates[row]) if adds else t.pin(both, f"'{node.name}' writes its rows")
    axes: list[Axis] = []
    for k, axis in enumerate(x):
        if k in batch:
            row = updates[rows[batch[k]]]
            written = t.same(axis, row)
            zero = written.zero if isinstance(written, Labels) else False
            axis = t.same(written, indices[batch[k]], zero=zero)
        elif k in how.inserted_window_dims:
            axis = pinned(t, axis, f"'{node.name}' writes at indices of it")
        else:
            own = next(in_window)
            if updates.shape[own] == x.shape[k] and k not in how.scatter_dims_to_operand_dims:
                axis = t.same(axis, updates[own])
            else:
                t.pin(updates[own], f"'{node.name}' writes a part of an axis")
                axis = pinned(t, axis, f"'{node.name}' writes a part of it")
        axes.append(Free() if isinstance(axis, Free) else axis)
    return [axes]


def _shuffle(t: Ties, node: Node, x: Axes) -> Results:
    axis, order = x[node.params["axis"]], node.params["order"]
    if isinstance(axis, Labels):
        axis = Labels(axis.ids[order], axis.zero[order])
    out = list(x)
    out[node.params["axis"]] = t.free() if isinstance(axis, Free) else axis
    return [out]


def _resized_shuffle(node: Node, operands: Sequence[Array], cut: Cut) -> Sequence[Array]:
    k, order = node.params["axis"], node.params["order"]
    stays, made = cut.operands[0][k], cut.results[0][k]
    order = order if made is None else order[made]
    index = order if stays is None else np.searchsorted(stays, order)
    return [jnp.take(operands[0], index, axis=k, unique_indices=True, mode="clip")]


_SIZES = changed(lambda node, operands, cut: {"slice_sizes": cut.shapes[0]})

add("dynamic_slice", _dynamic_slice, _SIZES)
add("dynamic_update_slice", _dynamic_update_slice)
add("channel_shuffle", _shuffle, _resized_shuffle)  # of `jaxaccel._dataflow.shuffles`
add("gather", _gather, _resized_gather)
add("scatter scatter-add scatter-mul scatter-min scatter-max scatter-sub", _scatter)
