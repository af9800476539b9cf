"""Primitives that move, cut, join or reduce axes."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxaccel._axes import OPAQUE, Axes, Axis, Free, Labels, Ties
from jaxaccel._graph import Node, shape_of
from jaxaccel._rules._table import Cut, Results, add, changed, pinned


def _transpose(t: Ties, node: Node, x: Axes) -> Results:
    return [[x[k] for k in node.params["permutation"]]]


def _squeeze(t: Ties, node: Node, x: Axes) -> Results:
    gone = node.params["dimensions"]
    return [[axis for k, axis in enumerate(x) if k not in gone]]


def _rev(t: Ties, node: Node, x: Axes) -> Results:
    turned = node.params["dimensions"]
    flip = lambda axis: axis[::-1] if isinstance(axis, Labels) else axis
    return [[flip(axis) if k in turned else axis for k, axis in enumerate(x)]]


def _broadcast(t: Ties, node: Node, x: Axes, *_: Axes) -> Results:
    """A new or stretched axis is free: it has no labels until it meets some."""
    shape = node.params["shape"]
    axes: list[Axis] = [Free(uniform=True) if n != 1 else OPAQUE for n in shape]
    for k, place in enumerate(node.params["broadcast_dimensions"]):
        if x.shape[k] == shape[place]:
            axes[place] = x[k]
    return [axes]


def _reshape(t: Ties, node: Node, x: Axes, *_: Axes) -> Results:
    shape = node.outputs[0].shape
    out: list[Axis] = [OPAQUE] * len(shape)
    if 0 in shape:
        for axis in x:
            t.pin(axis, "a reshape of an empty array")
        return [out]
    order = node.params.get("dimensions") or range(len(x))
    axes, sizes = [x[k] for k in order], [x.shape[k] for k in order]
    for ins, outs in blocks(sizes, shape):
        merged = t.merge([axes[k] for k in ins], [sizes[k] for k in ins])
        for k, axis in zip(outs, t.split(merged, [shape[k] for k in outs]), strict=True):
            out[k] = axis
    return [out]


def blocks(before: Sequence[Any], after: Sequence[Any]) -> list[tuple[list[int], list[int]]]:
    """Consecutive axes of the one shape that hold the same elements as axes of the other."""
    left = [k for k, n in enumerate(before) if n != 1]
    right = [k for k, n in enumerate(after) if n != 1]
    blocks = []
    while left and right:
        ins, outs = [left.pop(0)], [right.pop(0)]
        size_in, size_out = before[ins[0]], after[outs[0]]
        while size_in != size_out and (left or right):
            if left and (not right or _takes_left(size_in, size_out)):
                ins.append(left.pop(0))
                size_in = size_in * before[ins[-1]]
            else:
                outs.append(right.pop(0))
                size_out = size_out * after[outs[-1]]
        blocks.append((ins, outs))
    return blocks


def _takes_left(size_in: Any, size_out: Any) -> bool:
    """Symbolic sizes may not compare; then the order of taking them is all the same."""
    return not (isinstance(size_in, int) and isinstance(size_out, int)) or size_in < size_out


def _concatenate(t: Ties, node: Node, *operands: Axes) -> Results:
    along = node.params["dimension"]
    axes = []
    for k in range(len(operands[0])):
        parts = [x[k] for x in operands]
        if k != along:
            axes.append(t.same(*parts))
            continue
        if not any(isinstance(part, Labels) for part in parts):
            axes.append(Free() if all(isinstance(part, Free) for part in parts) else OPAQUE)
            continue
        if not all(isinstance(x.shape[k], int) for x in operands):
            for part in parts:
                t.pin(part, "concatenated with an axis of unknown size")
            axes.append(OPAQUE)
            continue
        axes.append(_joined([t.labelled(x[k], x.shape[k]) for x in operands]))
    return [axes]


def _joined(parts: Sequence[Labels]) -> Labels:
    ids, zero = [part.ids for part in parts], [part.zero for part in parts]
    return Labels(np.concatenate(ids), np.concatenate(zero))


def _stack(t: Ties, node: Node, *operands: Axes) -> Results:
    axes = [t.same(*(x[k] for x in operands)) for k in range(len(operands[0]))]
    free = all(isinstance(axis, Free) for x in operands for axis in x)
    axes.insert(node.params["axis"], Free() if free else OPAQUE)
    return [axes]


def _unstack(t: Ties, node: Node, x: Axes) -> Results:
    t.pin(x[node.params["axis"]], "it is taken apart index by index")
    return [_without(x, [node.params["axis"]]) for _ in node.outputs]


def _tile(t: Ties, node: Node, x: Axes) -> Results:
    axes = []
    for axis, size, times in zip(x, x.shape, node.params["reps"], strict=True):
        if times != 1 and isinstance(axis, Labels):
            axis = axis.map(lambda part, n=times: np.tile(part, n))
        elif times != 1 and (size == 1 or isinstance(axis, Free)):
            axis = Free(uniform=size == 1)
        axes.append(axis)
    return [axes]


def _fft(t: Ties, node: Node, x: Axes) -> Results:
    first = len(x) - len(node.params["fft_lengths"])
    return [[a if k < first else pinned(t, a, "'fft' along it") for k, a in enumerate(x)]]


def _split(t: Ties, node: Node, x: Axes) -> Results:
    along, sizes = node.params["axis"], node.params["sizes"]
    ends = np.cumsum(sizes)
    results = []
    for start, end in zip(ends - sizes, ends, strict=True):
        axes = list(x)
        axis = axes[along]
        axes[along] = axis[start:end] if isinstance(axis, Labels) else axis
        results.append(axes)
    return results


def _slice(t: Ties, node: Node, x: Axes) -> Results:
    first, last = node.params["start_indices"], node.params["limit_indices"]
    steps = node.params["strides"] or [1] * len(first)
    axes = []
    for axis, start, end, step in zip(x, first, last, steps, strict=True):
        if isinstance(axis, Labels):
            if end - start <= step:
                t.pin(axis, "a slice takes a single index of it", slice(start, end, step))
            axis = axis[start:end:step]
        axes.append(axis)
    return [axes]


def _resized_slice(node: Node, operands: Sequence[Array], cut: Cut) -> Sequence[Array]:
    """Of an axis with steps, what is left need not lie at equal steps: it is taken first."""
    (x,) = operands
    first, last = list(node.params["start_indices"]), list(node.params["limit_indices"])
    steps = list(node.params["strides"] or [1] * len(first))
    for k, kept in enumerate(cut.operands[0]):
        if kept is None:
            continue
        if steps[k] == 1:
            first[k], last[k] = np.searchsorted(kept, [first[k], last[k]]).tolist()
        else:
            taken = np.isin(kept, np.arange(first[k], last[k], steps[k]))
            x = jnp.take(x, np.flatnonzero(taken), axis=k, unique_indices=True, mode="clip")
            first[k], last[k], steps[k] = 0, int(taken.sum()), 1
    places = {"start_indices": tuple(first), "limit_indices": tuple(last)}
    return node.run([x], **places, strides=tuple(steps))


def _pad(t: Ties, node: Node, x: Axes, value: Axes) -> Results:
    config = node.params["padding_config"]
    grows = any(edge != (0, 0, 0) for edge in config)
    keeps_zero = not grows or value.constant == 0
    axes = []
    for axis, (low, high, inner) in zip(x, config, strict=True):
        if isinstance(axis, Labels):
            if not keeps_zero:
                axis = Labels(axis.ids, np.zeros_like(axis.zero))
            if low < 0 or high < 0 or inner:
                axis = pinned(t, axis, "padding crops it or spreads it out")
            elif low or high:
                first, last = (Labels(t.new(n), np.full(n, keeps_zero)) for n in (low, high))
                axis = _joined([first, axis, last])
        elif isinstance(axis, Free) and (low, high, inner) != (0, 0, 0):
            axis = Free()
        axes.append(axis)
    return [axes]


def _padding(node: Node, operands: Sequence[Array], cut: Cut) -> dict[str, Any]:
    config = []
    for k, (low, high, inner) in enumerate(node.params["padding_config"]):
        kept = cut.results[0][k]
        if kept is not None:
            start, end = np.searchsorted(kept, [low, low + shape_of(node.inputs[0])[k]])
            low, high = int(start), len(kept) - int(end)
        config.append((low, high, inner))
    return {"padding_config": tuple(config)}


def _sum(t: Ties, node: Node, *operands: Axes) -> Results:
    for x in operands:
        for k in node.params["axes"]:
            t.total(x[k])
    return [_without(x, node.params["axes"]) for x in operands]


def _reduce(t: Ties, node: Node, *operands: Axes) -> Results:
    gone = node.params["axes"]
    results = []
    for x in operands[: len(node.outputs)]:
        for k in gone:
            t.pin(x[k], f"'{node.name}' over it")
        empty = any(x.shape[k] == 0 for k in gone)
        axes = _without(x, gone)
        results.append([t.same(axis, zero=False) for axis in axes] if empty else axes)
    return results


def _without(x: Axes, gone: Sequence[int]) -> list[Axis]:
    return [axis for k, axis in enumerate(x) if k not in gone]


def _cumulative(t: Ties, node: Node, x: Axes) -> Results:
    keeps_zero = node.name != "cumlogsumexp"
    axes = list(x) if keeps_zero else [t.same(axis, zero=False) for axis in x]
    axes[node.params["axis"]] = pinned(t, x[node.params["axis"]], f"'{node.name}' along it")
    return [axes]


def _sort(t: Ties, node: Node, *operands: Axes) -> Results:
    """Every operand is permuted alike, so all their axes go together."""
    along = node.params["dimension"]
    results = [list(x) for x in operands]
    for k in range(len(operands[0])):
        together = [x[k] for x in operands]
        if k == along:
            for axes, axis in zip(results, together, strict=True):
                axes[k] = pinned(t, axis, "sorted along it")
        elif len(operands) > 1:
            both = t.same(*together)
            for axes, axis in zip(results, together, strict=True):
                own = isinstance(axis, Labels) and isinstance(both, Labels)
                axes[k] = axis if own else both
    return results


def _top_k(t: Ties, node: Node, x: Axes) -> Results:
    """The second result has the indices: of equal numbers, the first ones, not zero."""
    along = node.params.get("reduction_dimension", node.params.get("axis", -1)) % len(x)
    axes = [pinned(t, a, f"'{node.name}' along it") if k == along else a for k, a in enumerate(x)]
    return [axes, [t.same(axis, zero=False) for axis in axes]]


def _window(t: Ties, node: Node, *operands: Axes) -> Results:
    """Pooling and its gradients: an axis passes where the window does not move along it."""
    rank = len(node.outputs[0].shape)
    full = [x for x in operands if len(x) == rank]
    axes = []
    for k in range(rank):
        together = [x[k] for x in full]
        if _still(node.params, k):
            axes.append(t.same(*together, zero=False if _may_be_padding(node) else None))
        else:
            for axis in together:
                t.pin(axis, f"'{node.name}' moves over it")
            axes.append(OPAQUE)
    return [axes for _ in node.outputs]


def _may_be_padding(node: Node) -> bool:
    """Whether a window of a maximum can lie outside of the array, where it is not zero."""
    if not node.name.startswith("reduce_window_m"):
        return False
    sizes, pads = node.params["window_dimensions"], node.params["padding"]
    spread = any(n != 1 for n in node.params["base_dilation"])
    return spread or any(max(pad) >= size for size, pad in zip(sizes, pads, strict=True))


def _still(params: dict[str, Any], k: int) -> bool:
    names = ("window_dimensions", "window_strides", "base_dilation", "window_dilation")
    moving = any(params[name][k] != 1 for name in names if params.get(name))
    return not moving and tuple(params.get("padding", ((0, 0),) * (k + 1))[k]) == (0, 0)


_SHAPE = changed(lambda node, operands, cut: {"shape": cut.shapes[0]})

add("transpose", _transpose)
add("squeeze", _squeeze)
add("rev", _rev)
add("broadcast_in_dim", _broadcast, _SHAPE)
add("reshape", _reshape, changed(lambda node, operands, cut: {"new_sizes": cut.shapes[0]}))
add("concatenate", _concatenate)
add("stack", _stack)
add("unstack", _unstack)
add("tile", _tile)
add("fft", _fft)
add(
    "split",
    _split,
    changed(lambda node, _, cut: {"sizes": tuple(s[node.params["axis"]] for s in cut.shapes)}),
)
add("slice", _slice, _resized_slice)
add("pad", _pad, changed(_padding))
add("reduce_sum", _sum)
add(
    "reduce_max reduce_min reduce_prod reduce_and reduce_or reduce_xor argmax argmin",
    _reduce,
)
add("cumsum cumprod cummax cummin cumlogsumexp", _cumulative)
add("sort", _sort)
add("top_k approx_top_k", _top_k)
add(
    "reduce_window_sum reduce_window_max reduce_window_min select_and_scatter_add "
    "select_and_gather_add",
    _window,
)
