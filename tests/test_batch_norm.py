"""`jx.nn.BatchNorm` against Flax's, whose values it has in another order of operations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxaccel import nn
from tests.test_nn import build, images, randomise


def normalised(cls, x, options=(), **call):
    """Results, running statistics after two calls, and gradients; random scale and bias."""
    model = randomise(build(cls, x.shape[-1], **dict(options)))
    model.train()
    graphdef, *state = nnx.split(model, nnx.Param, nnx.BatchStat)
    wide = jnp.promote_types(x.dtype, jnp.float32)
    params, stats = jax.tree.map(lambda leaf: leaf.astype(wide), state)
    weights = images(*x.shape, seed=1).astype(x.dtype)

    def run(params, x):
        layer = nnx.merge(graphdef, params, stats, copy=True)
        layer(x, **call)
        y = layer(x, **call)
        return jnp.sum(y * weights), (y, nnx.state(layer, nnx.BatchStat))

    (_, found), grads = jax.value_and_grad(run, (0, 1), has_aux=True)(params, x)
    return [*jax.tree.leaves(found), *jax.tree.leaves(grads)]


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 2e-2), ("float64", 1e-12)]
)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_scale": False},
        {"use_bias": False, "momentum": 0.5, "epsilon": 0.1},
        {"dtype": jnp.bfloat16},
        {"use_fast_variance": False},
        {"axis": 0},
    ],
)
def test_batch_norm_is_that_of_flax(options, dtype, tolerance):
    with jax.enable_x64(dtype == "float64"):
        x = jnp.asarray(3 + 2 * images(4, 4, 5, 4), dtype)
        found, wanted = (
            normalised(cls, x, options=options) for cls in (nn.BatchNorm, nnx.BatchNorm)
        )
        tolerance = max(tolerance, 2e-2 if "dtype" in options else 0)
        assert len(found) == len(wanted)
        for own, flax in zip(found, wanted, strict=True):
            assert (own.dtype, own.shape) == (flax.dtype, flax.shape)
            own, flax = np.asarray(own, float), np.asarray(flax, float)
            np.testing.assert_allclose(own, flax, atol=tolerance * abs(flax).max())
        if {"use_fast_variance", "axis"} & set(options):
            jax.tree.map(np.testing.assert_array_equal, found, wanted)


def test_running_statistics_have_no_gradient():
    layer = build(nn.BatchNorm, 5)
    graphdef, state = nnx.split(layer)

    def moved(x):
        layer = nnx.merge(graphdef, state, copy=True)
        layer(x)
        return jnp.sum(layer.mean[...] + layer.var[...])

    value, gradient = jax.value_and_grad(moved)(images(8, 5))
    assert value != 5
    np.testing.assert_array_equal(gradient, 0)


def test_batch_norm_takes_a_mask_and_an_axis_name_as_flax_does():
    x, mask = images(8, 5), (jnp.arange(8) < 5)[:, None]
    masked = normalised(nn.BatchNorm, x, mask=mask)
    np.testing.assert_array_equal(masked[0], normalised(nnx.BatchNorm, x, mask=mask)[0])
    assert abs(masked[0] - normalised(nn.BatchNorm, x)[0]).max() > 0.1
    layer = lambda x: build(nn.BatchNorm, 5, axis_name="devices")(x)
    halves = jax.vmap(layer, axis_name="devices")(x.reshape(2, 4, 5))
    np.testing.assert_allclose(halves.reshape(8, 5), build(nn.BatchNorm, 5)(x), atol=1e-5)


def test_batch_norm_in_evaluation_is_that_of_flax():
    x, layer = images(8, 5), randomise(build(nn.BatchNorm, 5))
    before = jax.tree.map(np.asarray, nnx.state(layer))
    flax = randomise(build(nnx.BatchNorm, 5))
    np.testing.assert_array_equal(layer(x), flax(x))
    jax.tree.map(np.testing.assert_array_equal, nnx.state(layer), before)
    with pytest.raises(ValueError, match="use_running_average"):
        build(nn.BatchNorm, 5, use_running_average=None)(x)


@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
def test_it_promotes_as_it_is_told(dtype):
    def told(values, dtype=None):  # in Flax's order; nothing is promoted
        x, mean, var, scale, bias = values
        return x, mean, var, 2 * scale, bias

    x = images(8, 5).astype(jnp.float16)
    options = {"promote_dtype": told, "dtype": dtype}
    found, flax = (normalised(cls, x, options=options)[0] for cls in (nn.BatchNorm, nnx.BatchNorm))
    assert found.dtype == flax.dtype == (dtype or jnp.float32)
    np.testing.assert_allclose(found.astype(float), flax.astype(float), rtol=2e-2, atol=1e-3)


def test_other_channels_are_refused_as_by_flax():
    for cls in (nn.BatchNorm, nnx.BatchNorm):
        with pytest.raises((ValueError, TypeError)):
            build(cls, 8)(jnp.ones((4, 1)))


def test_in_training_it_is_not_the_code_of_flax():
    def program(cls):
        graphdef, state = nnx.split(build(cls, 5))
        return str(
            jax.make_jaxpr(lambda s, x: nnx.merge(graphdef, s, copy=True)(x))(state, images(8, 5))
        )

    assert "f32[8,5] = sub" in program(nnx.BatchNorm)
    assert "f32[8,5] = sub" not in program(nn.BatchNorm)
