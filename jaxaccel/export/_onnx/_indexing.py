"""Rules for what is read and written by index.

All axes in which a window is smaller than its operand are merged into one, of which a vector of
indices reads or writes: ``Gather`` and ``ScatterElements``. What XLA does beyond the ends of an
axis, which ONNX leaves open, is written out.
"""

from collections.abc import Mapping, Sequence
from functools import reduce
from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from jaxaccel._graph import Node
from jaxaccel._slices import is_symbolic
from jaxaccel.export._onnx import _ops
from jaxaccel.export._onnx._converted import at
from jaxaccel.export._onnx._elements import Rule
from jaxaccel.export._onnx._moved import (
    Held,
    is_constant,
    moved,
    ordered,
    plain,
    shape_of,
)

_MODES = lax.GatherScatterMode
_REDUCTIONS = {
    "scatter": None, "scatter-add": "add", "scatter-sub": "add", "scatter-mul": "mul",
    "scatter-max": "max", "scatter-min": "min",
}  # fmt: skip
_KEYS = {"dimension_numbers", "indices_are_sorted", "mode", "unique_indices", "update_consts"}


class Windows(NamedTuple):
    """Windows of an operand.

    Attributes:
        sizes: of the operand.
        window: the sizes of each window.
        kept: the axes of the operand that the windows still have.
        indexed: the axes whose first index is given, one after the other.
        shared: by axis of the operand, the axis of the indices whose number is the index.
    """

    sizes: tuple[Any, ...]
    window: tuple[Any, ...]
    kept: tuple[int, ...]
    indexed: tuple[int, ...]
    shared: Mapping[int, int]

    @property
    def picked(self) -> tuple[int, ...]:
        """The axes that are merged, of which one may have a size that is not known: the first."""
        apart = [a for a, size in enumerate(self.sizes) if size != self.window[a]]
        apart = apart or [*self.indexed, *self.shared, 0][:1]
        return tuple(sorted(apart, key=lambda a: not is_symbolic([self.sizes[a]])))

    @property
    def whole(self) -> tuple[int, ...]:
        """The other ones."""
        return tuple(a for a in range(len(self.sizes)) if a not in self.picked)

    @property
    def inner(self) -> tuple[int, ...]:
        """Those that are merged, and that the windows have."""
        return tuple(a for a in self.picked if a in self.kept)

    def sized(self, axes: Sequence[int]) -> tuple[Any, ...]:
        """The sizes of the operand."""
        return tuple(self.sizes[a] for a in axes)


class Places(NamedTuple):
    """Where the elements of windows lie on the merged axis, and which windows lie in the operand.

    Of the shape of the indices, the first also with the axes of the windows behind it. `inside` is
    None where all do.
    """

    where: Array
    inside: Array | None


def _places(w: Windows, indices: Held, clipped: bool) -> Places:
    """Of windows that begin at the numbers of the last axis of the indices."""
    batch = shape_of(indices)[:-1]

    def found() -> Places:
        array = plain(indices)
        cuts = [{len(batch): (k, k + 1, 1)} for k in range(len(w.indexed))]
        parts = [_ops.sliced(array, cut if len(cuts) > 1 else {}) for cut in cuts]
        return _computed(w, batch, [_ops.reshape(part, batch) for part in parts], clipped)

    if not is_constant(indices) or is_symbolic((*batch, *w.sized(w.picked))):
        return found()
    with jax.ensure_compile_time_eval():
        where, inside = found()
        return Places(where, None if inside is None or np.asarray(inside).all() else inside)


def _computed(
    w: Windows, batch: tuple[Any, ...], indices: Sequence[Array], clipped: bool
) -> Places:
    starts: dict[int, Array] = {}
    inside = []
    for axis, index in zip(w.indexed, indices, strict=True):
        starts[axis] = _begin(index, w.sizes[axis], w.window[axis])
        if not clipped:
            given = jnp.asarray(index).astype(jnp.int32)
            inside.append(_ops.operation("Equal", lax.eq, given, starts[axis]))
    for axis, place in w.shared.items():
        along = _counted(batch[place])
        starts[axis] = _ops.reshape(along, _alone(batch[place], place, len(batch)))
    both = lambda x, y: _ops.operation("And", jnp.logical_and, x, y)
    where = _merged(w, batch, starts)
    return Places(where, reduce(both, inside) if inside else None)


