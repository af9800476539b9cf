"""Which leaves of a parameter tree: a pattern, a predicate or a mapping; the first match wins."""

from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

Where: TypeAlias = str | Callable[[str, Any], bool] | Mapping[str, Any]


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
    """A floating-point leaf with an output axis and at least one input axis."""
    floating = hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating)
    return floating and leaf.ndim >= 2 and trainable(path)


def select(leaves: Mapping[str, Any], where: Where | None, default: Callable) -> dict[str, Any]:
    """What `where` says of each leaf; leaves of which it says nothing, or False, are left out.

    A string is a glob over paths, a predicate takes ``(path, leaf)``, and a mapping gives a value
    to each glob, the first match winning.
    """
    if where is None:
        where = default
    if callable(where):
        return {path: True for path, leaf in leaves.items() if where(path, leaf)}
    rules = {where: True} if isinstance(where, str) else where
    for pattern in rules:
        if not any(fnmatchcase(path, pattern) for path in leaves):
            raise ValueError(
                f"where={pattern!r} matches no leaf; the paths are: {', '.join(leaves) or 'none'}"
            )
    found = {path: _first(rules, path) for path in leaves}
    return {path: value for path, value in found.items() if value is not False}


def _first(rules: Mapping[str, Any], path: str) -> Any:
    return next((value for glob, value in rules.items() if fnmatchcase(path, glob)), False)
