"""The derivatives of `fake`: those of the function, straight through the rounding."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxaccel as jx
from tests.models import ZOO, normal
from tests.test_int8 import CONV, DENSE, IMAGES, X, averaged, conv, dense, ran

MANY = normal(5, 64, 6)
BIAS = {"a": {"kernel": normal(1, 6, 5), "bias": normal(3, 5)}, "b": {"kernel": normal(2, 5, 4)}}


@jax.custom_vjp
def straight(x):
    return jnp.tanh(x / 4)


straight.defvjp(lambda x: (straight(x), None), lambda _, g: (g,))


@jax.custom_jvp
def doubled(params, x):
    """With a layer in it, and a derivative of its own, which is another."""
    return jax.nn.relu(dense(params, jax.nn.relu(dense(params, x, "a")), "b"))


@doubled.defjvp
def _(primals, tangents):
    (params, x), (_, moved) = primals, tangents
    return doubled(params, x), 2 * jnp.sum(moved) * jnp.ones((len(x), 4))


@jax.custom_vjp
def tripled(params, x):
    return jax.nn.relu(dense(params, jax.nn.relu(dense(params, x, "a")), "b"))


tripled.defvjp(
    lambda params, x: (tripled(params, x), (params, x)),
    lambda kept, g: (jax.tree.map(jnp.zeros_like, kept[0]), 3 * g.sum() * jnp.ones_like(kept[1])),
)


def passed(params, x):
    return dense(params, straight(dense(params, x, "a")), "b")


def held(params, x):
    return dense(params, jax.checkpoint(lambda p, x: jax.nn.relu(dense(p, x, "a")))(params, x), "b")


def relus(params, x):
    y = jax.nn.relu(x @ params["a"]["kernel"] + params["a"]["bias"])
    return dense(params, y, "b")


def pooled(params, x):
    y = jax.nn.relu(conv(params, x, "c"))
    y = jax.nn.relu(y + jax.nn.relu(conv(params, y, "d")))
    y = jax.lax.reduce_window(y, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    return dense(params, y.mean((1, 2)), "f")


@pytest.mark.parametrize(
    ("fn", "params", "x"),
    [(passed, DENSE, MANY), (held, DENSE, MANY), (relus, BIAS, MANY), (pooled, CONV, IMAGES)],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_gradients_are_nearly_those_of_the_function(fn, params, x):
    qat = jx.quantize.fake(fn, params, [x], calibration="minmax")
    target = ran(fn, params, x) + normal(4, *ran(fn, params, x).shape)
    gradient = lambda f, p: jax.jit(jax.grad(lambda p: jnp.sum((f(p, x) - target) ** 2)))(p)
    found, expected = gradient(qat, qat.params)["weights"], gradient(fn, params)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert np.linalg.norm(a - b) <= 0.3 * np.linalg.norm(b)


@pytest.mark.parametrize(
    ("relu", "slope"), [(jax.nn.relu, 0.0), (lambda x: jnp.maximum(x, 0), 0.5)]
)
def test_a_relu_of_zero_has_the_slope_it_had(relu, slope):
    """Sums of integers are exactly zero often."""
    fn = lambda params, x: relu(x @ params["a"]["kernel"]) @ params["b"]["kernel"]
    params = {"a": {"kernel": jnp.zeros((6, 5))}, "b": DENSE["b"]}
    qat = jx.quantize.fake(fn, params, [X], calibration="minmax")
    gradient = jax.grad(lambda tree: qat(tree, X).sum())(qat.params)["weights"]
    expected = slope * X.sum(0)[:, None] * DENSE["b"]["kernel"].sum(1)
    np.testing.assert_allclose(gradient["a"]["kernel"], expected, rtol=0.05, atol=1e-6)


@pytest.mark.parametrize(("inner", "slope"), [(doubled, 2), (tripled, 3)])
def test_layers_in_a_function_with_its_own_derivative(inner, slope):
    """They are rounded as `int8` rounds; the derivative stays what it was."""
    fn = lambda params, x: inner(params, x) @ jnp.eye(4)
    qat = jx.quantize.fake(fn, DENSE, [X], calibration="minmax")
    small, new = qat.convert(qat.params)
    np.testing.assert_allclose(ran(qat, qat.params, X), ran(small, new, X), rtol=1e-5, atol=1e-6)
    value, moved = jax.jit(jax.value_and_grad(lambda x: qat(qat.params, x).sum()))(X)
    np.testing.assert_allclose(value, ran(small, new, X).sum(), rtol=1e-5)
    times = 12 if inner is tripled else 3 * 4
    np.testing.assert_allclose(moved, np.full(X.shape, slope * times), rtol=1e-5)


def test_checkpoints_stay():
    qat = jx.quantize.fake(held, DENSE, [X], calibration="minmax")
    text = str(jax.make_jaxpr(jax.grad(lambda tree: qat(tree, X).sum()))(qat.params))
    assert "remat" in text or "checkpoint" in text
    plain = jx.quantize.fake(
        lambda p, x: dense(p, jax.nn.relu(dense(p, x, "a")), "b"), DENSE, [X], calibration="minmax"
    )
    np.testing.assert_array_equal(ran(qat, qat.params, X), ran(plain, qat.params, X))


def test_bfloat16():
    fn, params = ZOO[1].build()  # convolutions, biases, batch norm
    x = ZOO[1].images()
    qat = jx.quantize.fake(fn, params, [x], calibration="minmax")
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), qat.params)
    found = ran(qat, half, x.astype(jnp.bfloat16))
    expected = ran(qat, qat.params, x)
    assert np.linalg.norm(found - expected) < 0.05 * np.linalg.norm(expected)


def test_the_accelerator_trains_in_bfloat16():
    net = lambda params, x: relus(params, x.reshape(len(x), -1))
    params = {"a": {"kernel": normal(0, 16, 5), "bias": normal(3, 5)}, "b": BIAS["b"]}
    images = np.random.default_rng(0).integers(0, 255, (8, 4, 4, 1), np.uint8)
    qat = jx.quantize.fake(net, params, [images / np.float32(255)])
    acc = jx.Accelerator((qat, qat.params), optax.sgd(1e-2), precision="bfloat16")
    acc.fit(jx.data.device_loader(jx.data.arrays(images, np.arange(8) % 3), 8), 1, progress=False)
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), acc.params, qat.params)
    assert all(jax.tree.leaves(moved)), moved
    assert {x.dtype for x in jax.tree.leaves(acc.params)} == {jnp.dtype(jnp.float32)}
    assert qat.convert(acc.params)[0].report.rows


def test_other_shapes_with_other_steps_are_refused():
    qat = jx.quantize.fake(averaged, CONV, [IMAGES], calibration="minmax")
    large = jnp.zeros((1, 200, 200, 4))  # too many to be summed on integers
    with pytest.raises(ValueError, match=r"quantize.fake of averaged.*has other steps than for"):
        jax.eval_shape(qat, qat.params, large)


def test_second_derivatives_of_the_rounding_are_zero():
    qat = jx.quantize.fake(relus, BIAS, [X], calibration="minmax")
    fn = lambda b: qat({**qat.params, "weights": BIAS | {"b": {"kernel": b}}}, X).sum()
    b = BIAS["b"]["kernel"]
    np.testing.assert_array_equal(jax.jit(jax.hessian(fn))(b), jnp.zeros((5, 4, 5, 4)))
