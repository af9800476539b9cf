"""Distillation losses against float64 sums in Python."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import jaxaccel as jx
from tests import oracles


@given(st.integers(1, 5), st.integers(2, 6), st.floats(0.5, 20), st.floats(0, 1), st.data())
def test_against_the_reference(batch, classes, temperature, alpha, data):
    logits = hnp.arrays(np.float32, (batch, classes), elements=st.floats(-8, 8, width=32))
    student, teacher = data.draw(logits), data.draw(logits)
    labels = data.draw(hnp.arrays(np.int32, batch, elements=st.integers(0, classes - 1)))
    values = jx.distill.loss(
        jnp.asarray(student), jnp.asarray(teacher), jnp.asarray(labels),
        temperature=temperature, alpha=alpha, reduction="none",
    )  # fmt: skip
    expected = oracles.distillation(student, teacher, labels, temperature, alpha)
    np.testing.assert_allclose(values, expected, rtol=2e-4, atol=2e-4 * max(1, temperature**2))
    mean = jx.distill.loss(
        jnp.asarray(student), jnp.asarray(teacher), jnp.asarray(labels),
        temperature=temperature, alpha=alpha,
    )  # fmt: skip
    np.testing.assert_allclose(mean, values.mean(), rtol=1e-5, atol=1e-6)


def example():
    keys = jax.random.split(jax.random.key(0), 3)
    student, teacher = (3 * jax.random.normal(k, (6, 5)) for k in keys[:2])
    return student, teacher, jax.random.randint(keys[2], (6,), 0, 5)


def test_alpha_zero_is_the_cross_entropy():
    student, teacher, labels = example()
    expected = optax.softmax_cross_entropy_with_integer_labels(student, labels).mean()
    np.testing.assert_allclose(
        jx.distill.loss(student, teacher, labels, alpha=0.0), expected, rtol=1e-6
    )


def test_gradient_reaches_the_student_alone_and_keeps_its_size():
    student, teacher, labels = example()
    loss = lambda s, t, temperature: jx.distill.loss(
        s, t, labels, temperature=temperature, alpha=1.0
    )
    assert not jax.grad(loss, 1)(student, teacher, 4.0).any()
    norms = [float(jnp.linalg.norm(jax.grad(loss)(student, teacher, t))) for t in (20.0, 40.0)]
    # Without the factor T² the second would be a quarter of the first.
    assert 0.9 < norms[1] / norms[0] < 1.1


def test_attention_transfer_against_numpy():
    keys = jax.random.split(jax.random.key(0), 2)
    student = jax.random.normal(keys[0], (3, 4, 5, 2))
    teacher = jax.random.normal(keys[1], (3, 4, 5, 7))
    maps = []
    for features in (np.asarray(student, np.float64), np.asarray(teacher, np.float64)):
        energy = (features**2).sum(-1).reshape(3, -1)
        maps.append(energy / np.linalg.norm(energy, axis=1, keepdims=True))
    expected = ((maps[0] - maps[1]) ** 2).sum(1)
    values = jx.distill.attention_transfer(student, teacher, reduction="none")
    np.testing.assert_allclose(values, expected, rtol=1e-5)
    np.testing.assert_allclose(
        jx.distill.attention_transfer(student, teacher), expected.mean(), rtol=1e-5
    )


def test_attention_gradient_is_finite_on_dead_features():
    zero = jnp.zeros((2, 3, 3, 4))
    gradient = jax.grad(jx.distill.attention_transfer)(zero, zero + 1)
    assert jnp.isfinite(gradient).all()
    assert not jax.grad(jx.distill.attention_transfer, 1)(zero + 1, zero + 2).any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0}, "temperature=0 must be > 0"),
        ({"temperature": float("nan")}, "temperature=nan must be > 0"),
        ({"alpha": 1.5}, r"alpha=1.5 must lie in \[0, 1\]"),
        ({"reduction": "sum"}, "reduction='sum' must be"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        jx.distill.loss(*example(), **options)


def test_bad_shapes():
    student, teacher, labels = example()
    with pytest.raises(ValueError, match=r"student logits \(6, 5\) and teacher logits \(6, 4\)"):
        jx.distill.loss(student, teacher[:, :4], labels)
    with pytest.raises(ValueError, match=r"student features \(1, 2, 2, 3\) and teacher features"):
        jx.distill.attention_transfer(jnp.ones((1, 2, 2, 3)), jnp.ones((1, 4, 4, 3)))
