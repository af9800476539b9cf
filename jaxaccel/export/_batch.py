"""Which axes of the arguments are the batch, of every size."""

from collections.abc import Sequence
from typing import Any, TypeAlias

import jax
import jax.export

from jaxaccel.export._tree import Described, raw

BATCH = "batch"
_NONE = object()
Axes: TypeAlias = int | Sequence[Any] | None


def symbolic(example: Sequence[Any], given: Described, batch_axes: Axes) -> list[Any]:
    """The flat arguments as shapes, with a symbol for the batch size.

    Raises:
        TypeError: an axis is no whole number.
        ValueError: an argument has no such axis, or another size along it.
    """
    leaves = jax.tree.leaves(tuple(example))
    avals = [jax.eval_shape(raw, leaf) for leaf in leaves]
    if any(type(size) is not int for aval in avals for size in aval.shape):
        return avals  # the caller has symbols of his own
    sizes, found = {}, []
    (batch,) = jax.export.symbolic_shape(BATCH)
    for name, aval, axis in zip(given.names, avals, _axes(example, batch_axes), strict=True):
        shape = list(aval.shape)
        if axis is not None:
            if type(axis) is not int:
                raise TypeError(f"batch_axes={batch_axes!r}: {axis!r} is no axis of {name}")
            if not -len(shape) <= axis < len(shape):
                raise ValueError(
                    f"{name}: of shape {aval.shape}, has no axis {axis} for the batch; pass "
                    "batch_axes with None for it, as in_axes of jax.vmap"
                )
            sizes[name], shape[axis] = shape[axis], batch
        found.append(_aval(tuple(shape), aval))
    if len(set(sizes.values())) > 1:
        listed = ", ".join(f"{name} {size}" for name, size in sizes.items())
        raise ValueError(
            f"batch_axes={batch_axes}: the arguments differ in their batch size ({listed}); pass "
            "None for those without a batch, as in_axes of jax.vmap"
        )
    return found


def _aval(shape: tuple[Any, ...], like: Any) -> jax.ShapeDtypeStruct:
    weak = getattr(like, "weak_type", False)  # of a number of Python's, which takes others' dtype
    return jax.ShapeDtypeStruct(shape, like.dtype, weak_type=weak)


def _axes(example: Sequence[Any], batch_axes: Axes) -> list[int | None]:
    """Of every leaf."""
    given = batch_axes if isinstance(batch_axes, int | None) else tuple(batch_axes)
    # None would be taken for a tree without leaves.
    marked = jax.tree.map(lambda a: _NONE if a is None else a, given, is_leaf=lambda a: a is None)
    try:
        whole = jax.tree.broadcast(marked, tuple(example))
    except ValueError as error:
        raise ValueError(f"batch_axes={batch_axes!r} does not fit the arguments: {error}") from None
    return [None if axis is _NONE else axis for axis in jax.tree.leaves(whole)]
