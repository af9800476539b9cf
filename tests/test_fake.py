"""Quantization-aware training: the gradients, the conversion, and training itself."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

import jaxaccel as jx
from jaxaccel.quantize._straight import rounded
from tests.int8_checks import all_exact
from tests.models import ZOO, normal
from tests.test_int8 import (
    CONV,
    DENSE,
    IMAGES,
    RNN,
    X,
    conv,
    dense,
    dense_average,
    joined,
    ran,
    residual,
    rnn,
)
from tests.test_int8 import snr as decibels

SCALES = pytest.mark.parametrize("scales", ["float", "power_of_two"])


@given(st.floats(-3, 3, width=32), st.floats(0.0625, 1, width=32), st.integers(1, 50))
def test_gradients_are_those_of_learned_steps(x, scale, terms):
    """Esser et al., equations 2, 3 and 5, in Python numbers."""
    low, high, ratio = -7, 7, np.float32(x) / np.float32(scale)
    found = jax.jacobian(lambda x, s: rounded(x, s, low, high, terms), (0, 1))(
        jnp.float32(x), jnp.float32(scale)
    )
    inside = low < ratio < high
    if min(abs(ratio - low), abs(ratio - high), abs(ratio % 1 - 0.5)) < 1e-3:
        return  # at a tie
    step = np.round(ratio) - ratio if inside else (low if ratio < low else high)
    np.testing.assert_allclose(found[0], float(inside))
    np.testing.assert_allclose(found[1], step / np.sqrt(terms * 127), rtol=1e-3, atol=1e-5)
    value = np.clip(np.round(ratio), low, high) * scale
    np.testing.assert_allclose(rounded(jnp.float32(x), jnp.float32(scale), low, high, terms),
                               value, rtol=1e-5, atol=1e-6)  # fmt: skip


def added(params, x):
    """Sums whose rescaling by one bit makes every second number a tie."""
    y = jax.nn.relu(conv(params, x, "c"))
    z = jax.nn.relu(y + jax.nn.relu(conv(params, y, "d")))
    return dense(params, y + conv(params, z, "e"), "f")


@SCALES
@pytest.mark.parametrize(
    ("fn", "params", "x"),
    [
        (dense_average, DENSE, X),
        (residual, CONV, IMAGES),
        (added, CONV, IMAGES),
        (joined, CONV, IMAGES),
        (lambda p, xs: rnn(p, xs)[0], RNN, normal(7, 4, 3, 6)),
        (*ZOO[1].build(), ZOO[1].images()),
    ],
    ids=["dense", "residual", "added", "joined", "rnn", "linen"],
)
def test_it_computes_what_int8_computes(fn, params, x, scales):
    qat = jx.quantize.fake(fn, params, [x], calibration="minmax", scales=scales)
    small, new = qat.convert(qat.params)
    own, expected = jx.quantize.int8(fn, params, [x], calibration="minmax", scales=scales)
    assert str(own.report) == str(small.report)
    jax.tree.map(np.testing.assert_array_equal, new, expected)
    assert decibels(ran(qat, qat.params, x), ran(small, new, x)) > 50  # biases in whole steps


def test_the_largest_weight_of_a_channel_is_not_clipped():
    x = normal(1, 3, 3, 3, 64)
    scale = jnp.abs(x).max((0, 1, 2), keepdims=True) / 127
    scale = jnp.where(jnp.abs(x / scale).max((0, 1, 2)) > 127, jnp.nextafter(scale, 1), scale)
    gradient = jax.jit(jax.grad(lambda x: rounded(x, scale, -127, 127, 27).sum()))(x)
    np.testing.assert_allclose(gradient, jnp.ones_like(x), rtol=1e-6)


@SCALES
def test_training_lowers_the_loss_and_moves_the_steps(scales):
    target = normal(9, 3, 4)
    qat = jx.quantize.fake(dense_average, DENSE, [X], scales=scales)
    loss = lambda tree: jnp.mean((qat(tree, X) - target) ** 2)
    optimizer, tree = optax.adam(3e-2), qat.params
    state = optimizer.init(tree)

    @jax.jit
    def step(tree, state):
        value, gradients = jax.value_and_grad(loss)(tree)
        updates, state = optimizer.update(gradients, state, tree)
        return optax.apply_updates(tree, updates), state, value

    first = loss(tree)
    for _ in range(60):
        tree, state, _ = step(tree, state)
    value = loss(tree)
    assert value < first / 5
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), tree["scales"], qat.params["scales"])
    assert all(jax.tree.leaves(moved))
    small, new = qat.convert(tree)
    all_exact(small, new, X)
    assert jnp.mean((small(new, X) - target) ** 2) < 1.2 * value + 1e-3
    if scales == "power_of_two":
        steps = np.log2([row.data.scale for row in small.report.rows if row.data])
        np.testing.assert_array_equal(steps, np.round(steps))


def test_the_accelerator_trains_the_steps_too():
    def net(params, x):
        hidden = jax.nn.relu(x.reshape(len(x), -1) @ params["a"]["kernel"])
        return hidden @ params["b"]["kernel"]

    params = {"a": {"kernel": normal(0, 16, 8)}, "b": {"kernel": normal(1, 8, 3)}}
    images = np.random.default_rng(0).integers(0, 255, (8, 4, 4, 1), np.uint8)
    qat = jx.quantize.fake(net, params, [images / np.float32(255)])
    acc = jx.Accelerator((qat, qat.params), optax.sgd(1e-2))
    acc.fit(jx.data.device_loader(jx.data.arrays(images, np.arange(8) % 3), 8), 1, progress=False)
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), acc.params, qat.params)
    assert all(jax.tree.leaves(moved)), moved
    assert qat.convert(acc.params)[0].report.rows


def test_where_and_the_tree():
    qat = jx.quantize.fake(dense_average, DENSE, [X], where="a*")
    assert list(qat.params["scales"]["kernels"]) == ["a/kernel"]
    assert repr(qat) == "<jx.quantize.fake of dense_average: 1 kernels, 1 grids>"
    with pytest.raises(ValueError, match=r"expected a tree like its params, .* train qat_fn.para"):
        qat(DENSE, X)
    with pytest.raises(ValueError, match=r"a/kernel: holds NaN or infinity"):
        qat.convert(jax.tree.map(lambda x: x * jnp.nan, qat.params))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scales": "log"}, "scales='log' must be one of"),
        ({"calibration": "max"}, "calibration='max' must be one of"),
        ({"batches": []}, "batches: is empty"),
        ({"params": jx.quantize.weights(DENSE)}, "a/kernel: is a QTensor already"),
        ({"where": lambda path, leaf: False}, "fn has no convolution or dot product to quantize"),
    ],
)
def test_bad_input(change, message):
    with pytest.raises(ValueError, match=message):
        jx.quantize.fake(**{"fn": dense_average, "params": DENSE, "batches": [X]} | change)
