"""jx.functional: the pure function against the Flax model it came from."""

from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import jaxaccel as jx
from jaxaccel._select import flatten
from tests.models import ZOO, LinenNet, tiers


def trees_equal(a, b) -> bool:
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


def small_model() -> nnx.Module:
    return jx.nn.ConvReLU(1, 3, batch_norm=True, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("case", tiers(ZOO[1:]))
def test_inference_equals_the_model(case):
    fn, params = case.build()
    x = case.images()
    model = fn.module(params)
    if isinstance(model, nnx.Module):
        model.eval()
        expected = nnx.jit(lambda model, x: model(x))(model, x)
    else:
        expected = jax.jit(lambda x: model(x))(x)
    np.testing.assert_allclose(jax.jit(fn)(params, x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", tiers(ZOO[1:]))
def test_training_updates_have_the_shapes_of_the_statistics(case):
    fn, params = case.build()
    _, updates = jax.jit(fn.train)(params, jax.random.key(0), case.images())
    kept = {name: tree for name, tree in params.items() if name != "params"}
    assert jax.tree.map(jnp.shape, updates) == jax.tree.map(jnp.shape, kept)
    for old, new in zip(jax.tree.leaves(kept), jax.tree.leaves(updates), strict=True):
        assert not np.array_equal(old, new)


def test_training_equals_the_model_in_training_mode():
    model = small_model()
    fn, params = jx.functional(model)
    x = jax.random.normal(jax.random.key(1), (4, 6, 6, 1))
    out, updates = jax.jit(fn.train)(params, jax.random.key(0), x)
    reference = nnx.clone(model)
    reference.train()
    np.testing.assert_allclose(out, reference(x), rtol=1e-6, atol=1e-6)
    _, stats = nnx.state(reference, nnx.Param, nnx.BatchStat)
    assert flatten(updates["batch_stats"]).keys() == flatten(nnx.to_pure_dict(stats)).keys()
    for new, expected in zip(
        jax.tree.leaves(updates), jax.tree.leaves(nnx.to_pure_dict(stats)), strict=True
    ):
        np.testing.assert_allclose(new, expected, rtol=1e-5, atol=1e-6)


def test_paths_read_as_the_architecture_says():
    _, params = jx.functional(jx.nn.ConvNet(rngs=nnx.Rngs(0)))
    assert "params/conv1/kernel" in flatten(params)
    assert set(params) == {"params"}
    _, params = jx.functional(small_model())
    assert set(params) == {"params", "batch_stats"}


def test_the_model_is_copied_not_changed():
    model = small_model()
    before = nnx.to_pure_dict(nnx.state(model))
    fn, params = jx.functional(model)
    fn.train(params, jax.random.key(0), jnp.ones((2, 4, 4, 1)))
    assert trees_equal(before, nnx.to_pure_dict(nnx.state(model)))


def test_round_trip_into_the_module():
    fn, params = jx.functional(small_model())
    changed = jax.tree.map(lambda x: x + 1, params)
    kept = jax.tree.map(jnp.copy, changed)
    module = fn.module(changed)
    assert isinstance(module, jx.nn.ConvReLU)
    assert trees_equal(jx.functional(module)[1], kept)
    module.train()
    module(jnp.ones((2, 4, 4, 1)))  # trains on, and leaves the given tree as it was
    assert trees_equal(changed, kept)


def test_keys_decide_dropout_typed_or_raw():
    fn, params = jx.functional(jx.nn.ConvNet(rngs=nnx.Rngs(0)))
    x = jnp.ones((2, 28, 28, 1))
    run = jax.jit(lambda key: fn.train(params, key, x)[0])
    assert np.array_equal(run(jax.random.key(1)), run(jax.random.key(1)))
    assert not np.array_equal(run(jax.random.key(1)), run(jax.random.key(2)))
    assert np.array_equal(run(jax.random.PRNGKey(1)), run(jax.random.key(1)))


def test_two_dropouts_draw_different_masks():
    class Two(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.a, self.b = nnx.Dropout(0.5, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)

        def __call__(self, x):
            return self.a(x), self.b(x)

    fn, params = jx.functional(Two(nnx.Rngs(0)))
    (a, b), _ = fn.train(params, jax.random.key(0), jnp.ones((4, 64)))
    assert not np.array_equal(a, b)


def test_stacked_layers_keep_a_key_each():
    class Layer(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.linear, self.dropout = nnx.Linear(4, 4, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)

        def __call__(self, x):
            return self.dropout(self.linear(x))

    class Stack(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            make = nnx.split_rngs(splits=3)(nnx.vmap(Layer))
            self.layers = make(rngs)

        def __call__(self, x):
            return nnx.vmap(lambda layer, x: layer(x), in_axes=(0, None))(self.layers, x)

    fn, params = jx.functional(Stack(nnx.Rngs(0)))
    x = jnp.ones((32, 4))
    out, _ = jax.jit(fn.train)(params, jax.random.key(0), x)
    assert out.shape == fn(params, x).shape == (3, 32, 4)
    assert not np.array_equal(out[0] == 0, out[1] == 0)


def test_shared_modules_and_other_collections():
    class Shared(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.layer = nnx.Linear(4, 4, rngs=rngs)
            self.again = self.layer
            self.calls = nnx.Cache(jnp.zeros(()))

        def __call__(self, x):
            self.calls[...] += 1
            return self.again(self.layer(x))

    fn, params = jx.functional(Shared(nnx.Rngs(0)))
    assert sorted(flatten(params)) == [
        "cache/calls",
        "params/again/bias",  # NNX names a shared module by its first attribute
        "params/again/kernel",
    ]
    _, updates = jax.jit(fn.train)(params, jax.random.key(0), jnp.ones((1, 4)))
    assert float(updates["cache"]["calls"]) == 1


def test_derivatives_and_vmap():
    fn, params = jx.functional(small_model())
    x = jax.random.normal(jax.random.key(0), (3, 2, 4, 4, 1))
    loss = lambda p, x: (fn({**params, "params": p}, x) ** 2).sum()
    gradients = jax.vmap(jax.grad(loss), (None, 0))(params["params"], x)
    one = jax.grad(loss)(params["params"], x[1])
    for a, b in zip(jax.tree.leaves(gradients), jax.tree.leaves(one), strict=True):
        np.testing.assert_allclose(a[1], b, rtol=1e-4, atol=1e-5)


def test_linen_modes():
    x = jnp.ones((1, 8, 8, 1))

    class Named(linen.Module):
        @linen.compact
        def __call__(self, x, deterministic: bool):
            return linen.Dropout(0.5, deterministic=deterministic)(x)

    fn, params = jx.functional(Named(), {})
    assert np.array_equal(fn(params, x), x)
    assert (fn.train(params, jax.random.key(0), x)[0] == 0).any()

    class Odd(linen.Module):
        @linen.compact
        def __call__(self, x, noisy: bool):
            return linen.Dropout(0.5, deterministic=not noisy)(x)

    fn, params = jx.functional(Odd(), {}, mode="noisy")
    assert np.array_equal(fn(params, x), x)
    assert (fn.train(params, jax.random.key(0), x)[0] == 0).any()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: jx.functional(cast(Any, dict)), TypeError, "takes a flax.nnx.Module or"),
        (lambda: jx.functional(LinenNet()), TypeError, "needs its variables: jx.functional"),
        (lambda: jx.functional(small_model(), {}), TypeError, "holds its own state"),
        (
            lambda: jx.functional(LinenNet(), {}, mode="trian"),
            TypeError,
            "mode='trian' is not an argument of LinenNet.__call__; its arguments are: .*train",
        ),
    ],
)
def test_bad_models(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_bad_trees_are_named_by_path():
    fn, params = jx.functional(small_model())
    x = jnp.ones((1, 4, 4, 1))
    with pytest.raises(ValueError, match="batch_stats/norm/mean: is missing from the given tree"):
        fn({"params": params["params"]}, x)
    extra = {**params, "params": {**params["params"], "conv9": jnp.ones(1)}}
    with pytest.raises(ValueError, match="params/conv9: is not a parameter of the model"):
        fn(extra, x)
    with pytest.raises(TypeError, match=r"params/conv/kernel: expected an array, got QTensor"):
        fn(jx.quantize.weights(params), x)
