"""Pruning masks as pytrees: unstructured by magnitude, and N:M for sparse tensor cores."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree

from jaxaccel._select import Where, flatten, is_kernel, rebuild, select
from jaxaccel.quantize._qtensor import is_qtensor

if TYPE_CHECKING:
    import optax

Criterion = Callable[[str, Float[Array, "..."]], Float[Array, "..."]]


def magnitude(path: str, kernel: Float[Array, "..."]) -> Float[Array, "..."]:
    """A weight's absolute value (Han et al. 2015, arXiv:1506.02626)."""
    return jnp.abs(kernel)


def masks(
    params: PyTree,
    sparsity: float,
    *,
    kind: str = "unstructured",
    scope: Literal["global", "local"] = "global",
    criterion: Criterion = magnitude,
    where: Where | None = None,
) -> PyTree[Bool[Array, "..."]]:
    """Which weights stay: a tree like `params`, True where a weight is kept.

    Args:
        params: a tree of parameters.
        sparsity: the share of the selected weights to remove, in [0, 1). For ``kind="2:4"`` it is
            0.5 by definition.
        kind: ``"unstructured"``, or ``"n:m"``: of every m consecutive weights along the input axis
            (the last but one) n stay. 2:4 is the layout of sparse tensor cores (Mishra et al.
            2021, arXiv:2104.08378).
        scope: unstructured only. ``"global"`` ranks all selected weights together, ``"local"``
            removes the same share of each leaf.
        criterion: ``(path, leaf) -> scores``; the lowest are removed.
        where: which leaves: a glob over paths, a predicate ``(path, leaf) -> bool``, or a mapping
            from globs to True or False; a glob chooses among floating-point leaves with two or
            more axes, never a bias or a statistic. By default all of these;
            for n:m, those of them whose input axis is a multiple of m.

    Returns:
        A tree like `params`: boolean arrays for the selected leaves, a scalar True for the others.

    Raises:
        ValueError: `sparsity`, `kind` or `scope` is out of range, nothing is selected, a leaf is a
            `QTensor`, or one chosen by `where` is not floating point or cannot be grouped by m.

    >>> import jax.numpy as jnp
    >>> params = {"dense": {"kernel": jnp.array([[1.0, -4.0], [3.0, 2.0]]), "bias": jnp.ones(2)}}
    >>> masks(params, 0.5)["dense"]["kernel"]
    Array([[False,  True],
           [ True, False]], dtype=bool)
    """
    groups = _parse(kind)
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity={sparsity!r} must lie in [0, 1)")
    if scope not in ("global", "local"):
        raise ValueError(f'scope={scope!r} must be "global" or "local"')
    leaves = flatten(params, is_qtensor)
    for path in (path for path, leaf in leaves.items() if is_qtensor(leaf)):
        raise ValueError(f"{path}: is a QTensor; prune first, or jx.quantize.dequantize the tree")
    chosen = select(leaves, where, _prunable(groups))
    if not chosen:
        raise ValueError(f"masks: no leaf to prune for kind={kind!r}; pass where= to choose leaves")
    for path in chosen:
        _check(path, leaves[path])
    scores = {path: criterion(path, leaves[path]) for path in chosen}
    if groups is not None:
        kept = {path: _n_of_m(path, s, *groups, sparsity) for path, s in scores.items()}
    elif scope == "local":
        kept = {path: _highest(s, sparsity) for path, s in scores.items()}
    else:
        kept = _global(scores, sparsity)
    everything = jnp.array(True)
    return rebuild(params, {path: kept.get(path, everything) for path in leaves})


def _parse(kind: str) -> tuple[int, int] | None:
    if kind == "unstructured":
        return None
    n, colon, m = kind.partition(":")
    if colon and n.isdigit() and m.isdigit() and 0 < int(n) < int(m):
        return int(n), int(m)
    raise ValueError(f'kind={kind!r} must be "unstructured" or "n:m" with 0 < n < m, as "2:4"')


def _prunable(groups: tuple[int, int] | None) -> Callable[[str, Any], bool]:
    def default(path: str, leaf: Any) -> bool:
        return is_kernel(path, leaf) and (groups is None or leaf.shape[-2] % groups[1] == 0)

    return default


