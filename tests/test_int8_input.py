"""int8 on bad and odd input: named errors, exact handling; and what its programs hold."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxaccel as jx
from jaxaccel._tuned import untuned
from jaxaccel.quantize import QTensor
from tests.int8_checks import all_exact
from tests.models import ZOO, normal
from tests.test_int8 import DENSE, X, dense_average, ran, snr

BATCHES = [X]


def int8(fn=dense_average, params: Any = DENSE, batches: Any = BATCHES, **options: Any):
    options.setdefault("calibration", "minmax")
    return jx.quantize.int8(fn, params, batches, **options)


def integers(params, x):
    return x @ params["w"]


def taken(params, x):
    return jnp.take(params["w"], x, axis=0)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"batches": []}, ValueError, "batches: is empty; pass at least one batch"),
        ({"batches": iter(BATCHES)}, TypeError, "batches: a list_iterator gives its batches once"),
        ({"batches": (x for x in BATCHES)}, TypeError, "batches: a generator gives its batches on"),
        ({"batches": X}, TypeError, r"batches: ArrayImpl is no iterable of batches; pass a list"),
        ({"batches": [X, X.at[0, 0].set(jnp.nan)]}, ValueError,
         r"batches\[1\]: an argument holds NaN or infinity; leave such inputs out"),
        ({"batches": [1e38 * X]}, ValueError, r"batches\[0\]: the result of max holds NaN or inf"),
        ({"batches": [X[:0]]}, ValueError, "batches: an argument had no numbers; pass batches tha"),
        ({"activations": "statik"}, ValueError, "activations='statik' must be one of 'static', 'd"),
        ({"scales": "log"}, ValueError, "scales='log' must be one of 'float', 'power_of_two'"),
        ({"calibration": "max"}, ValueError, "calibration='max' must be one of 'minmax', 'percent"),
        ({"calibration": lambda seen: (np.nan, 1.0)}, ValueError,
         r"calibration: the function returned \(nan, 1.0\); it must return the ends of the range"),
        ({"calibration": lambda seen: (1.0, -1.0)}, ValueError, r"returned \(1.0, -1.0\); it must"),
        ({"calibration": lambda seen: None}, ValueError, "the function returned None; it must ret"),
        ({"where": "*nothing*"}, ValueError, r"where='\*nothing\*' matches no kernel; they are: a"),
        ({"where": lambda path, leaf: False}, ValueError,
         r"fn has no convolution or dot product to quantize; a/kernel: left out by where="),
        ({"params": jax.tree.map(lambda x: x.at[0].set(jnp.inf), DENSE)}, ValueError,
         "a/kernel: holds NaN or infinity; restore an earlier checkpoint"),
        ({"params": jx.quantize.weights(DENSE)}, ValueError, "a/kernel: is a QTensor already; pas"),
        ({"params": jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), DENSE)},
         TypeError, "a/kernel: has no numbers yet; quantize outside of jax.jit, on arrays"),
        ({"fn": lambda p, x: x @ p, "params": normal(0, 6, 2)}, ValueError, "params: is a single"),
        ({"fn": integers, "params": {"w": jnp.ones((6, 2), int)}, "batches": [X.astype(int)]},
         ValueError, "nothing|to quantize; w: its operands are int32 and int32"),
        ({"fn": taken, "params": {"w": X}, "batches": [jnp.arange(2)]}, ValueError,
         "jx.quantize.int8: fn has no convolution or dot product to quantize$"),
    ],
)  # fmt: skip
def test_bad_input(change, error, message):
    with pytest.raises(error, match=message):
        int8(**change)


def test_a_quantized_function_is_not_quantized_again():
    small, new = int8()
    with pytest.raises(ValueError, match=r"dense_average: 2 on integers> is quantized already"):
        int8(small, jx.quantize.dequantize(new))


def test_nothing_is_quantized_inside_of_jit():
    with pytest.raises(TypeError, match="a/kernel: has no numbers yet"):
        jax.jit(lambda params: int8(params=params)[1])(DENSE)


def test_another_tree():
    small, new = int8()
    with pytest.raises(ValueError, match="extra: not in the quantized parameters; pass the tree"):
        ran(small, new | {"extra": X}, X)
    with pytest.raises(ValueError, match="b/kernel: missing from the quantized parameters"):
        small({"a": new["a"]} | {"b": {"kernel_multiplier": new["b"]["kernel_multiplier"]}}, X)
    with pytest.raises(ValueError, match=r"a/kernel: an array of shape \(6, 5\), expected a QTens"):
        ran(small, new | {"a": {**new["a"], "kernel": DENSE["a"]["kernel"]}}, X)


def test_a_new_path_that_is_taken():
    params = DENSE | {"a": {**DENSE["a"], "kernel_multiplier": X}}
    with pytest.raises(ValueError, match="a/kernel_multiplier: the quantized layer needs this pat"):
        int8(params=params)


@pytest.mark.parametrize("scales", ["float", "power_of_two"])
@pytest.mark.parametrize("value", [0.0, 2.5, -3.0])
def test_constant_activations(value, scales):
    x = jnp.full_like(X, value)
    small, new = int8(batches=[x], scales=scales)
    all_exact(small, new, x)
    real = ran(dense_average, DENSE, x)
    np.testing.assert_allclose(ran(small, new, x), real, atol=0.03 * abs(real).max() + 1e-6)


@pytest.mark.parametrize("scales", ["float", "power_of_two"])
def test_channels_of_zeros_give_their_bias(scales):
    params = {"a": {"kernel": normal(0, 6, 5).at[:, 2].set(0), "bias": normal(1, 5)},
              "b": {"kernel": jnp.zeros((5, 3)), "bias": jnp.array([0.0, 0.001, 300])}}  # fmt: skip

    def fn(params, x):
        y = jax.nn.relu(x @ params["a"]["kernel"] + params["a"]["bias"][None])
        return y @ params["b"]["kernel"] + params["b"]["bias"][None]

    small, new = int8(fn, params, scales=scales)
    segments = all_exact(small, new, X)
    np.testing.assert_allclose(ran(small, new, X), ran(fn, params, X), rtol=1e-5)
    bias, grid = params["a"]["bias"][2], segments[0].grid
    assert grid is not None
    expected = max(float(bias), 0)
    found = (np.asarray(segments[0].result)[:, 2] - grid.zero_point) * grid.scale
    np.testing.assert_allclose(found, expected, atol=0.51 * grid.scale)


@pytest.mark.parametrize("scales", ["float", "power_of_two"])
@pytest.mark.parametrize("factor", [0.0, 1e-20, 1e-34, 1e-36])
def test_a_channel_that_is_far_smaller_harms_no_other(scales, factor):
    x = jax.random.uniform(jax.random.key(0), (32, 64), maxval=25)  # steps far from 1
    params = {"a": {"kernel": (0.004 * normal(1, 64, 8)).at[:, 3].multiply(factor),
                    "bias": jnp.ones(8)},
              "b": {"kernel": normal(3, 8, 5)}}  # fmt: skip

    def fn(params, x):
        y = jax.nn.relu(x @ params["a"]["kernel"] + params["a"]["bias"])
        return y @ params["b"]["kernel"]

    small, new = int8(fn, params, [x], scales=scales)
    assert snr(ran(small, new, x), ran(fn, params, x)) > 35


@pytest.mark.parametrize("activations", ["static", "dynamic", "float"])
def test_float16(activations):
    x, w = (30 * normal(5, 16, 512)).astype("float16"), (normal(6, 512, 16) / 25).astype("float16")
    fn = lambda params, x: x @ params["w"]
    small, new = int8(fn, {"w": w}, [x], activations=activations)
    found = ran(small, new, x)
    assert found.dtype == jnp.float16
    assert snr(found, ran(fn, {"w": w}, x)) > 35


def test_sums_that_may_not_fit_stay_real():
    params = {"w": jnp.ones((70_000, 1)), "v": jnp.ones((1, 1))}
    fn = lambda params, x: jnp.tanh(x @ params["w"]) @ params["v"]
    small, new = int8(fn, params, [jnp.ones((1, 70_000))])
    assert [one.where for one in small.report.left] == ["w"]
    assert small.report.left[0].reason == "a sum of 70000 products may not fit 32 bits"
    assert isinstance(new["v"], QTensor)
    assert not isinstance(new["w"], QTensor)


def test_what_is_left_out_is_reported():
    small, new = int8(where={"b*": False, "*": True})
    assert "float  b/kernel  left out by where=" in str(small.report)
    assert "1 on integers, 1 left in floating point" in str(small.report)
    assert not isinstance(new["b"]["kernel"], QTensor)
    computed = lambda params, x: x @ jnp.tanh(params["a"]["kernel"]) @ params["b"]["kernel"]
    small, _ = int8(computed)
    assert small.report.left[0].reason == "its kernel is computed from a/kernel"
    assert "test_int8_input.py" in small.report.left[0].source


def operand_types(fn, params, x) -> list[str]:
    """Of every convolution and dot product of the lowered program."""
    text = jax.jit(fn).lower(params, x).as_text()
    lines = [
        line for line in text.splitlines() if re.search(r"\.(convolution|dot_general)\b", line)
    ]
    return [",".join(re.findall(r"([a-z]\d+)>", line.rpartition(" : ")[2])) for line in lines]


@pytest.mark.parametrize("case", [c for c in ZOO if c.name in ("linen", "separable")])
def test_every_convolution_and_dot_product_is_on_integers(case):
    fn, params = case.build()
    x = case.images()
    small, new = int8(fn, params, [x])
    plain = untuned(small)  # a depthwise one is otherwise written as multiplications
    assert operand_types(plain, new, x) == ["i8,i8,i32"] * len(small.report.rows)
    assert not small.report.left
