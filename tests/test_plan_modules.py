"""A plan's modules and its files."""

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

import jaxaccel as jx
from tests import shrinking
from tests.models import LINEN, normal


class Two(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.hidden, self.out = nnx.Linear(3, 8, rngs=rngs), nnx.Linear(8, 2, rngs=rngs)
        self.dropout = nnx.Dropout(0.5)

    def width(self) -> int:
        return 8

    def features(self, x: jax.Array) -> jax.Array:
        return jax.nn.relu(self.hidden(x))

    def __call__(self, x: jax.Array, double: bool = False, rngs: Any = None) -> jax.Array:
        if double:
            return 2 * self(x)
        x = self.features(x)
        return self.out(x if rngs is None else self.dropout(x, rngs=rngs))


@pytest.fixture(scope="module")
def two() -> tuple[Any, Any, jx.prune.Plan]:
    """A model, the same with masked parameters, and the plan."""
    model = Two(nnx.Rngs(0))
    fn, params = jx.functional(model)
    plan = jx.prune.plan(fn, params, normal(0, 5, 3), ratio=0.5)
    return model, fn.module(jx.prune.apply(params, plan.masks(params))), plan


def test_module(two):
    model, masked, plan = two
    small, x = plan.module(model), normal(1, 5, 3)
    assert isinstance(small, Two)
    assert type(small).__name__ == "PrunedTwo"
    assert type(small) is type(plan.module(model))
    assert small.hidden.kernel.get_value().shape == (3, 4)
    assert model.hidden.kernel.get_value().shape == (3, 8)
    shrinking.close(small(x), masked(x), 1e-6)
    shrinking.close(nnx.jit(small)(x), masked(x), 1e-6)
    shrinking.close(small(x, double=True), masked(x, double=True), 1e-6)
    stays = plan.kept["params/out/kernel"][0]
    shrinking.close(small.features(x), masked.features(x)[:, stays], 1e-6)
    assert small.width() == 8
    fn, params = jx.functional(small)
    again = jx.prune.plan(fn, params, x, ratio=0.5)
    zeroed = fn.module(jx.prune.apply(params, again.masks(params)))
    shrinking.close(again.module(small)(x), zeroed(x), 1e-6)


def test_module_draws_from_the_streams_that_it_is_given(two):
    model, masked, plan = two
    small, x = plan.module(model), normal(1, 5, 3)
    streams, others = nnx.Rngs(dropout=3), nnx.Rngs(dropout=3)
    for _ in range(2):
        shrinking.close(small(x, rngs=streams), masked(x, rngs=others), 1e-6)
    assert int(streams.dropout.count.get_value()) == 2


class Counting(nnx.Module):
    """Makes a variable when first called, and counts."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.hidden, self.out = nnx.Linear(3, 8, rngs=rngs), nnx.Linear(8, 2, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = jnp.tanh(self.hidden(x))
        if not hasattr(self, "mean"):
            self.mean = nnx.BatchStat(jnp.zeros(8))
        self.mean.set_value(self.mean.get_value() + x.mean(0))
        return self.out(x)


def test_module_keeps_the_variables_that_a_call_makes():
    model, x = Counting(nnx.Rngs(0)), normal(1, 5, 3)
    fn, params = jx.functional(model)
    plan = jx.prune.plan(fn, params, x, ratio=0.5)
    small: Any = plan.module(model)
    small(x)
    masked: Any = fn.module(jx.prune.apply(params, plan.masks(params)))
    masked(x)
    stays = plan.kept["params/out/kernel"][0]
    shrinking.close(small.mean.get_value(), masked.mean.get_value()[stays], 1e-6)


jitted: Any = nnx.jit


class Odd(nnx.Module):
    """What modules do beside computing an output."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.hidden, self.out = nnx.Linear(3, 8, rngs=rngs), nnx.Linear(8, 2, rngs=rngs)
        self.shift, self.calls = jnp.ones(2), 0

    @jitted
    def __call__(self, x: jax.Array) -> jax.Array:
        hidden = jnp.tanh(self.hidden(x))
        return self.out(hidden / hidden.shape[-1]) + self.shift

    def changes(self, x: jax.Array) -> jax.Array:
        self.calls += 1
        self.shift = self.shift + x.mean()
        self.out.kernel.set_value(self.out.kernel.get_value() * 2)
        return self(x)

    def holds(self, x: jax.Array, *others: Any) -> jax.Array:
        metric, scale = others
        metric.update(values=x)
        scale.set_value(scale.get_value() + 1)
        return self(x) * scale.get_value()

    def trains(self, x: jax.Array, optimizer: nnx.Optimizer) -> jax.Array:
        optimizer.update(self, nnx.grad(lambda model: model(x).sum())(self))
        return self(x)

    @staticmethod
    def doubled(x: jax.Array) -> jax.Array:
        return 2 * x


def test_module_keeps_whatever_a_call_changes():
    model, x = Odd(nnx.Rngs(0)), normal(1, 5, 3)
    fn, params = jx.functional(model)
    plan = jx.prune.plan(fn, params, x, ratio=0.5)
    small: Any = plan.module(model)
    masked: Any = fn.module(jx.prune.apply(params, plan.masks(params)))
    shrinking.close(small(x), masked(x), 1e-6)
    for _ in range(2):
        shrinking.close(small.changes(x), masked.changes(x), 1e-6)
    assert (small.calls, masked.calls, model.calls) == (2, 2, 0)
    shrinking.close(jx.functional(small)[1], plan.shrink(jx.functional(masked)[1]), 1e-6)
    for model in (small, masked):
        metric, scale = nnx.metrics.Average(), nnx.Param(jnp.ones(()))
        shrinking.close(model.holds(x, metric, scale), 2 * masked(x), 1e-6)
        shrinking.close((metric.compute(), scale.get_value()), (x.mean(), jnp.array(2.0)), 1e-6)
    shrinking.close(small.doubled(x), 2 * x, 0)
    with pytest.raises(TypeError, match=r"Odd.trains takes an nnx.Optimizer.*write the step as"):
        small.trains(x, nnx.Optimizer(small, optax.sgd(0.1), wrt=nnx.Param))


def test_module_for_inference_is_changed_by_no_call(two):
    """So that it can be closed over, as the original can."""
    model, masked, plan = two
    x = normal(1, 5, 3)
    small: Any = plan.module(model)
    small.eval()
    masked = nnx.clone(masked)
    masked.eval()
    slope = jax.jit(jax.grad(lambda x: small(x).sum()))
    shrinking.close(slope(x), jax.grad(lambda x: masked(x).sum())(x), 1e-6)
    shrinking.close(jax.vmap(lambda x: small(x[None])[0])(x), masked(x), 1e-6)
    shrinking.close(nnx.jit(small)(x), masked(x), 1e-6)


def test_trees_of_nnx(two):
    model, _, plan = two
    small = plan.module(model)
    optimizer = nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)
    fresh = nnx.Optimizer(small, optax.adam(1e-3), wrt=nnx.Param)
    for tree, wanted in (
        (nnx.state(model), nnx.state(small)),
        (nnx.state(model, nnx.Param), nnx.state(small, nnx.Param)),
        (nnx.state(optimizer), nnx.state(fresh)),
    ):
        shrinking.close(plan.shrink(tree), wanted, 0)
    masks = plan.masks(nnx.state(model, nnx.Param))
    assert masks["hidden"]["kernel"].get_value().shape == (3, 8)


