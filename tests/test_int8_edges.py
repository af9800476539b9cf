"""int8 at the ends of what its integers hold: tensors of zeros, bounds off a grid, long shifts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxaccel as jx
from jaxaccel.quantize._arithmetic import Clip, fixed, rescaled
from tests.int8_checks import all_exact
from tests.models import normal
from tests.test_int8 import (
    CONV,
    DENSE,
    IMAGES,
    X,
    attention,
    conv,
    dense,
    dense_average,
    ran,
    residual,
    snr,
)

SCALES = pytest.mark.parametrize("scales", ["float", "power_of_two"])


def int8(fn, params, x, **options):
    return jx.quantize.int8(fn, params, [x], calibration="minmax", **options)


@SCALES
def test_a_branch_of_zeros_does_not_coarsen_what_it_is_added_to(scales):
    params = CONV | {"d": {"kernel": jnp.zeros((3, 3, 4, 4))}}
    x = 1e-3 * IMAGES
    small, new = int8(residual, params, x, scales=scales)
    all_exact(small, new, x)
    assert snr(ran(small, new, x), ran(residual, params, x)) > 30


@SCALES
def test_what_reads_zeros_alone_keeps_its_bias(scales):
    params = {"a": DENSE["a"] | {"bias": 1e-3 * normal(3, 5)}, "b": DENSE["b"]}
    fn = lambda p, x: dense(p, jax.nn.relu(dense(p, x, "a") + p["a"]["bias"]), "b")
    x = jnp.zeros_like(X)
    small, new = int8(fn, params, x, scales=scales)
    all_exact(small, new, x)
    assert snr(ran(small, new, x), ran(fn, params, x)) > 30


@SCALES
@pytest.mark.parametrize(
    "limit", [lambda y: jnp.maximum(y, 20.0), lambda y: jnp.clip(y, 8.0, 30.0),
              lambda y: jnp.minimum(y, -9.0)],
    ids=["max", "clip", "min"],
)  # fmt: skip
def test_bounds_that_no_grid_has(limit, scales):
    def fn(params, x):
        y = dense(params, x, "a")
        return dense(params, limit(y), "b") + y[:, :4]

    small, new = int8(fn, DENSE, X, scales=scales)
    all_exact(small, new, X)
    assert snr(ran(small, new, X), ran(fn, DENSE, X)) > 27


def test_adaround_stays_where_a_channel_is_empty():
    params = {"a": {"kernel": DENSE["a"]["kernel"].at[:, 2].set(0)}, "b": DENSE["b"]}
    options = {"scales": "power_of_two", "rounding": "adaround"}
    x = normal(3, 64, 6)
    _, found = int8(dense_average, params, x, **options)
    _, nearest = int8(dense_average, params, x, scales="power_of_two")
    assert (found["a"]["kernel"].values != nearest["a"]["kernel"].values).any()


@pytest.mark.parametrize("activations", ["static", "dynamic", "float"])
def test_sensitivity_of_products(activations):
    found = jx.quantize.sensitivity(
        attention, DENSE, [X], lambda fn, params: 1.0, activations=activations
    )
    products = [] if activations == "float" else ["dot_general_0", "dot_general_1"]
    assert sorted(row.kernel for row in found.layers) == ["a/kernel", *products]


def test_a_bias_that_is_a_part_of_a_parameter_by_the_batch():
    fn = lambda p, x: x @ p["w"] + p["pos"][: len(x)]
    params = {"w": normal(0, 6, 5), "pos": normal(1, 4, 5)}
    small, new = int8(fn, params, X[:1])
    assert snr(ran(small, new, X[:1]), fn(params, X[:1])) > 30
    with pytest.raises(ValueError, match=r"they depend on shapes"):
        small(new, X)


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([X, X.at[0, 0].set(jnp.nan)], r"batches\[1\]: the result of a/kernel holds NaN or infin"),
        ([X.at[0, 0].set(jnp.inf)], r"batches\[0\]: the result of a/kernel holds NaN or infinity"),
        ([X[:0]], r"batches: had no numbers; pass batches that are not empty"),
    ],
)
def test_equalize_refuses(batches, message):
    with pytest.raises(ValueError, match=message):
        jx.quantize.equalize(dense_average, DENSE, batches)


def test_equalize_passes_over_an_empty_batch():
    expected = jx.quantize.equalize(dense_average, DENSE, [X])[1]
    found = jx.quantize.equalize(dense_average, DENSE, [X[:0], X])[1]
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_nan_stays_in_its_row_where_ranges_are_dynamic():
    small, new = int8(dense_average, DENSE, X, activations="dynamic")
    found = np.asarray(ran(small, new, X.at[0, 0].set(jnp.nan)))
    assert np.isnan(found[0]).all()
    np.testing.assert_array_equal(found[1:], ran(small, new, X)[1:])


def test_ratios_far_apart():
    """A factor too small for 30 bits is none: no shift is longer."""
    for power in (30, 31, 40, 200):
        factors = fixed([2.0**-power], 255)
        found = rescaled([jnp.array([-255, -1, 0, 255])], factors, 3, Clip())
        np.testing.assert_array_equal(found, [3, 3, 3, 3])
    np.testing.assert_array_equal(
        rescaled([jnp.array([4]), jnp.array([255])], fixed([1.0, 2.0**-40], 255), 0, Clip()), [4]
    )


def test_bfloat16_parameters_are_measured_as_they_run():
    """Large weights, whose own 8 bits of mantissa are as coarse as int8."""
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), DENSE)
    x = normal(3, 64, 6).astype(jnp.bfloat16)
    options = {"bias_correction": True, "rounding": "adaround"}
    _, new = int8(dense_average, params, x, **options)
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    _, expected = int8(dense_average, wide, x.astype(jnp.float32), **options)
    for name in "ab":
        values = [tree[name]["kernel"].values for tree in (new, expected)]
        assert (values[0] == values[1]).mean() > 0.9


def test_a_grid_that_is_lent_is_the_finest_of_its_readers():
    def fn(params, x):
        zero = jax.nn.relu(conv(params, x, "d"))
        y, z = jax.nn.relu(conv(params, x, "c")), 1e-3 * x
        one = conv(params, jax.nn.relu(y + zero), "e")
        other = conv(params, jax.nn.relu(jax.nn.relu(conv(params, z, "c")) + zero), "e")
        return jnp.concatenate([one, 1e3 * other], 3)

    params = CONV | {"d": {"kernel": jnp.zeros((3, 3, 4, 4))}}
    small, new = int8(fn, params, IMAGES)
    all_exact(small, new, IMAGES)
    for part in (slice(0, 4), slice(4, 8)):
        found, expected = ran(small, new, IMAGES), ran(fn, params, IMAGES)
        assert snr(found[..., part], expected[..., part]) > 30
