"""The oracle of the channel labels: channels that are gone equal channels set to zero."""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxaccel as jx
from jaxaccel import _graph
from jaxaccel._labels import label
from jaxaccel._shrink import Shrunk

# A network is compiled to be run once.
QUICKLY = {"xla_backend_optimization_level": 0}

# path -> axis -> indices that go
Dropped = dict[str, dict[int, list[int]]]


def draw(groups: Any, seed: int, share: float = 0.5) -> Dropped:
    """A random share of the channels of every group, at least one and never all."""
    random = np.random.default_rng(seed)
    dropped: Dropped = defaultdict(lambda: defaultdict(list))
    for group in groups:
        count = min(max(1, int(group.size * share)), group.size - 1)
        for channel in random.permutation(group.size)[:count]:
            for part in group.slices:
                dropped[part.path][part.axis] += part.index[channel].tolist()
    return dropped


def _each(params: Any, dropped: Dropped, change: Callable) -> Any:
    leaves = _graph.leaf_paths(params)
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
    """`fn` for parameters cut by `dropped`, for any batch; traced at the original shapes."""
    avals = jax.tree.map(jax.typeof, params)

    def call(small: Any, *args: Any) -> Any:
        traced = _graph.trace(fn, avals, *jax.tree.map(jax.typeof, args))
        labelling, inputs = label(traced, range(traced.num_params))
        gone = [
            inputs[place][axis].ids[indices]  # pyright: ignore
            for place, path in enumerate(traced.paths[: traced.num_params])
            for axis, indices in dropped.get(path, {}).items()
        ]
        run = Shrunk(labelling, np.concatenate([np.zeros(0, int), *gone])).run
        leaves = jax.tree.leaves((small, *args))
        return jax.tree.unflatten(traced.out_tree, run(traced.graph, leaves))

    return call


def check(fn: Callable, params: Any, x: Any, seed: int = 0, rtol: float = 2e-6) -> Any:
    """Value and gradient of the shrunk function are those of the masked one; its groups."""
    groups = jx.groups(fn, params, x)
    dropped = draw(groups, seed)
    small = cut(params, dropped)
    zeroed = masked(params, dropped, groups.unmasked)
    value, gradient = _value_and_gradient(shrunk(fn, params, dropped), small, x)
    wanted, full = _value_and_gradient(fn, zeroed, x)
    close(value, wanted, rtol)
    close(gradient, cut(full, dropped), 10 * rtol)
    return groups


def _value_and_gradient(fn: Callable, params: Any, x: Any) -> Any:
    def loss(params: Any) -> Any:
        out = fn(params, x)
        return sum(jnp.sum(jnp.sin(v)) for v in jax.tree.leaves(out)), out

    both = jax.value_and_grad(loss, has_aux=True, allow_int=True)
    (_, out), gradient = jax.jit(both, compiler_options=QUICKLY)(params)
    return out, jax.tree.map(_no_float0, gradient)


def _no_float0(gradient: Any) -> Any:
    return np.zeros(gradient.shape) if gradient.dtype == jax.dtypes.float0 else gradient


def close(a: Any, b: Any, rtol: float) -> None:
    """Equal up to `rtol` of the largest number of the whole tree."""
    largest = max((float(jnp.abs(v).max()) for v in jax.tree.leaves(b) if v.size), default=0.0)
    for u, v in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert u.shape == v.shape
        np.testing.assert_allclose(u, v, rtol=0, atol=rtol * (largest + 1e-3))