def _merged(w: Windows, batch: tuple[Any, ...], starts: Mapping[int, Array]) -> Array:
    shape, total = (*batch, *(w.window[a] for a in w.inner)), None
    ones, last = [1] * len(batch), [1] * len(w.inner)
    plus = lambda x, y: _ops.operation("Add", jnp.add, x, y)
    for place, axis in enumerate(w.picked):
        start = starts.get(axis, _counted(1))
        index = _ops.reshape(start, (*(start.shape if axis in starts else ones), *last))
        if axis in w.inner and w.window[axis] != 1:
            size, behind = w.window[axis], len(batch) + w.inner.index(axis)
            along = _ops.reshape(_counted(size), _alone(size, behind, len(shape)))
            index = plus(index, along)
        step = prod(w.sized(w.picked[place + 1 :]))
        if step != 1:
            index = _ops.operation("Mul", jnp.multiply, index, np.int32(step))
        total = index if total is None else plus(total, index)
    assert total is not None
    return total if total.shape == shape else jnp.broadcast_to(total, shape)


def _counted(size: Any) -> Array:
    if is_symbolic([size]):
        return lax.iota(jnp.int32, size)
    with jax.ensure_compile_time_eval():
        return jnp.arange(size, dtype=jnp.int32)


def _alone(size: Any, place: int, rank: int) -> tuple[Any, ...]:
    return tuple(size if k == place else 1 for k in range(rank))


def gather(node: Node, operands: list[Held]) -> Sequence[Held] | None:
    """Windows beyond the ends are moved inside, or filled."""
    (x, indices), p = operands, node.params
    d = p["dimension_numbers"]
    gone = (*d.collapsed_slice_dims, *d.operand_batching_dims)
    shared = dict(zip(d.operand_batching_dims, d.start_indices_batching_dims, strict=True))
    kept = tuple(a for a in range(len(shape_of(x))) if a not in gone)
    w = Windows(shape_of(x), tuple(p["slice_sizes"]), kept, tuple(d.start_index_map), shared)
    clipped = _clips(node, w) or p["mode"] == _MODES.PROMISE_IN_BOUNDS
    places = _places(w, indices, clipped)
    rank, made = len(shape_of(indices)) - 1, _taken(w, x, places.where)
    before = [a for a in w.whole if w.picked == (w.picked[0],) and a < w.picked[0]]
    labels = [*before, *range(-rank, 0), *w.inner, *(a for a in w.whole if a not in before)]
    left = [label for label in labels if label < 0 or label in kept]
    if len(left) < len(labels):
        sizes = zip(labels, made.shape, strict=True)
        made = _ops.reshape(made, tuple(size for label, size in sizes if label in left))
    outs = len(left)
    offsets = dict(zip(kept, sorted(d.offset_dims), strict=True))
    batch = [k for k in range(outs) if k not in d.offset_dims]
    order = [batch[label] if label < 0 else offsets[label] for label in left]
    if places.inside is not None:
        wide = [places.inside.shape[label] if label < 0 else 1 for label in left]
        inside = _ops.reshape(places.inside, tuple(wide))
        fill = np.asarray(_fill(p["fill_value"], made.dtype), made.dtype)
        made = _ops.operation("Where", jnp.where, inside, made, fill)
    return [moved(made, order)]


def _taken(w: Windows, x: Held, where: Array) -> Array:
    """The elements: along one axis where it stands, else along the one that several become."""
    if len(w.picked) == 1:
        array, (axis,) = plain(x), w.picked
    else:
        array, axis = _flat(w, ordered(x, (*w.picked, *w.whole))), 0
    return _ops.operation("Gather", lambda x, k: jnp.take(x, k, axis), array, where, axis=axis)


def _flat(w: Windows, x: Array) -> Array:
    return _ops.reshape(x, (prod(w.sized(w.picked)), *w.sized(w.whole)))


def _fill(value: Any, dtype: Any) -> Any:
    """As `lax.gather` has it."""
    if value is not None:
        return value
    if jnp.issubdtype(dtype, jnp.inexact):
        return np.nan
    if dtype == np.bool_:
        return True
    limits = jnp.iinfo(dtype)
    return limits.min if jnp.issubdtype(dtype, jnp.signedinteger) else limits.max


def _check_sizes(node: Node, w: Windows) -> None:
    if sum(is_symbolic([size]) for size in w.sized(w.picked)) > 1:
        raise NotImplementedError(
            f"{at(node.name, node.source)}: reads by index along two axes of sizes that are not "
            "known; pass batch_axes=None to export it for the sizes of the example alone"
        )


