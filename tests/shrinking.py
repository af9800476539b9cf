"""The oracle of the channel labels: channels that are gone equal channels set to zero."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxaccel as jx
from jaxaccel._graph import leaf_paths
from jaxaccel.prune._rewrite import call

# A network is compiled to be run once. Without fusion emitters JAX 0.10 takes a third of the time.
QUICKLY = {"xla_backend_optimization_level": 0}
if jax.__version_info__ < (0, 11):
    QUICKLY["xla_cpu_use_fusion_emitters"] = False

# path -> axis -> indices that go
Dropped = dict[str, dict[int, list[int]]]


def _each(params: Any, dropped: Dropped, change: Callable) -> Any:
    leaves = leaf_paths(params)
    changed = [change(leaf, dropped.get(path, {}), path) for path, leaf in leaves.items()]
    return jax.tree.unflatten(jax.tree.structure(params), changed)


def cut(params: Any, dropped: Dropped) -> Any:
    def without(leaf: Any, axes: dict[int, list[int]], path: str) -> Any:
        for axis, indices in axes.items():
            leaf = np.delete(leaf, indices, axis)
        return jnp.asarray(leaf)

    return _each(params, dropped, without)


def masked(params: Any, dropped: Dropped, unmasked: tuple[str, ...] = ()) -> Any:
    def zeroed(leaf: Any, axes: dict[int, list[int]], path: str) -> Any:
        zeros = np.array(leaf)
        for axis, indices in () if path in unmasked else axes.items():
            np.moveaxis(zeros, axis, 0)[indices] = 0
        return jnp.asarray(zeros)

    return _each(params, dropped, zeroed)


def shrunk(fn: Callable, params: Any, dropped: Dropped) -> Callable:
    """`fn` for parameters cut by `dropped`, for any batch."""
    shapes = {path: leaf.shape for path, leaf in leaf_paths(params).items()}
    kept = {
        path: {axis: np.delete(np.arange(shapes[path][axis]), gone) for axis, gone in axes.items()}
        for path, axes in dropped.items()
    }
    return lambda *args: call(fn, shapes, kept, (0,), args)


def dropped_by(plan: jx.prune.Plan) -> Dropped:
    return {
        path: {
            axis: np.setdiff1d(np.arange(plan.shapes[path][axis]), kept).tolist()
            for axis, kept in axes.items()
        }
        for path, axes in plan.kept.items()
    }


def check(
    fn: Callable, params: Any, x: Any, seed: int = 0, rtol: float = 2e-6, ratio: float = 0.5
) -> Any:
    """A random plan makes a function whose value and gradient are the masked one's; its groups."""
    groups = jx.groups(fn, params, x)
    if not groups:
        return groups
    random = jx.prune.random(jax.random.key(seed))
    plan = jx.prune.plan(fn, params, x, ratio=ratio, criterion=random)
    dropped = dropped_by(plan)
    small = plan.shrink(params)
    close(small, cut(params, dropped), 0)
    zeroed = masked(params, dropped, groups.unmasked)
    close(jax.jit(jx.prune.apply)(params, plan.masks(params)), zeroed, 0)
    run = lambda small, zeroed: (_both(plan.rewrite(fn), small, x), _both(fn, zeroed, x))
    (value, gradient), (wanted, full) = jax.jit(run, compiler_options=QUICKLY)(small, zeroed)
    close(value, wanted, rtol)
    close(_no_float0(gradient), cut(_no_float0(full), dropped), 5 * rtol)
    return groups


def _both(fn: Callable, params: Any, x: Any) -> Any:
    """The value and its gradient."""

    def loss(params: Any) -> Any:
        out = fn(params, x)
        return sum(jnp.sum(jnp.sin(v)) for v in jax.tree.leaves(out)), out

    (_, out), gradient = jax.value_and_grad(loss, has_aux=True, allow_int=True)(params)
    return out, gradient


def _no_float0(gradients: Any) -> Any:
    none = lambda leaf: leaf.dtype == jax.dtypes.float0
    return jax.tree.map(lambda leaf: np.zeros(leaf.shape) if none(leaf) else leaf, gradients)


def close(a: Any, b: Any, rtol: float) -> None:
    """Equal up to `rtol` of the largest number of the whole tree."""
    wanted = [np.asarray(v) for v in jax.tree.leaves(b)]
    largest = max((float(np.abs(v).max()) for v in wanted if v.size), default=0.0)
    for u, v in zip(jax.tree.leaves(a), wanted, strict=True):
        assert u.shape == v.shape
        np.testing.assert_allclose(u, v, rtol=0, atol=rtol * (largest + 1e-3))
