"""Each form against the op of XLA it stands for."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

from jaxaccel import _forms

LAYOUT = ("NHWC", "HWIO", "NHWC")


def names(fn, *args) -> list[str]:
    return [eqn.primitive.name for eqn in jax.make_jaxpr(fn)(*args).eqns]


def pair(channels: int, *, strides=(1, 1), padding="SAME", dilation=(1, 1)):
    """(the form, XLA's op) as functions of images and kernel."""

    def call(op):
        return lambda x, kernel: op(
            x,
            kernel,
            strides,
            padding,
            rhs_dilation=dilation,
            dimension_numbers=LAYOUT,
            feature_group_count=channels,
        )

    return call(_forms.depthwise_conv), call(lax.conv_general_dilated)


def operands(size, kernel, *, channels=2, multiplier=1, batch=2, dtype=None, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(batch, *size, channels))
    return jnp.asarray(x, dtype), jnp.asarray(
        rng.normal(size=(*kernel, 1, channels * multiplier)), dtype
    )


def value_and_pullback(f, *args):
    """Outputs, and the cotangents of `args` for one fixed cotangent of the output."""
    out = jax.eval_shape(f, *args)
    g = jnp.asarray(np.random.default_rng(1).normal(size=out.shape), out.dtype)

    @jax.jit
    def run(*args):
        out, pullback = jax.vjp(f, *args)
        return out, pullback(g)

    return run(*args)


def close(actual, expected, tol=1e-11):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=tol, atol=tol), actual, expected
    )


CASES = {
    "same": ((9, 7), (3, 3), {}),
    "valid 5x5": ((11, 12), (5, 5), {"padding": "VALID"}),
    "stride 2": ((9, 8), (3, 3), {"strides": (2, 2)}),
    "stride 3 1": ((10, 6), (2, 3), {"strides": (3, 1), "padding": "VALID"}),
    "stride over kernel": ((11, 9), (2, 1), {"strides": (4, 3), "padding": "VALID"}),
    "dilated": ((10, 11), (3, 2), {"dilation": (2, 3)}),
    "dilated and strided": ((12, 11), (3, 3), {"dilation": (2, 1), "strides": (2, 3)}),
    "explicit": ((6, 6), (3, 3), {"padding": ((0, 3), (2, 1))}),
    "negative": ((9, 9), (3, 3), {"padding": ((-1, 0), (1, -2)), "strides": (2, 1)}),
    "more padding than kernel": ((3, 3), (2, 2), {"padding": ((4, 5), (3, 2))}),
    "same lower": ((8, 8), (4, 4), {"padding": "SAME_LOWER", "strides": (2, 2)}),
    "many rows": ((21, 4), (3, 3), {}),
    "one pixel": ((1, 1), (1, 1), {}),
}


@pytest.mark.parametrize("multiplier", [1, 3])
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_equal_the_convolution(name, multiplier):
    size, kernel, window = CASES[name]
    with jax.enable_x64(True):
        args = operands(size, kernel, multiplier=multiplier)
        form, plain = pair(2, **window)
        assert "conv_general_dilated" not in names(form, *args)
        close(value_and_pullback(form, *args), value_and_pullback(plain, *args))


@pytest.mark.parametrize(
    "window", [{"strides": (2, 1)}, {"padding": ((-1, 2), (1, 0)), "dilation": (1, 2)}]
)
def test_forward_mode_and_second_order_equal_the_convolution(window):
    size, kernel = (4, 5), (2, 2)
    with jax.enable_x64(True):
        args, tangents = operands(size, kernel), operands(size, kernel, seed=2)
        form, plain = pair(2, **window)
        forward = lambda f: jax.jit(lambda: jax.jvp(f, args, tangents))()
        close(forward(form), forward(plain))

        def second(f):
            grad = jax.grad(lambda x, k: jnp.sin(f(x, k)).sum(), argnums=(0, 1))
            reverse = jax.grad(lambda x, k: sum((g**2).sum() for g in grad(x, k)), argnums=(0, 1))
            return jax.jvp(grad, args, tangents)[1], reverse(*args)

        close(second(form), second(plain), 1e-9)


