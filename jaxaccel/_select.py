"""Which leaves of a parameter tree: a pattern, a predicate or a mapping; the first match wins."""

from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

Predicate: TypeAlias = Callable[[str, Any], bool]
Where: TypeAlias = str | Predicate | Mapping[str, bool]


def flatten(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> dict[str, Any]:
    """``{"conv1/kernel": leaf}`` in tree order.

    >>> flatten({"conv1": {"kernel": 1, "bias": 2}})
    {'conv1/bias': 2, 'conv1/kernel': 1}
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def rebuild(tree: Any, values: Mapping[str, Any], is_leaf=None) -> Any:
    """The tree with the leaves of `values` (keyed as by `flatten`) in place of its own."""
    structure = jax.tree.structure(tree, is_leaf=is_leaf)
    return jax.tree.unflatten(structure, [values[path] for path in flatten(tree, is_leaf)])


def trainable(path: str) -> bool:
    """Whether a path lies outside the statistics that `jaxaccel.functional` keeps apart."""
    return path.split("/", 1)[0] != "batch_stats"


def is_kernel(path: str, leaf: Any) -> bool:
    """A floating-point array with an output axis and at least one input axis."""
    array = isinstance(leaf, jax.Array | np.ndarray)
    return array and jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.ndim >= 2 and trainable(path)


def select(leaves: Mapping[str, Any], where: Where | None, default: Predicate) -> list[str]:
    """The paths that `where` chooses, `default` where it is None.

    A predicate takes ``(path, leaf)`` and has its way. A glob, or a mapping from globs to True or
    False of which the first match wins, chooses among kernels alone: ``"*dense*"`` is not meant
    to take a bias along.
    """
    if where is None:
        where = default
    if callable(where):
        return [path for path, leaf in leaves.items() if where(path, leaf)]
    rules = {where: True} if isinstance(where, str) else where
    kernels = [path for path, leaf in leaves.items() if is_kernel(path, leaf)]
    for pattern, value in rules.items():
        if not isinstance(value, bool):
            raise ValueError(f"where[{pattern!r}]={value!r} must be True or False")
        if not any(fnmatchcase(path, pattern) for path in kernels):
            raise ValueError(
                f"where={pattern!r} matches no kernel; they are: {', '.join(kernels) or 'none'}"
            )
    return [path for path in kernels if _first(rules, path)]


def _first(rules: Mapping[str, bool], path: str) -> bool:
    return next((value for glob, value in rules.items() if fnmatchcase(path, glob)), False)