def _check(path: str, leaf: Any) -> None:
    if not (hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating)):
        raise ValueError(
            f"{path}: only floating-point leaves can be pruned; leave it out of where="
        )


def _highest(scores: Float[Array, "..."], sparsity: float) -> Bool[Array, "..."]:
    """True but for the lowest share, counted exactly: equal scores go by position."""
    removed = round(sparsity * scores.size)
    order = jnp.argsort(scores.ravel())
    return jnp.ones(scores.size, bool).at[order[:removed]].set(False).reshape(scores.shape)


def _global(scores: dict[str, Array], sparsity: float) -> dict[str, Array]:
    flat = jnp.concatenate([s.ravel().astype(jnp.float32) for s in scores.values()])
    kept, start, parts = _highest(flat, sparsity), 0, {}
    for path, s in scores.items():
        parts[path] = kept[start : start + s.size].reshape(s.shape)
        start += s.size
    return parts


def _n_of_m(path: str, scores: Array, n: int, m: int, sparsity: float) -> Array:
    if abs(sparsity - (1 - n / m)) > 1e-6:
        raise ValueError(f"kind='{n}:{m}' removes {1 - n / m:g} of the weights; got {sparsity=}")
    if scores.ndim < 2 or scores.shape[-2] % m:
        raise ValueError(
            f"{path}: shape {scores.shape} has no input axis that is a multiple of {m}; "
            f"leave it out of where="
        )
    grouped = jnp.moveaxis(scores, -2, -1)
    grouped = grouped.reshape(*grouped.shape[:-1], -1, m)
    rank = jnp.argsort(jnp.argsort(grouped, axis=-1), axis=-1)
    kept = (rank >= m - n).reshape(*scores.shape[:-2], scores.shape[-1], scores.shape[-2])
    return jnp.moveaxis(kept, -1, -2)


def apply(params: PyTree, masks: PyTree) -> PyTree:
    """The parameters with zeros where `masks` is False.

    Args:
        params: a tree of arrays.
        masks: what `masks` returned for a tree of that structure.

    Raises:
        ValueError: the trees differ in structure or in a leaf's shape.

    >>> import jax.numpy as jnp
    >>> apply({"w": jnp.array([1.0, 2.0])}, {"w": jnp.array([True, False])})
    {'w': Array([1., 0.], dtype=float32)}
    """
    _match(params, masks)
    return jax.tree.map(lambda p, m: jnp.where(m, p, jnp.zeros_like(p)), params, masks)


def keep(masks: PyTree) -> "optax.GradientTransformation":
    """An optax transformation that zeroes the updates of pruned weights; chain it last.

    Args:
        masks: what `masks` returned for the trained tree, or for a tree that holds it under
            ``"params"``, as `jaxaccel.functional` gives it.

    >>> import jax.numpy as jnp, optax
    >>> tx = optax.chain(optax.sgd(1.0), keep({"w": jnp.array([True, False])}))
    >>> grads = {"w": jnp.array([1.0, 2.0])}
    >>> tx.update(grads, tx.init(grads))[0]
    {'w': Array([-1.,  0.], dtype=float32)}
    """
    import optax

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        return apply(updates, _subtree(masks, updates)), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def _subtree(masks: Any, updates: Any) -> Any:
    same = jax.tree.structure(masks) == jax.tree.structure(updates)
    return masks if same or not isinstance(masks, dict) else masks.get("params", masks)


def _match(params: PyTree, masks: PyTree) -> None:
    leaves, kept = flatten(params), flatten(masks)
    for path in sorted(leaves.keys() ^ kept.keys()):
        raise ValueError(f"{path}: in only one of params and masks; make the masks from this tree")
    for path, mask in kept.items():
        if mask.shape not in ((), leaves[path].shape):
            raise ValueError(
                f"{path}: mask of shape {mask.shape} for a leaf of shape {leaves[path].shape}; "
                "make the masks from this tree"
            )


def sparsity(masks: PyTree) -> dict[str, float]:
    """The share of removed weights of each leaf, 0 for those left alone.

    >>> import jax.numpy as jnp
    >>> sparsity({"bias": jnp.array(True), "kernel": jnp.array([True, False])})
    {'bias': 0.0, 'kernel': 0.5}
    """
    return {path: float(1 - jnp.mean(mask)) for path, mask in flatten(masks).items()}