@pytest.mark.parametrize("axes", [(0, None), (None, 0), (0, 0), (3, 1)])
def test_vmap_of_gradients_equals_a_loop(axes):
    with jax.enable_x64(True):
        form, plain = pair(2, strides=(2, 1))
        many = [operands((6, 5), (3, 3), seed=seed) for seed in range(3)]
        x, kernel = (
            many[0][i] if axis is None else jnp.stack([pair[i] for pair in many], axis)
            for i, axis in enumerate(axes)
        )
        grad = jax.grad(lambda x, k: jnp.sin(form(x, k)).sum(), argnums=(0, 1))
        reference = jax.grad(lambda x, k: jnp.sin(plain(x, k)).sum(), argnums=(0, 1))
        picks = [
            [many[0 if axis is None else j][i] for i, axis in enumerate(axes)] for j in range(3)
        ]
        loop = [jax.jit(reference)(*args) for args in picks]
        close(
            jax.jit(jax.vmap(grad, axes))(x, kernel), jax.tree.map(lambda *g: jnp.stack(g), *loop)
        )


@settings(max_examples=12)
@given(
    size=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    strides=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    padding=st.sampled_from(["SAME", "VALID", ((1, 0), (0, 2))]),
    channels=st.integers(1, 3),
    multiplier=st.integers(1, 2),
    batch=st.integers(0, 2),
)
def test_any_window_equals_the_convolution(
    size, kernel, strides, dilation, padding, channels, multiplier, batch
):
    with jax.enable_x64(True):
        args = operands(size, kernel, channels=channels, multiplier=multiplier, batch=batch)
        form, plain = pair(channels, strides=strides, padding=padding, dilation=dilation)
        if plain(*args).size:
            close(value_and_pullback(form, *args), value_and_pullback(plain, *args))
        else:
            assert form(*args).shape == plain(*args).shape


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_accumulates_in_float32(dtype):
    args = operands((24, 24), (5, 5), dtype=dtype, channels=3)
    form, plain = pair(3, padding="VALID")
    wide = [x.astype(jnp.float32) for x in args]
    out, grads = value_and_pullback(lambda x, k: form(x, k).astype(jnp.float32), *args)
    exact, exact_grads = value_and_pullback(plain, *wide)
    assert form(*args).dtype == dtype
    # One rounding of the exact sum: adding hundreds of terms in half would lose far more.
    tol = float(jnp.finfo(dtype).eps)
    close(out, exact.astype(dtype).astype(jnp.float32), tol)
    assert [g.dtype for g in grads] == [dtype, dtype]
    # The cotangent is rounded on its way in as well, hence a little more than one unit.
    for actual, expected in zip(grads, exact_grads, strict=True):
        scale = float(jnp.abs(expected).max())
        assert float(jnp.abs(actual.astype(jnp.float32) - expected).max()) < tol * scale


def test_the_result_has_the_preferred_dtype():
    x, kernel = operands((5, 5), (3, 3), dtype=jnp.bfloat16)
    options = {"dimension_numbers": LAYOUT, "feature_group_count": 2}
    wide = _forms.depthwise_conv(
        x, kernel, (1, 1), "SAME", preferred_element_type=jnp.float32, **options
    )
    exact = lax.conv_general_dilated(
        x.astype(jnp.float32), kernel.astype(jnp.float32), (1, 1), "SAME", **options
    )
    assert wide.dtype == jnp.float32
    close(wide, exact, 1e-5)


def test_other_convolutions_are_xlas():
    x, kernel = operands((6, 6), (3, 3))

    def primitives(x=x, kernel=kernel, layout=LAYOUT, groups=2, **options):
        def conv(x, kernel):
            return _forms.depthwise_conv(
                x,
                kernel,
                (1, 1),
                ((1, 1), (1, 1)),
                dimension_numbers=layout,
                feature_group_count=groups,
                **options,
            )

        return names(conv, x, kernel)

    assert "conv_general_dilated" not in primitives()
    assert primitives(lhs_dilation=(2, 1)) == ["conv_general_dilated"]
    assert primitives(groups=1, kernel=jnp.ones((3, 3, 2, 4))) == ["conv_general_dilated"]
    assert primitives(x=jnp.ones((2, 6, 6, 4)), kernel=jnp.ones((3, 3, 2, 4))) == [
        "conv_general_dilated"
    ]
    assert primitives(x=jnp.ones((2, 6, 6, 2), jnp.int32), kernel=jnp.ones((3, 3, 1, 2), int)) == [
        "conv_general_dilated"
    ]
    assert primitives(kernel=jnp.ones((8, 8, 1, 2))) == ["conv_general_dilated"]
    assert primitives(x=jnp.moveaxis(x, 3, 1), layout=("NCHW", "HWIO", "NCHW")) == [
        "conv_general_dilated"
    ]


