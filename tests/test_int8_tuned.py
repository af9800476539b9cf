"""Networks of `jx.quantize.int8` in the forms for int8: the same outputs to the last bit."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

import jaxaccel as jx
from jaxaccel._forms import XLA, rule
from jaxaccel._graph import graph_of
from jaxaccel._tuned import by_rules, has_forms, op_of, untuned
from tests.models import filled, normal

LAYOUT = ("NHWC", "HWIO", "NHWC")


class ConvNet(nnx.Module):
    def __init__(self, rngs):
        self.conv1 = nnx.Conv(1, 6, (5, 5), rngs=rngs)
        self.conv2 = nnx.Conv(6, 24, (3, 3), strides=2, rngs=rngs)
        self.dense = nnx.Linear(24 * 9, 10, rngs=rngs)

    def __call__(self, x):
        x = nnx.max_pool(jax.nn.relu(self.conv1(x)), (2, 2), (2, 2))
        x = jax.nn.relu(self.conv2(x))
        return self.dense(x.reshape(x.shape[0], -1))


class Residual(nnx.Module):
    def __init__(self, rngs):
        self.stem = nnx.Conv(3, 20, (7, 7), strides=2, rngs=rngs)
        self.conv1 = nnx.Conv(20, 20, (3, 3), rngs=rngs)
        self.conv2 = nnx.Conv(20, 20, (3, 3), rngs=rngs)
        self.project = nnx.Conv(20, 32, (1, 1), strides=2, rngs=rngs)

    def __call__(self, x):
        x = nnx.max_pool(jax.nn.relu(self.stem(x)), (3, 3), (2, 2), "SAME")
        x = jax.nn.relu(x + self.conv2(jax.nn.relu(self.conv1(x))))
        return self.project(x).mean((1, 2))


class Separable(nnx.Module):
    def __init__(self, rngs):
        self.depthwise = nnx.Conv(3, 6, (3, 3), feature_group_count=3, rngs=rngs)
        self.pointwise = nnx.Conv(6, 20, (1, 1), rngs=rngs)
        self.strided = nnx.Conv(20, 20, (3, 3), strides=2, feature_group_count=20, rngs=rngs)
        self.grouped = nnx.Conv(20, 8, (3, 3), feature_group_count=4, rngs=rngs)

    def __call__(self, x):
        for layer in (self.depthwise, self.pointwise, self.strided, self.grouped):
            x = jax.nn.relu6(layer(x))
        return x.mean((1, 2))


FORMS = {
    ConvNet: {"banded 8", "maxima", "library"},
    Residual: {"columns 4", "maxima", "product"},
    Separable: {"shifted", "product", "block diagonal"},
}


def quantized(network, scales):
    module = nnx.eval_shape(lambda: network(nnx.Rngs(0)))
    fn, shapes = jx.functional(module)
    x = normal(1, 2, 12, 12, 1 if network is ConvNet else 3)
    fn, params = jx.quantize.int8(fn, filled(shapes), [(x,), (0.5 - x,)], scales=scales)
    return fn, params, x


@pytest.mark.parametrize(
    ("network", "scales"),
    [
        (Residual, "float"),
        *(pytest.param(ConvNet, s, marks=pytest.mark.full) for s in ("float", "power_of_two")),
        pytest.param(Residual, "power_of_two", marks=pytest.mark.full),
        *(pytest.param(Separable, s, marks=pytest.mark.full) for s in ("float", "power_of_two")),
    ],
)
def test_by_rules_the_outputs_are_the_same(network, scales):
    fn, params, x = quantized(network, scales)
    plain, ruled = untuned(fn), by_rules(fn)
    nodes = graph_of(ruled, params, x)[0].nodes
    assert {rule(op_of(n), "cpu") for n in nodes if has_forms(n)} - {XLA} == FORMS[network]
    np.testing.assert_array_equal(*jax.jit(lambda *args: (plain(*args), ruled(*args)))(params, x))


@pytest.mark.full
@pytest.mark.parametrize("network", FORMS)
def test_measured_the_outputs_are_the_same(network, tmp_path):
    fn, params, x = quantized(network, "float")
    fast = jx.autotune(fn, cache=tmp_path)
    np.testing.assert_array_equal(fast(params, x), jax.jit(untuned(fn))(params, x))
    assert {row.form for row in fast.report.rows} - {XLA}
    assert not any(row.dropped for row in fast.report.rows)


def test_padding_before_a_convolution():
    """XLA:CPU alone folds it into the convolution, which is then wrong."""
    conv = partial(lax.conv_general_dilated, window_strides=(1, 1), dimension_numbers=LAYOUT)

    def fn(params, x):
        x = jnp.pad(conv(x, params["a"], padding="SAME"), ((0, 0), (1, 1), (0, 0), (0, 0)))
        return conv(x, params["b"], padding="VALID")

    params, x = {"a": normal(0, 3, 3, 3, 20), "b": normal(1, 1, 3, 20, 8)}, normal(2, 2, 8, 8, 3)
    small, params = jx.quantize.int8(fn, params, [(x,), (-x,)], scales="power_of_two")
    with jax.disable_jit():
        expected = small(params, x)
    np.testing.assert_array_equal(jax.jit(small)(params, x), expected)
    np.testing.assert_array_equal(jax.jit(by_rules(small))(params, x), expected)
