"""int8 as ONNX: the integers of each step by two engines against XLA's, and their kernels."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import onnx
import pytest
from hypothesis import assume, given, settings

import jaxaccel as jx
from jaxaccel.export._onnx import model
from tests.models import normal, tiers
from tests.networks.drawn import networks
from tests.onnx_engines import (
    close,
    feeds,
    operations,
    optimized,
    precisions,
    run_by,
    same_by,
)
from tests.onnx_int8 import ENGINES, alone, apart, expected, steps_apart, written
from tests.test_onnx import CASES, NAMED, two

LONG = (
    *("mobilenet", "unet", "densenet", "inception", "shuffle_unit", "shuffle_twice", "vit"),
    *("resnet20", "chain", "haiku", "haiku_state", "equinox", "keras", "group_norm", "fused_qkv"),
    *("squeeze_excite", "grouped", "flatten", "multiplier", "lstm", "gru", "stacked", "nchw"),
    *("separable", "tied", "hand_written", "gated", "linen_plain"),
    *("linen_residual", "linear_attention", "elman", "two_pass"),
)
POWER = {"scales": "power_of_two"}
REAL = 0.03  # of the largest element: what one step off before them makes of the results


def int8(name, **options):
    fn, params = NAMED[name].build()
    x = NAMED[name].images()
    return *jx.quantize.int8(fn, params, [x], progress=False, **options), x


@pytest.mark.parametrize(
    "options", [{}, pytest.param(POWER, marks=pytest.mark.full)], ids=["float", "power_of_two"]
)
@pytest.mark.parametrize("case", tiers(CASES, LONG))
def test_each_step_is_one_off_at_most(case, options):
    """Where it reads what XLA has; and the results, where the differences add up."""
    fn, params, x = int8(case.name, **options)
    wanted, grids = expected(fn, params, x)
    for engine, counts in alone(fn, params, (x,), wanted, grids).items():
        assert max(counts, default=0) <= 1, engine
        assert counts[1] <= 0.02 * counts.total() + 2, engine
    other = two(case.shape)[1]
    wanted, _ = expected(fn, params, *other)
    for engine, run in written(fn, params, x).items():
        assert apart(run(*other), wanted) < REAL, engine


@pytest.mark.parametrize("name", ["separable", "linen"])
def test_engines_compute_what_is_written(name):
    """What differs from XLA is how ONNX rounds, not how the engine does: of shifts every bit."""
    fn, params, x = int8(name, **POWER)
    found = {engine: run(x) for engine, run in written(fn, params, x).items()}
    _, grids = expected(fn, params, x)
    for engine in ENGINES[1:]:
        assert not steps_apart(found[engine], found["jax"], grids).keys() - {0}
        close(jax.tree.leaves(found[engine]["results"]), found["jax"]["results"])


@settings(max_examples=2)
@given(networks())
def test_drawn_networks(network):
    fn, params, shape = network
    x = normal(0, *shape)
    try:
        small = jx.quantize.int8(fn, params, [x], progress=False)
    except ValueError as error:
        assume("has no convolution" not in str(error))
        raise
    wanted, grids = expected(*small, x)
    for engine, counts in alone(*small, (x,), wanted, grids).items():
        if engine != "openvino":  # of which some faults are its own
            assert max(counts, default=0) <= 1, engine


PAIRS = ("QuantizeLinear", "DequantizeLinear")
EXACT = {  # by hand: what is between two pairs, and nothing that a pair says already
    "mlp": {"Reshape": 1, "Gemm": 3},
    "convnet": {"Reshape": 2, "Conv": 2, "MaxPool": 2, "Transpose": 1, "Gemm": 2},
    "separable": {"Reshape": 2, "Conv": 3, "MaxPool": 2, "Transpose": 1, "Gemm": 2},
    "resnet20": {
        "Transpose": 1, "Conv": 19, "Add": 9, "Slice": 2, "Pad": 2, "GlobalAveragePool": 1,
        "Reshape": 1, "Gemm": 1,
    },
}  # fmt: skip
KERNELS = {
    "Conv": "QLinearConv", "Gemm": "QGemm", "Add": "QLinearAdd", "MaxPool": "NhwcMaxPool",
    "GlobalAveragePool": "QLinearGlobalAveragePool",
}  # fmt: skip


@pytest.mark.parametrize("name", EXACT)
def test_all_of_it_on_integer_kernels(name, tmp_path):
    fn, params, x = int8(name)
    made = model(fn, params, (x,))
    found = operations(made)
    assert {op: count for op, count in found.items() if op not in PAIRS} == EXACT[name]
    wanted = {KERNELS.get(op, op): count for op, count in EXACT[name].items()}
    assert optimized(made, tmp_path) == {"QuantizeLinear": 1, **wanted}
    kinds = precisions(made)
    for layer, op in {
        "Convolution": "Conv",
        "FullyConnected": "Gemm",
        "Pooling": "MaxPool",
    }.items():
        assert {kind: n for (one, kind), n in kinds.items() if one == layer} == (
            {"u8": EXACT[name][op]} if op in EXACT[name] else {}
        )


def test_kernels_are_in_8_bits_with_a_scale_for_each_channel():
    fn, params, x = int8("convnet")
    made = model(fn, params, (x,))
    named = {t.name: onnx.numpy_helper.to_array(t) for t in made.graph.initializer}
    kernel = params["params"]["conv2"]["kernel"]
    found = named["params/conv2/kernel"]
    np.testing.assert_array_equal(found, np.transpose(kernel.values, (3, 2, 0, 1)))
    np.testing.assert_allclose(named["params/conv2/kernel/scale"], kernel.scale.ravel(), rtol=1e-6)
    kinds = {name: named[f"params/{name}/bias"].dtype for name in ("conv1", "dense1", "classifier")}
    assert {*kinds.values()} == {np.dtype("int32")}
    size = len(made.SerializeToString())
    assert size < 1.3 * sum(leaf.nbytes for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize("opset", [18, 21, 23])
def test_newer_opsets(opset, tmp_path):
    fn, params, x = int8("convnet")
    older, newer = (model(fn, params, (x,), opset=one) for one in (17, opset))
    assert optimized(older, tmp_path) == optimized(newer, tmp_path)
    found = [run_by("onnxruntime", one, [feeds(one, x)])[0] for one in (older, newer)]
    np.testing.assert_array_equal(found[0][0], found[1][0])


@pytest.mark.parametrize("wrap", [jx.autotune, jax.jit, lambda fn: jax.jit(jx.autotune(fn))])
def test_what_is_autotuned_or_jitted(wrap):
    fn, params, x = int8("linen")
    assert operations(model(wrap(fn), params, (x,))) == operations(model(fn, params, (x,)))


@pytest.mark.parametrize("name", ["convnet", pytest.param("vit", marks=pytest.mark.full)])
def test_weights_alone(name):
    fn, params, x = int8(name, activations="float")
    made = model(fn, params, (x,))
    same_by(ENGINES[1:], made, fn, params, two(NAMED[name].shape))
    kinds = [tensor.data_type for tensor in made.graph.initializer]
    assert onnx.TensorProto.INT8 in kinds
    assert "QuantizeLinear" not in operations(made)


def test_some_layers_in_floating_point():
    fn, params = NAMED["convnet"].build()
    x = NAMED["convnet"].images()
    small = jx.quantize.int8(fn, params, [x], where={"*conv1*": False, "*": True}, progress=False)
    made = model(*small, (x,))
    named = {t.name: t.data_type for t in made.graph.initializer}
    assert named["params/conv1/kernel"] == onnx.TensorProto.FLOAT
    assert named["params/conv2/kernel"] == onnx.TensorProto.INT8
    for engine in ENGINES[1:]:
        (found,) = run_by(engine, made, [feeds(made, x)])
        close(found, jax.jit(small[0])(small[1], x), REAL)


def test_ranges_that_are_found_at_run_time():
    fn, params, x = int8("linen", activations="dynamic")
    message = "finds the ranges of activations at run time, for which ONNX has no pairs of"
    fix = "pass activations='static' to jx.quantize.int8"
    with pytest.raises(ValueError, match=rf"^fn: .* {message} .*; {re.escape(fix)}$"):
        model(jax.jit(fn), params, (x,))


def test_clipped_and_saturated():
    """At the ends of each grid, and far beyond."""
    fn, params, x = int8("mlp")
    engines = written(fn, params, x)
    for scale in (10.0, 1e4, 0.0):
        wanted, grids = expected(fn, params, scale * x)
        for engine, run in engines.items():
            counts = steps_apart(run(scale * x), wanted, grids)
            assert max(counts) <= 2, engine
    assert jnp.isfinite(wanted["results"]).all()