def test_module_refuses(made):
    fn, params, plan = made
    with pytest.raises(TypeError, match=r"takes a flax.nnx.Module, not LinenNet.*plan.rewrite"):
        plan.module(fn.module(params))
    with pytest.raises(ValueError, match="not a parameter of the plan"):
        plan.module(Two(nnx.Rngs(0)))


def test_a_plan_is_saved_and_loaded(made, tmp_path):
    fn, params, plan = made
    plan.save(tmp_path / "plan.json")
    again = jx.prune.Plan.load(tmp_path / "plan.json")
    assert str(again) == str(plan)
    assert (again.shapes, again.unmasked) == (plan.shapes, plan.unmasked)
    written = json.loads((tmp_path / "plan.json").read_text())
    stays = np.flatnonzero(np.asarray(plan.masks(params)["params"]["conv1"]["bias"])).tolist()
    assert written["kept"]["params/conv1/kernel"] == {"3": stays}
    shrinking.close(again.shrink(params), plan.shrink(params), 0)
    x = LINEN.images()
    shrinking.close(
        again.rewrite(fn)(again.shrink(params), x), plan.rewrite(fn)(plan.shrink(params), x), 0
    )
    assert [file.name for file in tmp_path.iterdir()] == ["plan.json"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff\xfe", "not a saved plan"),
        (b"{", "not a saved plan"),
        (b"[]", "has no format"),
        (b'{"format": "other"}', "has no format"),
        (b'{"format": "jaxaccel.prune.Plan", "version": 2}', "version 2 of the format"),
        (b'{"format": "jaxaccel.prune.Plan", "version": 1}', "damaged: KeyError"),
        (b"9" * 5000, "not a saved plan"),
    ],
)
def test_files_that_are_no_plan(tmp_path, content, message):
    path = tmp_path / "plan.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        jx.prune.Plan.load(path)


@given(data=st.data())
def test_damaged_files_are_refused_or_whole(made, tmp_path_factory, data):
    """Any value of the file replaced by another gives an error or a plan that is consistent."""
    plan = made[-1]
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    plan.save(path)
    content = json.loads(path.read_text())
    node: Any = content
    while True:
        key = data.draw(st.sampled_from(list(node if isinstance(node, dict) else range(len(node)))))
        if not (isinstance(node[key], dict | list) and node[key] and data.draw(st.booleans())):
            break
        node = node[key]
    value = data.draw(st.sampled_from([None, -1, 10**9, 1.5, "x", [], {}, True, node[key]]))
    if isinstance(node, dict) and data.draw(st.booleans()):
        del node[key]
        key = data.draw(st.sampled_from(["-1", "7", "01", "x", "params/conv1/bias"]))
    node[key] = value
    path.write_text(json.dumps(content))
    try:
        again = jx.prune.Plan.load(path)
    except ValueError:
        return
    for name, axes in again.kept.items():
        for axis, kept in axes.items():
            assert 0 <= axis < len(again.shapes[name])
            assert 0 < len(kept) <= again.shapes[name][axis]
            np.testing.assert_array_equal(kept, np.unique(kept))
            assert kept[-1] < again.shapes[name][axis]
    str(again)
    jax.eval_shape(again.rewrite(made[0]), again.shrink(made[1]), LINEN.images())
