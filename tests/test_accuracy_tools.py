"""Bias correction, AdaRound, sensitivity and mixed precision."""

from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxaccel as jx
from jaxaccel.quantize import _constants, _rounding
from jaxaccel.quantize._plan import Choice
from jaxaccel.quantize._traced import Traced
from tests.int8_checks import all_exact
from tests.models import normal
from tests.test_int8 import CONV, DENSE, IMAGES, X, dense_average, ran, residual, snr

EVERY = Choice("static", lambda keys: True)


def coarse(params, times):
    """The kernels in fewer bits: the scales of 8, times so much."""
    found = {}
    for name, one in params.items():
        kernel = one["kernel"]
        scale = _constants.kernel(kernel, (kernel.ndim - 1,), power=False).scale
        found[name, "kernel"] = _constants.with_scale(kernel, times * scale)
    return found


def test_what_rounding_moves_is_the_mean_of_the_data_times_the_change():
    traced = Traced(dense_average, DENSE, EVERY)
    batches, kernels = [(X,), (2 * X,)], coarse(DENSE, 16)
    moved = _rounding.shifts(traced, DENSE, batches, kernels)
    mean = np.asarray(1.5 * X.mean(0), np.float64)
    change = kernels["a", "kernel"].dequantize() - DENSE["a"]["kernel"]
    np.testing.assert_allclose(moved["a", "kernel"], mean @ change, rtol=1e-4, atol=1e-6)
    hidden = np.maximum(X @ DENSE["a"]["kernel"], 0).mean(0) * 1.5
    change = kernels["b", "kernel"].dequantize() - DENSE["b"]["kernel"]
    np.testing.assert_allclose(moved["b", "kernel"], hidden @ change, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("scales", ["float", "power_of_two"])
def test_bias_correction_takes_the_mean_away(scales):
    """Images that are all positive, so that errors of weights add up in one direction."""
    params, x = {k: CONV[k] for k in "cde"}, jnp.abs(IMAGES) + 1
    real = ran(residual, params, x).mean((0, 1, 2))
    off = {}
    for corrected in (False, True):
        small, new = jx.quantize.int8(
            residual, params, [x], scales=scales, bias_correction=corrected
        )
        assert ("bias" in new["c"]) == corrected
        all_exact(small, new, x)
        off[corrected] = np.abs(ran(small, new, x).mean((0, 1, 2)) - real).max()
    assert off[True] < off[False]


C: Any = ("c", "kernel")


def test_adaround_moves_a_layer_less_than_the_nearest_numbers():
    x = jnp.abs(normal(3, 64, 4, 4, 4)) + normal(4, 1, 1, 1, 4)
    traced = Traced(residual, CONV, EVERY)
    leaves = {(name, "kernel"): one["kernel"] for name, one in CONV.items() if name in "cde"}
    nearest = {keys: q for keys, q in coarse(CONV, 16).items() if keys in leaves}
    found = _rounding.adaround(traced, CONV, [(x,)], leaves, nearest)

    def error(kernels):
        moved = {keys: q.dequantize() - leaves[keys] for keys, q in kernels.items()}
        first = jax.lax.conv_general_dilated(
            x, moved[C], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return float(jnp.square(first).mean())

    assert error(found) < 0.2 * error(nearest)
    for keys, q in found.items():
        ratio = leaves[cast(Any, keys)] / q.scale
        assert (jnp.abs(q.values - ratio) <= 1 + 1e-4).all()  # up or down, no further
        np.testing.assert_array_equal(q.scale, nearest[cast(Any, keys)].scale)


def test_adaround_in_int8_is_exact():
    small, new = jx.quantize.int8(
        dense_average, DENSE, [X], rounding="adaround", bias_correction=True
    )
    all_exact(small, new, X)
    assert snr(ran(small, new, X), ran(dense_average, DENSE, X)) > 30


def test_biases_of_a_flat_dict():
    params = {"a": DENSE["a"]["kernel"], "b": DENSE["b"]["kernel"]}
    fn = lambda params, x: jax.nn.relu(x @ params["a"]) @ params["b"]
    small, new = jx.quantize.int8(fn, params, [X], bias_correction=True)
    assert new.keys() == {"a", "a_multiplier", "bias", "b", "b_multiplier", "b_bias"}
    assert snr(ran(small, new, X), ran(fn, params, X)) > 30


def outlier():
    """One number of the first kernel so large that the others of its channel are lost."""
    kernel = DENSE["a"]["kernel"].at[0].set(300.0)
    return {"a": {"kernel": kernel}, "b": DENSE["b"]}, X.at[:, 0].set(0)


def against(fn, params, x):
    real = ran(fn, params, x)
    return lambda fn, params: min(float(snr(ran(fn, params, x), real)), 100.0)


def test_sensitivity_and_mixed_precision():
    params, x = outlier()
    evaluate = against(dense_average, params, x)
    found = jx.quantize.sensitivity(dense_average, params, [x], evaluate)
    assert [row.kernel for row in found.layers] == ["a/kernel", "b/kernel"]
    assert found.original == 100
    assert found.layers[0].score < 25 < found.layers[1].score
    assert str(found).splitlines()[2].startswith("a/kernel")
    small, new = jx.quantize.mixed(dense_average, params, [x], evaluate, max_drop=70)
    assert [one.where for one in small.report.left] == ["a/kernel"]
    assert evaluate(small, new) > 30
    whole, _ = jx.quantize.mixed(dense_average, params, [x], evaluate, max_drop=99)
    assert not whole.report.left


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda e: jx.quantize.mixed(dense_average, DENSE, [X], e, max_drop=-1),
         "max_drop=-1 must be >= 0, in units of the score"),
        (lambda e: jx.quantize.mixed(dense_average, DENSE, [X], e, max_drop=1e-9),
         r"max_drop=1e-09: even ./kernel alone in 8 bits costs more; allow more, or train with jx"),
        (lambda e: jx.quantize.mixed(dense_average, DENSE, [X], lambda *_: np.nan, max_drop=1),
         "evaluate: gave NaN for <function dense_average.*; give a number, higher where it is bet"),
        (lambda e: jx.quantize.sensitivity(dense_average, DENSE, [X], e, where="a*"),
         "where: is not for sensitivity or mixed, which try each layer"),
        (lambda e: jx.quantize.int8(dense_average, DENSE, [X], rounding=cast(Any, "up")),
         "rounding='up' must be one of 'nearest', 'adaround'"),
        (lambda e: jx.quantize.int8(dense_average, DENSE, [X], activations="dynamic",
                                    bias_correction=True), "activations='dynamic': rounding='ada"),
    ],
)  # fmt: skip
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call(against(dense_average, DENSE, X))
