"""Plans: what is removed equals what is set to zero, in value, gradient and training."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxaccel as jx
from tests import shrinking
from tests.models import ZOO, Case, normal
from tests.networks import frameworks, sequence, vision

CASES = {case.name: case for case in [*ZOO, *vision.CASES, *sequence.CASES, *frameworks.CASES]}
FLOAT32 = ("keras", "lstm", "gru")  # what these compute in, whatever their parameters
QUICK = ("linen", "separable")


def doubled(tree: Any) -> Any:
    """The tree with its floating-point leaves in float64."""
    wide = lambda x: x.astype(jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x
    return jax.tree.map(wide, tree)


def places(count: int, channels: int, chosen: list[int]) -> list[int]:
    """Where these channels lie on an axis of flattened images."""
    return [place * channels + channel for place in range(count) for channel in chosen]


def norm(path: str, chosen: list[int]) -> shrinking.Dropped:
    kinds = ("params/{}/scale", "params/{}/bias", "batch_stats/{}/mean", "batch_stats/{}/var")
    return {kind.format(path): {0: chosen} for kind in kinds}


# By network: the output channels that go, and by hand all slices that this takes.
SLICES: dict[str, tuple[str, list[int], shrinking.Dropped]] = {
    "linen": (
        "params/conv1/kernel axis 3",
        [1, 2],
        {
            "params/conv1/kernel": {3: [1, 2]},
            "params/conv1/bias": {0: [1, 2]},
            **norm("norm1", [1, 2]),
            "params/dense1/kernel": {0: places(64, 4, [1, 2])},
        },
    ),
    "convnet": (
        "params/conv2/kernel axis 3",
        [0, 7, 19],
        {
            "params/conv2/kernel": {3: [0, 7, 19]},
            "params/conv2/bias": {0: [0, 7, 19]},
            "params/dense1/kernel": {0: places(16, 20, [0, 7, 19])},
        },
    ),
    "unet": (
        "params/down1/conv/kernel axis 3",
        [0, 3],
        {
            "params/down1/conv/kernel": {3: [0, 3]},
            **norm("down1/norm", [0, 3]),
            "params/down2/conv/kernel": {2: [0, 3]},
            "params/up1/conv/kernel": {2: [8, 11]},
        },
    ),
    "densenet": (
        "params/convs/1/kernel axis 3",
        [2],
        {
            "params/convs/1/kernel": {3: [2]},
            **norm("norms/2", [14]),
            "params/convs/2/kernel": {2: [14]},
            **norm("norms/3", [14]),
            "params/transition/kernel": {2: [14]},
        },
    ),
    "squeeze_excite": (
        "params/conv/kernel axis 3",
        [3, 4, 11],
        {
            "params/conv/kernel": {3: [3, 4, 11]},
            "params/conv/bias": {0: [3, 4, 11]},
            "params/squeeze/kernel": {0: [3, 4, 11]},
            "params/excite/kernel": {1: [3, 4, 11]},
            "params/excite/bias": {0: [3, 4, 11]},
            "params/head/kernel": {0: [3, 4, 11]},
        },
    ),
    "chain": (
        "params/shortcut/conv/kernel axis 3",
        [5, 6],
        {
            "params/shortcut/conv/kernel": {3: [5, 6]},
            **norm("shortcut/norm", [5, 6]),
            **{f"params/second/{i}/conv/kernel": {3: [5, 6]} for i in range(3)},
            **{k: v for i in range(3) for k, v in norm(f"second/{i}/norm", [5, 6]).items()},
            **{f"params/first/{i}/conv/kernel": {2: [5, 6]} for i in (1, 2)},
            "params/head/kernel": {0: [5, 6]},
        },
    ),
}


@pytest.mark.parametrize("name", SLICES)
def test_slices_written_by_hand(name):
    where, channels, dropped = SLICES[name]
    fn, params = CASES[name].build()
    x = CASES[name].images()
    last = lambda groups, params: [np.isin(np.arange(g.size), channels) * -1 for g in groups]
    (size,) = [g.size for g in jx.groups(fn, params, x) if where in map(str, g.slices)]
    plan = jx.prune.plan(fn, params, x, ratio=len(channels) / size, criterion=last, where=where)
    assert shrinking.dropped_by(plan) == dropped
    zeroed = shrinking.masked(params, dropped)
    small = jax.jit(plan.rewrite(fn))(shrinking.cut(params, dropped), x)
    shrinking.close(small, jax.jit(fn)(zeroed, x), 2e-6)


@pytest.mark.parametrize("name", QUICK)
def test_float64(name):
    check_float64(name, 0.5)


@pytest.mark.full
@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.75])
@pytest.mark.parametrize("name", [name for name in CASES if name not in FLOAT32])
def test_float64_of_the_zoo(name, ratio):
    check_float64(name, ratio)


@pytest.mark.full
@pytest.mark.parametrize("ratio", [0.25, 0.75])
@pytest.mark.parametrize("name", CASES)
def test_the_zoo_at_other_ratios(name, ratio):
    fn, params = CASES[name].build()
    shrinking.check(fn, params, CASES[name].images(), ratio=ratio)


def check_float64(name: str, ratio: float) -> None:
    fn, params = CASES[name].build()
    with jax.enable_x64(True):
        x = doubled(CASES[name].images())
        shrinking.check(fn, doubled(params), x, rtol=1e-11, ratio=ratio)


class Dropped(nnx.Module):
    """Two convolutions with batch norm, dropout between."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.first = nnx.Conv(3, 6, (3, 3), strides=2, use_bias=False, rngs=rngs)
        self.norm1 = nnx.BatchNorm(6, rngs=rngs)
        self.dropout = nnx.Dropout(0.3, rngs=rngs)
        self.second = nnx.Conv(6, 8, (3, 3), rngs=rngs)
        self.norm2 = nnx.BatchNorm(8, rngs=rngs)
        self.head = nnx.Linear(8, 5, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.dropout(jax.nn.relu(self.norm1(self.first(x))))
        return self.head(jax.nn.relu(self.norm2(self.second(x))).mean((1, 2)))


def test_training_a_smaller_module():
    train_a_smaller(Dropped, side=8)


@pytest.mark.full
def test_training_a_smaller_resnet():
    train_a_smaller(partial(jx.nn.ResNet, 20), side=8)


@pytest.mark.full
def test_training_a_smaller_mobilenet():
    # On small images the variances of four samples make rounding errors grow with every step.
    train_a_smaller(partial(jx.nn.MobileNet, 10, width=0.25), side=64, rtol=1e-7)


def train_a_smaller(build: Callable, side: int, rtol: float = 1e-10) -> None:
    """Batch statistics, dropout and momentum: steps of the small one are those of the masked."""
    with jax.enable_x64(True):
        graph, state = nnx.split(build(rngs=nnx.Rngs(0)))
        model = nnx.merge(graph, doubled(state))
        fn, params = jx.functional(model)
        x = jax.random.normal(jax.random.key(1), (4, side, side, 3), jnp.float64)
        plan = jx.prune.plan(fn, params, x, ratio=0.5)
        zeroed: Any = fn.module(jx.prune.apply(params, plan.masks(params)))
        small: Any = plan.module(model)
        losses = [trained(net, x) for net in (small, zeroed)]
        np.testing.assert_allclose(*losses, rtol=rtol)
        _, after = jx.functional(small)
        _, wanted = jx.functional(zeroed)
        shrinking.close(after, plan.shrink(wanted), 10 * rtol)
        small.eval()
        zeroed.eval()
        shrinking.close(small(x), zeroed(x), 10 * rtol)


def trained(model: Any, x: jax.Array, steps: int = 4) -> list[float]:
    model.train()
    optimizer = nnx.Optimizer(model, optax.sgd(1e-2, momentum=0.9), wrt=nnx.Param)

    @nnx.jit
    def step(model: Any, optimizer: Any, x: jax.Array, labels: jax.Array) -> jax.Array:
        def loss(model: Any) -> jax.Array:
            losses = optax.softmax_cross_entropy_with_integer_labels(model(x), labels)
            return losses.mean()

        value, gradient = nnx.value_and_grad(loss)(model)
        optimizer.update(model, gradient)
        return value

    return [float(step(model, optimizer, x * k, jnp.arange(len(x)))) for k in range(1, steps + 1)]


def test_training_a_linen_network():
    """The whole step is rewritten: gradients, Adam's moments and statistics come out small."""
    with jax.enable_x64(True):
        fn, params = CASES["linen"].build()
        params, x = doubled(params), doubled(CASES["linen"].images())
        plan = jx.prune.plan(fn, params, x, ratio=0.5)
        step, state = adam_step(fn), optax.adam(1e-2).init(params["params"])
        small_step = jax.jit(plan.rewrite(step, argnums=(0, 1)))
        small, small_state = plan.shrink((params, state))
        zeroed = jx.prune.apply(params, plan.masks(params))
        for k in range(5):
            key = jax.random.key(k)
            small, small_state = small_step(small, small_state, key, x)
            zeroed, state = jax.jit(step)(zeroed, state, key, x)
        shrinking.close(small, plan.shrink(zeroed), 1e-10)
        shrinking.close(small_state, plan.shrink(state), 1e-10)


def adam_step(fn: Any) -> Callable:
    def step(params: Any, state: Any, key: jax.Array, x: jax.Array) -> Any:
        def loss(trained: Any) -> Any:
            outputs, updates = fn.train({**params, "params": trained}, key, x)
            labels = jnp.arange(len(x))
            losses = optax.softmax_cross_entropy_with_integer_labels(outputs, labels)
            return losses.mean(), updates

        gradient, updates = jax.grad(loss, has_aux=True)(params["params"])
        changes, state = optax.adam(1e-2).update(gradient, state, params["params"])
        return {"params": optax.apply_updates(params["params"], changes), **updates}, state

    return step


def test_functions_that_print(capsys):
    def fn(params: Any, x: jax.Array) -> jax.Array:
        hidden = jnp.tanh(x @ params["w"])
        jax.debug.print("first {}", hidden[0, 0])
        return hidden @ params["u"]

    params, x = {"w": normal(0, 3, 8), "u": normal(1, 8, 2)}, normal(2, 5, 3)
    plan = jx.prune.plan(fn, params, x, ratio=0.5)
    masked = jx.prune.apply(params, plan.masks(params))
    shrinking.close(plan.rewrite(fn)(plan.shrink(params), x), fn(masked, x), 2e-6)
    assert capsys.readouterr().out.count("first") == 2


def test_the_accelerator_trains_on():
    fn, params = CASES["linen"].build()
    x = CASES["linen"].images()
    plan = jx.prune.plan(fn, params, x, ratio=0.5)
    masks = plan.masks(params)
    small = (plan.rewrite(fn), plan.shrink(params)), optax.sgd(1e-2)
    masked = (fn, jx.prune.apply(params, masks)), optax.chain(optax.sgd(1e-2), jx.prune.keep(masks))
    after = []
    for model, optimizer in (small, masked):
        acc = jx.Accelerator(model, optimizer)
        acc.fit([(x, np.arange(4))], 2, progress=False)
        after.append(acc.params)
    shrinking.close(after[0], plan.shrink(after[1]), 1e-5)


NOTHING = "ignore:jx.fold.batchnorm. nothing to fold"


def composed(case: Case) -> None:
    """Fold, prune and prune again, in every order, under jit, grad and vmap."""
    fn, params = case.build()
    x = case.images()
    small = jx.prune.channels(fn, params, x, ratio=0.4)
    shrinking.check(*small, x)
    folded = jx.fold.batchnorm(*small, x)
    same(small, folded, x)
    first = jx.fold.batchnorm(fn, params, x)
    shrinking.check(*first, x)
    fn, params = first
    plan = jx.prune.plan(fn, params, x, ratio=0.4)
    mapped = jax.jit(jax.vmap(plan.rewrite(fn), (None, 0)), compiler_options=shrinking.QUICKLY)
    found = mapped(plan.shrink(params), x[:, None])[:, 0]
    shrinking.close(found, fn(jx.prune.apply(params, plan.masks(params)), x), 2e-5)


def same(one: tuple[Callable, Any], other: tuple[Callable, Any], x: Any) -> None:
    """Two functions have the same values and the same derivative by their input."""

    def both(fn: Callable, params: Any) -> Any:
        pull = jax.value_and_grad(lambda x: jnp.sin(fn(params, x)).sum())
        return jax.jit(pull, compiler_options=shrinking.QUICKLY)(x)

    shrinking.close(both(*other), both(*one), 2e-5)


@pytest.mark.filterwarnings(NOTHING)
@pytest.mark.parametrize("name", QUICK)
def test_composition(name):
    composed(CASES[name])


@pytest.mark.full
@pytest.mark.filterwarnings(NOTHING)
@pytest.mark.parametrize("name", [name for name in CASES if name not in QUICK])
def test_composition_over_the_zoo(name):
    composed(CASES[name])
