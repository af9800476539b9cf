"""int8 as ONNX, form by form: what is between layers, kernels of any layout, ends of ranges."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxaccel as jx
from jaxaccel.export._onnx import model
from tests.models import normal
from tests.onnx_engines import close, feeds, operations, optimized, precisions, run_by
from tests.onnx_int8 import ENGINES, alone
from tests.onnx_int8 import expected as by_xla
from tests.onnx_operations import LAYOUT
from tests.test_int8 import (
    CONV,
    DEEP,
    DENSE,
    IMAGES,
    RNN,
    X,
    attention,
    averaged,
    branches,
    conv,
    dense,
    dense_average,
    joined,
    padded,
    pooled,
    residual,
    rnn,
    stacked,
    stateless,
    thinned,
    twice,
    whiles,
)

BOTH = ENGINES[1:]
POWER = {"scales": "power_of_two"}
TOKENS = normal(4, 3, 5, 8)
WIDE = {"a": normal(0, 8, 2, 4) / 3, "b": normal(1, 2, 4, 6) / 3, "c": normal(2, 6, 3) / 2}


def several(params, x):
    """A real result with several readers, one of them a layer."""
    y = conv(params, x, "c")
    return jnp.concatenate([y, conv(params, jax.nn.relu(y * params["s"]), "d")], 3)


def moved(params, x):
    """Something for each channel is added and then moved before a layer reads it."""
    y = jnp.sin(conv(params, x, "c")) + params["s"]
    return y.transpose(0, 3, 1, 2).reshape(x.shape[0], -1) @ params["wide"]


def tokens(params, x):
    """The mean of normalised tokens, and the first of them."""
    y = jnp.einsum("btd,dhk->bthk", x, params["a"])
    y = jnp.einsum("bthk,hko->bto", jnp.tanh(y), params["b"])
    y = (y - y.mean(-1, keepdims=True)) * params["s"] + params["t"]
    return y.mean(1) @ params["c"] + y[:, 0] @ params["c"]


def sums(params, x):
    """Means over several axes, and sums that are none."""
    y = jax.nn.relu(jnp.einsum("btd,dhk->bthk", x, params["a"]))
    y = jnp.einsum("bhk,hko->bo", y.sum(1), params["b"]) / 5
    return jax.nn.relu(y) @ params["c"]


def heads(params, x):
    """A kernel for each index of an axis of the batch; and one that comes first."""
    y = jax.nn.relu(jnp.einsum("bhd,hdo->bho", x, params["heads"]))
    return jnp.einsum("oi,bhi->obh", params["first"], y).transpose(1, 0, 2)


def relu6(params, x):
    y = jax.nn.relu6(3 * conv(params, x, "c"))
    return conv(params, jax.nn.relu6(conv(params, y, "d")), "e")


def upsampled(params, x):
    y = jax.nn.relu(conv(params, x, "c"))
    up = partial(lax.conv_transpose, padding="SAME", dimension_numbers=LAYOUT)
    return up(up(y, params["d"]["kernel"], (2, 2)), params["e"]["kernel"], (1, 1))


def uneven(params, x):
    spaced = {"dimension_numbers": LAYOUT, "rhs_dilation": (2, 1)}
    y = lax.conv_general_dilated(x, params["c"]["kernel"], (2, 1), ((3, 1), (-1, 2)), **spaced)
    return lax.rev(conv(params, jax.nn.relu(y), "d"), (1,))[:, :, 1:]


def one_axis(params, x):
    y = lax.conv_general_dilated(
        x[:, 0], params["c"]["kernel"][0], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
    )
    return jax.nn.relu(y).mean(1) @ params["f"]["kernel"]


def largest(params, x):
    y = jnp.maximum(conv(params, x, "c"), conv(params, x, "c")).max((1, 2))
    return y @ params["f"]["kernel"] + dense(params, conv(params, x, "d").max(1).max(1), "f")


FORMS = {
    "residual": (residual, CONV, IMAGES),
    "pooled": (pooled, CONV, IMAGES),
    "joined": (joined, CONV, IMAGES),
    "padded": (padded, CONV, IMAGES),
    "thinned": (thinned, CONV, IMAGES),
    "averaged": (averaged, CONV, IMAGES),
    "attention": (attention, DENSE, X),
    "twice": (twice, CONV, IMAGES),
    "several": (several, CONV | {"s": jnp.linspace(0.5, 1.5, 4).reshape(1, 1, 1, 4)}, IMAGES),
    "moved": (moved, CONV | {"s": jnp.linspace(-1, 1, 4).reshape(1, 1, 1, 4),
                             "wide": normal(5, 144, 3) / 12}, IMAGES),
    "tokens": (tokens, WIDE | {"s": jnp.linspace(0.5, 1.5, 6)[None, None],
                               "t": jnp.linspace(1, 0, 6)[None, None]}, TOKENS),
    "sums": (sums, WIDE, TOKENS),
    "heads": (heads, {"heads": normal(0, 5, 8, 6) / 3, "first": normal(1, 4, 6)}, TOKENS),
    "relu6": (relu6, CONV, IMAGES),
    "upsampled": (upsampled, CONV, IMAGES),
    "uneven": (uneven, CONV, IMAGES),
    "one axis": (one_axis, CONV, IMAGES),
    "largest": (largest, CONV, IMAGES),
}  # fmt: skip


def exact(fn, params, x, batch_axes: Any = 0, **options):
    """The model; each step is one off at most where it reads what XLA has; the results are near."""
    given = {"calibration": "minmax", "progress": False}
    small = jx.quantize.int8(fn, params, [x, -x], **given, **options)
    wanted, grids = by_xla(*small, x)
    for engine, counts in alone(*small, (x,), wanted, grids).items():
        assert max(counts, default=0) <= 1, engine
        assert counts[1] <= 0.05 * counts.total() + 2, engine
    made = model(*small, (x,), batch_axes)
    other = x if batch_axes is None else jnp.concatenate([x, -x])[1:]
    for engine in BOTH:
        (found,) = run_by(engine, made, [feeds(made, other)])
        close(found, jax.jit(small[0])(small[1], other), 0.02)
    return made


def long(names, *fast):
    """For `pytest.mark.parametrize`: all but some are of the full tier."""
    return [name if name in fast else pytest.param(name, marks=pytest.mark.full) for name in names]


@pytest.mark.parametrize("name", long(FORMS, "joined", "several", "moved", "tokens", "heads"))
def test_each_form(name):
    one_size = name in ("attention", "padded")  # over the batch; a step of -1
    exact(*FORMS[name], batch_axes=None if one_size else 0)


@pytest.mark.parametrize("name", long(FORMS, "pooled", "sums"))
def test_each_form_with_powers_of_two(name):
    one_size = name in ("attention", "padded")
    exact(*FORMS[name], batch_axes=None if one_size else 0, **POWER)


LOOPS = {
    "rnn": (rnn, RNN, normal(7, 4, 3, 6)),
    "stacked": (stacked, DEEP, X),
    "branches": (branches, DENSE, X),
    "whiles": (whiles, RNN, X[:, :5]),
    "stateless": (stateless, DENSE, normal(7, 4, 3, 6)),
}


@pytest.mark.parametrize("activations", ["static", "float"])
@pytest.mark.parametrize("name", long(LOOPS, "rnn", "branches"))
def test_loops_and_branches(name, activations):
    fn, params, x = LOOPS[name]
    small = jx.quantize.int8(fn, params, [x, -x], activations=activations, progress=False)
    made = model(*small, (x,), None)
    for engine in BOTH:
        (found,) = run_by(engine, made, [feeds(made, x)])
        close(found, jax.jit(small[0])(small[1], x), 1e-4)


def bounded(params, x):
    y = jnp.pad(jnp.clip(conv(params, x, "c"), -0.3, 0.9), ((0, 0), (1, 2), (0, 1), (0, 0)))
    y = lax.reduce_window(lax.rev(y, (1,)), -jnp.inf, lax.max, (1, 3, 3, 1), (1, 1, 1, 1), "SAME")
    y = lax.reduce_window(y, 0.0, lax.add, (1, 3, 3, 1), (1, 2, 2, 1), "SAME") / 9
    y = jax.nn.relu(y + conv(params, y, "d"))
    return dense(params, jnp.concatenate([y, conv(params, y, "e")], 3).mean((1, 2))[:, :4], "f")


def test_what_is_between_layers_is_done_on_integers(tmp_path):
    """Limits and padding too; what is not between two pairs is of bytes itself."""
    left = optimized(exact(bounded, CONV, IMAGES, **POWER), tmp_path)
    assert left == {
        "QuantizeLinear": 1, "QLinearConv": 3, "Clip": 1, "Pad": 2, "Slice": 2, "NhwcMaxPool": 1,
        "QLinearAveragePool": 1, "QLinearAdd": 1, "QLinearConcat": 1, "QGemm": 1,
        "QLinearGlobalAveragePool": 1, "Transpose": 1, "Reshape": 1,
    }  # fmt: skip


def test_limits_are_written_where_a_grid_goes_beyond_them():
    made = exact(*FORMS["relu6"], **POWER)
    assert operations(made)["Clip"] == 2
    assert precisions(made)["Convolution", "u8"] == 3
    assert not operations(exact(*FORMS["relu6"])).keys() & {"Clip", "Relu"}


@pytest.mark.parametrize("options", [{}, POWER], ids=["float", "power_of_two"])
def test_a_bias_beside_which_weights_are_nothing(options):
    """Of more steps than 32 bits hold; and channels without weights."""
    kernel = DENSE["a"]["kernel"].at[:, 1].mul(1e-11).at[:, 2].set(0).at[:, 3].mul(1e-4)
    params = {"a": {"kernel": kernel, "bias": jnp.array([1.0, 3, -2, 4, 0])}, "b": DENSE["b"]}
    fn = lambda p, x: dense(p, jax.nn.relu(dense(p, x, "a") + p["a"]["bias"][None]), "b")
    made = exact(fn, params, X, **options)
    for engine in BOTH:
        (found,) = run_by(engine, made, [feeds(made, X)])
        close(found, jax.jit(fn)(params, X), 0.03)


def test_what_is_far_beyond_the_grid():
    made = exact(dense_average, DENSE, X)
    small = jx.quantize.int8(dense_average, DENSE, [X, -X], calibration="minmax", progress=False)
    for scale in (0.0, 1e3, -1e30):
        for engine in BOTH:
            (found,) = run_by(engine, made, [feeds(made, scale * X)])
            close(found, jax.jit(small[0])(small[1], scale * X), 0.02)


def test_float16():
    half = jax.tree.map(lambda x: x.astype(jnp.float16), CONV)
    x = IMAGES.astype(jnp.float16)
    small = jx.quantize.int8(residual, half, [x], calibration="minmax", progress=False)
    made = model(*small, (x,))
    (found,) = run_by("onnxruntime", made, [feeds(made, x)])
    close(found, jax.jit(small[0])(small[1], x), 0.02)


@pytest.mark.full
def test_other_ways_to_make_one():
    """They give the same kind of function, with other numbers."""
    fn, params, x = FORMS["residual"]
    exact(fn, params, x, rounding="adaround", bias_correction=True)
    exact(*jx.quantize.equalize(fn, params, [x]), x)
    qat = jx.quantize.fake(fn, params, [x])
    small = qat.convert(qat.params)
    made = model(*small, (x,))
    (found,) = run_by("onnxruntime", made, [feeds(made, x)])
    close(found, jax.jit(small[0])(small[1], x), 0.02)
    assert operations(made)["QuantizeLinear"] > 2


def test_the_numbers_that_run_are_those_that_are_given():
    """The multiplier says what a kernel's integers stand for, as in XLA."""
    small, new = jx.quantize.int8(dense_average, DENSE, [X], progress=False)
    new["a"]["kernel_multiplier"] = 0.5 * new["a"]["kernel_multiplier"]
    made = model(small, new, (X,))
    (found,) = run_by("onnxruntime", made, [feeds(made, X)])
    close(found, jax.jit(small)(new, X), 0.02)