def _clips(node: Node, w: Windows) -> bool:
    """Whether no window lies outside; raises where they cannot be written."""
    _check_sizes(node, w)
    mode = node.params["mode"]
    if mode not in (_MODES.CLIP, _MODES.FILL_OR_DROP, _MODES.PROMISE_IN_BOUNDS):
        raise NotImplementedError(
            f"{at(node.name, node.source)}: mode={mode} has no form in ONNX; pass mode='clip'"
        )
    return mode == _MODES.CLIP


def scatter(node: Node, operands: list[Held]) -> Sequence[Held] | None:
    """Windows beyond the ends are moved inside, or left out."""
    (x, indices, updates), p = operands, node.params
    d = p["dimension_numbers"]
    if node.name == "scatter" and any(p[key] is not None for key in p.keys() - _KEYS):
        raise NotImplementedError(
            f"{at(node.name, node.source)}: applies a function, of which ONNX has no form; read "
            "the elements, apply it, and set them"
        )
    gone = (*d.inserted_window_dims, *d.operand_batching_dims)
    shared = dict(zip(d.operand_batching_dims, d.scatter_indices_batching_dims, strict=True))
    kept = tuple(a for a in range(len(shape_of(x))) if a not in gone)
    of_window = dict(zip(kept, d.update_window_dims, strict=True))
    window = tuple(
        shape_of(updates)[of_window[a]] if a in kept else 1 for a in range(len(shape_of(x)))
    )
    w = Windows(shape_of(x), window, kept, tuple(d.scatter_dims_to_operand_dims), shared)
    places = _places(w, indices, _clips(node, w))
    batch = [k for k in range(len(shape_of(updates))) if k not in d.update_window_dims]
    inner = [of_window[a] for a in w.inner]
    rest = [of_window[a] for a in w.whole if a in kept]
    return [_written(w, x, places, ordered(updates, (*batch, *inner, *rest)), node.name)]


def _written(w: Windows, x: Held, places: Places, updates: Array, name: str) -> Held:
    """The operand with the updates, of whose axes those of the windows come last."""
    array, rest = _flat(w, ordered(x, (*w.picked, *w.whole))), w.sized(w.whole)
    where, count = places.where, array.shape[0]
    if places.inside is not None:  # one more element, for all that is left out
        inside = _ops.reshape(places.inside, (*places.inside.shape, *[1] * len(w.inner)))
        outside = np.int32(count) if type(count) is int else jnp.asarray(count).astype(jnp.int32)
        where = _ops.operation("Where", jnp.where, inside, where, outside)
        array = _ops.pad(array, np.zeros((), array.dtype), ((0, 1), *[(0, 0)] * len(rest)))
    rows = prod(where.shape)
    updates = _ops.reshape(updates, (rows, *rest))
    where = _ops.reshape(where, (rows, *[1] * len(rest)))
    if where.shape != updates.shape:
        where = (
            jnp.broadcast_to(where, updates.shape)
            if is_symbolic(rest)
            else _ops.expanded(where, (1, *rest), updates.shape)
        )
    updates = -updates if name == "scatter-sub" else updates
    made = _ops.scattered(array, where, updates, _REDUCTIONS.get(name))
    if places.inside is not None:
        made = _ops.sliced(made, {0: (0, -1, 1)})
    back = (*w.sized(w.picked), *rest)
    return moved(_ops.reshape(made, back), (*w.picked, *w.whole))


def dynamic_slice(node: Node, operands: list[Held]) -> Sequence[Held] | None:
    """It begins where all of it lies in the operand."""
    x, *starts = operands
    given = zip(map(plain, starts), shape_of(x), node.params["slice_sizes"], strict=True)
    return node.run([plain(x), *(_begin(*one) for one in given)])


def dynamic_update_slice(node: Node, operands: list[Held]) -> Sequence[Held] | None:
    """The same."""
    x, update, *starts = operands
    axes = tuple(range(len(starts)))
    w = Windows(shape_of(x), shape_of(update), axes, axes, {})
    _check_sizes(node, w)
    places = _computed(w, (), list(map(plain, starts)), clipped=True)
    return [_written(w, x, places, ordered(update, (*w.inner, *w.whole)), node.name)]


def _begin(start: Any, size: Any, part: Any) -> Array:
    """The first index of a part that lies within the size."""
    if size == part:
        return jnp.zeros_like(start, jnp.int32)
    last = size - part
    last = np.int32(last) if type(last) is int else jnp.asarray(last).astype(jnp.int32)
    return _ops.clip(jnp.asarray(start).astype(jnp.int32), np.int32(0), last)


RULES: dict[str, Rule] = {
    "gather": gather,
    "dynamic_slice": dynamic_slice,
    "dynamic_update_slice": dynamic_update_slice,
    **dict.fromkeys(_REDUCTIONS, scatter),
}
