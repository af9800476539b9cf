"""The zoo: one list of small networks that parametrises every test of a transform."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import jaxaccel as jx


class Case(NamedTuple):
    name: str
    build: Callable[[], tuple[Callable, Any]]
    shape: tuple[int, ...]  # of one batch of images

    def images(self, seed: int = 0) -> jax.Array:
        return jax.random.normal(jax.random.key(seed), self.shape)


def filled(shapes: Any, seed: int = 0) -> Any:
    """Arrays of these shapes: normal kernels, vectors in [0.1, 0.9), integers 0, random keys."""
    random = np.random.default_rng(seed)

    def fill(leaf: Any) -> jax.Array:
        fan_in = leaf.size // max(leaf.shape[-1:] or (1,))
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.key(seed)
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return jnp.zeros(leaf.shape, leaf.dtype)
        if fan_in == 1:
            return jnp.asarray(random.uniform(0.1, 0.9, leaf.shape), leaf.dtype)
        return jnp.asarray(random.normal(size=leaf.shape) * fan_in**-0.5, leaf.dtype)

    return jax.tree.map(fill, shapes)


def normal(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


class LinenNet(linen.Module):
    @linen.compact
    def __call__(self, x, train: bool = False):
        x = linen.Conv(4, (3, 3), name="conv1")(x)
        x = linen.BatchNorm(use_running_average=not train, name="norm1")(x)
        x = linen.relu(x).reshape(x.shape[0], -1)
        x = linen.Dropout(0.5, deterministic=not train)(x)
        return linen.Dense(10, name="dense1")(x)


def linen_net() -> tuple[Callable, Any]:
    module = LinenNet()
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.ones((1, 8, 8, 1)))
    return jx.functional(module, filled(shapes))


def hand_written() -> tuple[Callable, Any]:
    k1, k2 = jax.random.split(jax.random.key(0))
    params = {
        "hidden": {"kernel": jax.random.normal(k1, (64, 16)) / 8, "bias": jnp.zeros(16)},
        "out": {"kernel": jax.random.normal(k2, (16, 10)) / 4, "bias": jnp.zeros(10)},
    }

    def fn(params, x):
        x = x.reshape(x.shape[0], -1)
        x = jnp.tanh(x @ params["hidden"]["kernel"] + params["hidden"]["bias"][None])
        return x @ params["out"]["kernel"] + params["out"]["bias"][None]

    return fn, params


def from_nnx(module: Callable[..., nnx.Module], *args: Any, **options: Any) -> Callable:
    """Builds it without running its initialisers, which would take most of a test's time."""

    def build() -> tuple[Callable, Any]:
        shapes = nnx.eval_shape(lambda: module(*args, **options, rngs=nnx.Rngs(0)))
        graph, state = nnx.split(shapes)
        return jx.functional(nnx.merge(graph, filled(state)))

    return build


LINEN = Case("linen", linen_net, (4, 8, 8, 1))

ZOO = [
    Case("hand_written", hand_written, (4, 8, 8, 1)),
    LINEN,
    Case("mlp", from_nnx(jx.nn.MLP, 64, width=16, depth=2, num_classes=10), (4, 8, 8, 1)),
    Case("convnet", from_nnx(jx.nn.ConvNet), (4, 28, 28, 1)),
    Case(
        "separable",
        from_nnx(jx.nn.ConvNet, input_shape=(28, 28, 1), widths=(8, 16), separable=True),
        (4, 28, 28, 1),
    ),
    Case("resnet20", from_nnx(jx.nn.ResNet, 20), (2, 16, 16, 3)),
    Case("mobilenet", from_nnx(jx.nn.MobileNet, 10, width=0.25), (2, 32, 32, 3)),
]


def tiers(cases: Sequence[Case], long: Sequence[str] = ("mobilenet",)) -> list[Any]:
    """For `pytest.mark.parametrize`: those that take longest are of the full tier."""
    marks = lambda case: [pytest.mark.full] if case.name in long else []
    return [pytest.param(case, id=case.name, marks=marks(case)) for case in cases]