def test_other_backends_get_xlas_ops(monkeypatch):
    x, kernel = operands((6, 6), (3, 3))
    form, _ = pair(2)
    assert "reduce_window_max" not in names(lambda x: _forms.max_pool(x, 2), x)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert names(form, x, kernel) == ["conv_general_dilated"]
    assert names(lambda x: _forms.max_pool(x, 2), x) == ["reduce_window_max"]


def test_wrong_shapes_are_refused_as_by_xla():
    x, kernel = jnp.ones((1, 4, 4, 3)), jnp.ones((3, 3, 1, 4))
    form, plain = pair(3)
    with pytest.raises(ValueError, match="feature_group_count") as expected:
        plain(x, kernel)
    with pytest.raises(ValueError, match="feature_group_count") as met:
        form(x, kernel)
    assert str(met.value) == str(expected.value)


def xla_max_pool(x, window):
    square = (1, window, window, 1)
    return lax.reduce_window(x, -jnp.inf, lax.max, square, square, "VALID")


@settings(max_examples=12)
@given(
    shape=st.tuples(st.integers(1, 2), st.integers(1, 9), st.integers(1, 9), st.integers(1, 3)),
    window=st.integers(1, 4),
    seed=st.integers(0, 99),
)
def test_pooling_equals_reduce_window_also_on_ties(shape, window, seed):
    # Three values only, half of them zero: nearly every square has a tie.
    x = jnp.asarray(np.random.default_rng(seed).choice([0.0, 0.0, 1.0, -1.0], shape), jnp.float32)
    form, plain = (lambda x: _forms.max_pool(x, window)), (lambda x: xla_max_pool(x, window))
    if plain(x).size:
        close(value_and_pullback(form, x), value_and_pullback(plain, x), 0)
    else:
        assert form(x).shape == plain(x).shape


def test_pooling_of_equal_values_sends_the_gradient_to_the_first():
    grad = jax.grad(lambda x: _forms.max_pool(x, 2).sum())(jnp.zeros((1, 5, 2, 1)))
    expected = np.zeros((1, 5, 2, 1))
    expected[0, [0, 2], 0, 0] = 1
    np.testing.assert_array_equal(grad, expected)


def test_pooling_keeps_nan_and_dtype():
    x = jnp.ones((1, 4, 4, 1), jnp.bfloat16).at[0, 0, 1, 0].set(jnp.nan).at[0, 3, 3, 0].set(2)
    out = _forms.max_pool(x, 2)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_array_equal(
        np.asarray(out, np.float32)[0, :, :, 0], [[np.nan, 1.0], [1.0, 2.0]]
    )


def test_pooling_composes_with_transformations():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 2, 5, 4, 2)), jnp.float32)
    dx = jnp.asarray(np.random.default_rng(1).normal(size=x.shape), jnp.float32)

    def derivatives(pool):
        grad = jax.grad(lambda x: jnp.sin(pool(x)).sum())
        second = lambda x, dx: jax.jvp(grad, (x,), (dx,))[1]
        forward = lambda x, dx: jax.jvp(pool, (x,), (dx,))
        return jax.jit(lambda: (jax.vmap(grad)(x), second(x[0], dx[0]), forward(x[0], dx[0])))()

    close(
        derivatives(lambda x: _forms.max_pool(x, 2)),
        derivatives(lambda x: xla_max_pool(x, 2)),
        1e-6,
    )


def test_pooling_needs_a_window():
    with pytest.raises(ValueError, match=r"window: 0 is below 1; give the side of the square"):
        _forms.max_pool(jnp.ones((1, 2, 2, 1)), 0)


def test_the_forms_do_not_import_flax():
    code = "import jaxaccel._forms, sys; sys.exit('flax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