def test_weights_of_8_bits_that_fn_dequantizes():
    """Kernels that are read as they are stay in 8 bits; the others are computed."""
    params = DENSE | {"b": {"kernel": normal(2, 4, 5)}, "t": jnp.ones((1, 4))}
    fn = lambda p, x: dense(p, x, "a") @ (2 * p["b"]["kernel"]).T + p["t"]
    small = jx.quantize.weights(params, bits=8)
    whole = lambda params, x: fn(jx.quantize.dequantize(params), x)
    made = model(whole, small, (X,))
    assert operations(made) == {"DequantizeLinear": 1, "Gemm": 2}
    named = {t.name: (t.data_type, tuple(t.dims)) for t in made.graph.initializer}
    assert named["a/kernel"] == (3, (6, 5))  # int8
    for engine in BOTH:
        (found,) = run_by(engine, made, [feeds(made, X)])
        close(found, jax.jit(whole)(small, X))


@pytest.mark.full
@pytest.mark.parametrize("opset", [18, 20, 21, 23])
def test_newer_opsets(opset):
    for name in ("pooled", "joined", "sums"):
        fn, params, x = FORMS[name]
        small = jx.quantize.int8(fn, params, [x], progress=False)
        older, newer = (model(*small, (x,), opset=one) for one in (17, opset))
        found, expected = (run_by("onnxruntime", m, [feeds(m, x)])[0][0] for m in (older, newer))
        np.testing.assert_array_equal(found, expected)
