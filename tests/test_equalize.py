"""Cross-layer equalization: the same function, like ranges, and the case that needs it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxaccel as jx
from tests.models import ZOO, normal
from tests.test_int8 import CONV, DENSE, IMAGES, X, conv, dense, ran, residual, snr

SEPARABLE = next(case for case in ZOO if case.name == "separable")


@pytest.mark.parametrize(("name", "pairs"), [("mlp", 2), ("convnet", 3), ("separable", 4)])
def test_the_same_function(name, pairs):
    case = next(case for case in ZOO if case.name == name)
    fn, params = case.build()
    x = case.images()
    same, new = jx.quantize.equalize(fn, params, [x])
    assert len(same.report.pairs) == pairs
    assert all(row.after < row.before for row in same.report.pairs)
    np.testing.assert_allclose(ran(same, new, x), ran(fn, params, x), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(
        ran(same, new, -2 * x), ran(fn, params, -2 * x), rtol=1e-3, atol=1e-4
    )


def hard():
    """A network in which the ranges of a depthwise convolution's channels differ 1000-fold."""
    fn, params = SEPARABLE.build()
    inner = params["params"]["conv2"]
    factors = jnp.logspace(-1.5, 1.5, inner["depthwise"]["kernel"].shape[-1])
    depthwise = {**inner["depthwise"], "kernel": inner["depthwise"]["kernel"] * factors}
    if "bias" in depthwise:
        depthwise["bias"] = depthwise["bias"] * factors
    pointwise = {
        **inner["pointwise"],
        "kernel": inner["pointwise"]["kernel"] / factors.reshape(1, 1, -1, 1),
    }
    conv2 = {**inner, "depthwise": depthwise, "pointwise": pointwise}
    return fn, params | {"params": {**params["params"], "conv2": conv2}}


def test_minmax_alone_fails_where_ranges_differ_and_equalization_brings_it_back():
    fn, params = hard()
    x = SEPARABLE.images()
    real = ran(fn, params, x)
    np.testing.assert_allclose(real, fn(SEPARABLE.build()[1], x), rtol=1e-3, atol=1e-4)
    small, new = jx.quantize.int8(fn, params, [x], calibration="minmax")
    assert snr(ran(small, new, x), real) < 25
    same, params = jx.quantize.equalize(fn, params, [x])
    small, new = jx.quantize.int8(same, params, [x], calibration="minmax")
    assert snr(ran(small, new, x), real) > 40


def limited(params, x):
    return dense(params, jax.nn.relu6(dense(params, x, "a")), "b")


def bent(params, x):
    return dense(params, jnp.tanh(dense(params, x, "a")), "b")


def read_twice(params, x):
    y = jax.nn.relu(dense(params, x, "a"))
    return dense(params, y, "b") + y[:, :4]


@pytest.mark.parametrize("shape", [(), (1,)])
def test_a_bias_of_all_channels_together(shape):
    params = DENSE | {"bias": jnp.ones(shape)}
    fn = lambda p, x: dense(p, jax.nn.relu(dense(p, x, "a") + p["bias"]), "b")
    same, new = jx.quantize.equalize(fn, params, [X])
    assert same.report.pairs == ()
    assert all(map(np.array_equal, jax.tree.leaves(new), jax.tree.leaves(params)))


@pytest.mark.parametrize("fn", [limited, bent, read_twice])
def test_no_factor_passes(fn):
    same, new = jx.quantize.equalize(fn, DENSE, [X])
    assert same.report.pairs == ()
    assert all(map(np.array_equal, jax.tree.leaves(new), jax.tree.leaves(DENSE)))


def test_not_through_a_residual_addition():
    same, _ = jx.quantize.equalize(residual, CONV, [IMAGES])
    assert same.report.pairs == ()


def test_dead_channels_stay():
    params = DENSE | {"a": {"kernel": normal(0, 6, 5).at[:, 1].set(0)}}
    fn = lambda params, x: dense(params, jax.nn.relu(dense(params, x, "a")), "b")
    same, new = jx.quantize.equalize(fn, params, [X])
    assert np.isfinite(new["b"]["kernel"]).all()
    np.testing.assert_array_equal(new["b"]["kernel"][1], params["b"]["kernel"][1])
    np.testing.assert_allclose(ran(same, new, X), ran(fn, params, X), rtol=1e-5)


def test_through_poolings_and_reshapes():
    def fn(params, x):
        y = conv(params, x, "c")
        y = jax.lax.reduce_window(y, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
        y = jax.nn.relu(conv(params, jax.nn.relu(y), "d"))
        return y.reshape(len(y), -1) @ params["g"] + y.mean((1, 2)).sum()

    params = CONV | {"g": normal(1, 36, 3)}
    same, new = jx.quantize.equalize(fn, params, [IMAGES])
    assert [row[:2] for row in same.report.pairs] == [("c/kernel", "d/kernel")]
    np.testing.assert_allclose(
        ran(same, new, IMAGES), ran(fn, params, IMAGES), rtol=1e-4, atol=1e-5
    )


def test_the_report():
    same, _ = jx.quantize.equalize(
        lambda p, x: dense(p, jax.nn.relu(dense(p, x, "a")), "b"), DENSE, [X]
    )
    assert str(same.report).splitlines()[0].split() == (
        ["layer", "is", "read", "by", "ratio", "of", "ranges", "after"]
    )
    assert repr(same) == "<jx.quantize.equalize of <lambda>: 1 pairs>"
