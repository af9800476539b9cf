"""What a channel is worth: criteria are functions of the groups and the parameters."""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias
from zlib import crc32

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from jaxaccel._graph import leaf_paths
from jaxaccel._groups import Group, Groups

# The scores of the channels of each group; the lowest go first.
Criterion: TypeAlias = Callable[[Groups, PyTree], Sequence[Float[np.ndarray, " channels"]]]

_SCALES = ("scale", "gamma", "weight")


def l1(groups: Groups, params: PyTree) -> list[Float[np.ndarray, " channels"]]:
    """The sum of the absolute values of a channel's weights, the mean over its kernels.

    The kernels that read the channel count like those that make it. Parameters with one axis
    (biases, scales, statistics) count only where a group has no others.

    Source: Li et al. 2017 (https://arxiv.org/abs/1608.08710); over groups: Fang et al. 2023
    (https://arxiv.org/abs/2301.12900).
    """
    return _norms(np.abs, groups, params)


def l2(groups: Groups, params: PyTree) -> list[Float[np.ndarray, " channels"]]:
    """As `l1`, with squares."""
    return _norms(lambda x: np.square(np.abs(x)), groups, params)


def batchnorm_scale(groups: Groups, params: PyTree) -> list[Float[np.ndarray, " channels"]]:
    """The absolute scale of the norm that a channel passes, the mean if there are several.

    A scale is a parameter with one axis, called ``scale``, ``gamma`` or ``weight``.

    Raises:
        ValueError: a group has no such parameter; leave it out by ``where=``.

    Source: Liu et al. 2017 (https://arxiv.org/abs/1708.06519).
    """
    leaves = leaf_paths(params)
    scores = []
    for group in groups:
        found = [
            np.abs(channels).sum(1)
            for path, channels in _channels(group, leaves)
            if channels.ndim == 2 and path.rsplit("/", 1)[-1] in _SCALES
        ]
        if not found:
            raise ValueError(
                f"batchnorm_scale: no norm scales the group of {group}; leave it out by where=, "
                "or take another criterion"
            )
        scores.append(np.mean(found, 0))
    return scores


def taylor(loss: Callable[[PyTree], Array]) -> Criterion:
    """How much the loss would change without a channel, to first order.

    The absolute value of the sum of weight times gradient over all its slices.

    Args:
        loss: ``loss(params)``, a scalar; over as much data as one gradient holds.

    Source: Molchanov et al. 2019 (https://arxiv.org/abs/1906.10771).
    """

    def scores(groups: Groups, params: PyTree) -> list[np.ndarray]:
        gradient = jax.jit(jax.grad(loss, allow_int=True))(params)
        leaves = {
            path: np.asarray(leaf, np.float32) * np.asarray(slope, np.float32)
            for (path, leaf), slope in zip(
                leaf_paths(params).items(), jax.tree.leaves(gradient), strict=True
            )
            if jnp.issubdtype(jnp.result_type(leaf), jnp.floating)
        }
        return [
            np.abs(sum(_summed(channels) for _, channels in _channels(group, leaves)))
            for group in groups
        ]

    return scores


def random(key: Array) -> Any:
    """Random scores in [0, 1): the control that any other criterion has to beat.

    For the channels of `plan` and for the weights of `masks` alike. Scores are keyed by the paths,
    so that leaving one layer out does not change the others.
    """

    def draw(name: str, shape: tuple[int, ...]) -> Array:
        return jax.random.uniform(jax.random.fold_in(key, crc32(name.encode())), shape)

    def scores(first: Any, second: Any) -> Any:
        if not isinstance(first, Groups):
            return draw(first, second.shape)
        firsts = [(group.slices[0], group.size) for group in first]
        names = [f"{part.path}/{part.axis}/{part.index[0, 0]}" for part, _ in firsts]
        return [np.asarray(draw(n, (size,))) for n, (_, size) in zip(names, firsts, strict=True)]

    return scores


def _norms(of: Callable[[Any], np.ndarray], groups: Groups, params: PyTree) -> list[np.ndarray]:
    leaves = leaf_paths(params)
    scores = []
    for group in groups:
        parts = [channels for _, channels in _channels(group, leaves)]
        kernels = [channels for channels in parts if channels.ndim > 2] or parts
        scores.append(np.mean([_summed(of(channels)) for channels in kernels], 0))
    return scores


def _channels(group: Group, leaves: dict[str, Any]) -> list[tuple[str, np.ndarray]]:
    """The parameters of a group by channel: [channel, slice, ...], in float32 or wider."""
    found = []
    for part in group.slices:
        if part.path in leaves:
            leaf = _wide(leaves[part.path])
            found.append((part.path, np.moveaxis(leaf, part.axis, 0)[part.index]))
    return found


def _wide(leaf: Any) -> np.ndarray:
    leaf = np.asarray(leaf)
    return leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32), copy=False)


def finite(leaf: Any) -> bool:
    """Whether all values of a leaf are numbers; random keys are."""
    return not jnp.issubdtype(jnp.result_type(leaf), jnp.inexact) or bool(
        np.isfinite(_wide(leaf)).all()
    )


def _summed(channels: np.ndarray) -> np.ndarray:
    return channels.sum(tuple(range(1, channels.ndim)))
