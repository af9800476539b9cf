"""A call of a function of the original parameters with those that a plan left."""

from collections.abc import Callable, Collection
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from jaxaccel._axes import Axes, Labels
from jaxaccel._dataflow import shuffles
from jaxaccel._graph import shape_of
from jaxaccel._labels import Labelling, ids, label
from jaxaccel._shrink import Shrunk
from jaxaccel._trace import Trace, trace
from jaxaccel.prune._paths import Kept, Names, Shapes, check, located, small_shape

_SMALL = "pass plan.shrink(params) to the rewritten function"


def call(fn: Callable, shapes: Shapes, kept: Kept, argnums: Collection[int], args: Any) -> Any:
    """``fn(*args)``, traced at the original shapes and run on the smaller parameters.

    Those are in the arguments at `argnums`. Avals are the arguments' own but for the shape:
    sharding, varying axes and weak types stay.
    """
    whole, places = _whole(shapes, kept, argnums, args)
    traced = trace(fn, *whole)
    traced = traced._replace(graph=shuffles(traced.graph))
    gone = {
        place: {axis: _others(stay, shapes[path][axis]) for axis, stay in kept[path].items()}
        for place, path in places.items()
        if path in kept
    }
    alike = _alike(traced, shapes, places)
    labelling, inputs = label(traced, places, keep_outputs=False, gone=gone, alike=alike)
    for place, axes in gone.items():
        _check_free(labelling, places[place], inputs[place], axes)
    shrunk = Shrunk(labelling, ids(inputs, gone))
    for place, path in places.items():
        _check_same(shrunk, path, inputs[place], kept)
    results = shrunk.run(traced.graph, jax.tree.leaves(args))
    return jax.tree.unflatten(traced.out_tree, results)


def _alike(traced: Trace, shapes: Shapes, places: dict[int, str]) -> dict[int, int]:
    """Outputs that have the name and the shape of a parameter, with its place."""
    first = {path: place for place, path in reversed(places.items())}
    found, names = {}, Names(shapes)
    for k, (path, atom) in enumerate(zip(traced.out_paths, traced.graph.outputs, strict=True)):
        name = names.only(path)
        if name in first and shape_of(atom) == shapes[name]:
            found[k] = first[name]
    return found


def _whole(
    shapes: Shapes, kept: Kept, argnums: Collection[int], args: tuple[Any, ...]
) -> tuple[list[Any], dict[int, str]]:
    """Arguments of the original shapes, and which leaves of all of them are which parameters."""
    if not all(0 <= number < len(args) for number in argnums):
        raise ValueError(
            f"argnums={(*argnums,)} for a call with {len(args)} positional arguments; parameters "
            "and arrays are positional, keyword arguments are static"
        )
    whole, places, before = [], {}, 0
    for number, arg in enumerate(args):
        leaves, tree = jax.tree.flatten(arg)
        if number in argnums:
            for k, path in enumerate(located(arg, shapes)):
                if path is not None:
                    check(path, leaves[k], small_shape(path, shapes, kept), _SMALL)
                    leaves[k] = jax.typeof(leaves[k]).update(shape=shapes[path])
                    places[before + k] = path
        whole.append(jax.tree.unflatten(tree, leaves))
        before += len(leaves)
    return whole, places


def _check_free(labelling: Labelling, path: str, axes: Axes, gone: PyTree) -> None:
    """Raises where the function does something with a removed index that masking would not."""
    for k, indices in gone.items():
        axis = axes[k]
        roots = labelling.roots(axis.ids[indices]) if isinstance(axis, Labels) else []
        for index, root in zip(indices, roots, strict=True):
            if root in labelling.pinned:
                raise ValueError(
                    f"{path} axis {k}: in this function index {index} cannot be removed as if it "
                    f"were zero: {labelling.pinned[root]}"
                )


def _check_same(shrunk: Shrunk, path: str, axes: Axes, kept: Kept) -> None:
    """Raises where the function couples an index that stays with one that is gone."""
    for k, size in enumerate(axes.shape):
        stays = kept.get(path, {}).get(k, np.arange(size))
        found = shrunk.kept(axes[k])
        if not np.array_equal(np.arange(size) if found is None else found, stays):
            raise ValueError(
                f"{path} axis {k}: this function couples it with channels that the plan removes, "
                "but the plan does not cut it alike; make the plan with a function that computes "
                "both, as lambda p, x: (fn(p, x), fn.train(p, key, x)[0])"
            )


def _others(kept: np.ndarray, size: int) -> np.ndarray:
    return np.delete(np.arange(size), kept)
