"""int8: every integer step against the NumPy reference, over the zoo, drawn layers and graphs."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

import jaxaccel as jx
from jaxaccel.quantize import QTensor
from jaxaccel.quantize._arithmetic import Grid
from jaxaccel.quantize._execute import execute
from jaxaccel.quantize._program import Joined, Mean, Product, Same, Sum
from tests.int8_checks import all_exact, check
from tests.models import ZOO, normal, tiers

LAYOUT = ("NHWC", "HWIO", "NHWC")
SLOW = ("resnet20", "mobilenet")


def snr(found, expected) -> float:
    """Decibels."""
    expected = np.asarray(expected, np.float64)
    noise = ((np.asarray(found) - expected) ** 2).sum()
    return 10 * np.log10((expected**2).sum() / noise) if noise else np.inf


def ran(fn, *args):
    """Compiled as one program, which takes a fraction of the time of one for each operation."""
    return jax.jit(fn)(*args)


def quantized(fn, params, *args, **options: Any):
    options.setdefault("calibration", "minmax")
    batches = [tuple(sign * x for x in args) for sign in (1, -1)]  # both branches of a condition
    return jx.quantize.int8(fn, params, batches, **options)


def same_when_compiled(segments, fn, params, x):
    """What the last step gave is what the function, compiled as one program, returns."""
    np.testing.assert_array_equal(segments[-1].result, jax.jit(fn)(params, x))


@pytest.mark.parametrize("case", tiers(ZOO, SLOW))
def test_the_zoo_is_exact_and_close(case):
    fn, params = case.build()
    x = case.images()
    small, new = quantized(fn, params, x)
    assert not small.report.left
    same_when_compiled(all_exact(small, new, x), small, new, x)
    assert snr(ran(small, new, x), ran(fn, params, x)) > 30


@pytest.mark.parametrize("case", tiers(ZOO, SLOW))
def test_powers_of_two_are_exact(case):
    fn, params = case.build()
    x = case.images()
    small, new = quantized(fn, params, x, scales="power_of_two")
    segments = all_exact(small, new, x)
    same_when_compiled(segments, small, new, x)
    scales = [s.grid.scale for s in segments if s.grid]
    assert all(np.log2(scale) == int(np.log2(scale)) for scale in scales)
    assert {s.grid.zero_point for s in segments if s.grid} <= {0, -128}
    assert snr(ran(small, new, x), ran(fn, params, x)) > 27


@st.composite
def convolutions(draw):
    """A convolution with its parameters' shapes, along one or two axes."""
    rank = draw(st.integers(1, 2))
    several = lambda low, high: draw(st.tuples(*[st.integers(low, high)] * rank))
    groups, out = draw(st.sampled_from([1, 2, 4])), draw(st.integers(1, 2))
    taps, gaps, spread = several(1, 3), several(1, 2), several(1, 2)
    pads = [draw(st.tuples(st.integers(-1, 3), st.integers(0, 3))) for _ in range(rank)]
    sizes = [(k - 1) * d + 2 + n for k, d, n in zip(taps, gaps, several(0, 3), strict=True)]
    into = draw(st.sampled_from([1, 3]))
    layout = draw(st.sampled_from([("NWC", "WIO", "NWC"), ("NCW", "OIW", "NCW")]))
    layout = layout if rank == 1 else tuple(s.replace("W", "HW") for s in layout)
    options = {
        "window_strides": several(1, 2), "padding": pads, "lhs_dilation": spread,
        "rhs_dilation": gaps, "feature_group_count": groups,
    }  # fmt: skip
    return (2, groups * into, *sizes), (out * groups, into, *taps), layout, options


def placed(shape, spec, first):
    """Axes that come as `first` and then the image's, in the order of the layout."""
    names = dict(zip([*first, *(c for c in spec if c in "HW")], range(len(shape)), strict=True))
    return [names[c] for c in spec]


@settings(max_examples=6)
@given(convolutions(), st.sampled_from([(-1, 0), (0, 1), (-1, 1), (-0.1, 1), (-1, 0.02), (0, 0)]),
       st.sampled_from(["float", "power_of_two"]), st.integers(0, 9))  # fmt: skip
def test_drawn_convolutions(drawn, limits, scales, seed):
    images, kernel, layout, options = drawn
    random = np.random.default_rng(seed)
    x = random.uniform(limits[0], limits[1], images).astype(np.float32)
    x = jnp.asarray(x.transpose(placed(images, layout[0], "NC")))
    w = random.normal(size=kernel).astype(np.float32)
    params = {
        "kernel": jnp.asarray(w.transpose(placed(kernel, layout[1], "OI"))),
        "bias": jnp.asarray(random.normal(size=kernel[0]), jnp.float32),
        "next": jnp.asarray(random.normal(size=(kernel[0], 3)), jnp.float32),
    }
    shape = [kernel[0] if c == "C" else 1 for c in layout[2]]

    def fn(params, x):
        y = lax.conv_general_dilated(x, params["kernel"], dimension_numbers=layout, **options)
        y = jnp.maximum(y + params["bias"].reshape(shape), 0)
        return jnp.tensordot(y, params["next"], (layout[2].index("C"), 0))

    small, new = jx.quantize.int8(fn, params, [x], calibration="minmax", scales=scales)
    segments = all_exact(small, new, x)
    assert [type(s.grid) for s in segments] == [Grid, type(None)]
    zero = segments[0].grids[0].zero_point
    lowest = -128 if limits[1] > limits[0] == 0 else 127 if limits == (-1, 0) else zero
    assert zero == (lowest if scales == "float" or limits[0] >= 0 else 0)
    real, found = np.asarray(ran(fn, params, x)), np.asarray(ran(small, new, x))
    assert np.abs(found - real).max() <= 0.05 * max(np.abs(real).max(), 1)


def test_turns_of_a_loop_are_exact():
    """The body as it runs by itself, which is what the loop returns."""
    xs, turns = normal(7, 4, 3, 6), []
    small, new = quantized(stateless, DENSE, xs)
    made, _ = small._traced.plan(new, [xs])
    ((body,),) = made.program.bodies.values()
    for x in xs:
        found = []
        setting = small.setting({}, found)
        turns += execute(body, [new["a"]["kernel"], x], setting)
        assert len(found) == 1
        check(found[0])
    np.testing.assert_array_equal(ran(small, new, xs), np.stack(turns))


DENSE = {"a": {"kernel": normal(1, 6, 5)}, "b": {"kernel": normal(2, 5, 4)}}
CONV = {n: {"kernel": normal(i, 3, 3, 4, 4) / 5} for i, n in enumerate("cde")}
CONV["f"] = {"kernel": normal(3, 4, 3)}
X, IMAGES = normal(5, 3, 6), normal(6, 2, 6, 6, 4)


def dense(params, x, name):
    return x @ params[name]["kernel"]


def conv(params, x, name, **options):
    return lax.conv_general_dilated(
        x, params[name]["kernel"], (1, 1), "SAME", dimension_numbers=LAYOUT, **options
    )


def residual(params, x):
    y = jax.nn.relu(conv(params, x, "c"))
    return conv(params, jax.nn.relu(y + conv(params, y, "d")), "e")


def pooled(params, x):
    y = jax.nn.relu6(conv(params, x, "c"))
    y = lax.reduce_window(y, 0.0, lax.add, (1, 3, 3, 1), (1, 2, 2, 1), "SAME") / 9
    return dense(params, jax.nn.relu(conv(params, y, "d")).mean((1, 2)), "f")


def joined(params, x):
    y, z = jax.nn.relu(conv(params, x, "c")), conv(params, x, "d")
    both = jnp.concatenate([y, 9 * jnp.sin(y)], 3)  # one operand is real
    y = conv(params, jnp.concatenate([y[..., :1], z, y[..., 2:]], 3)[..., 1:5], "e")
    return y + both[..., 2:6]


def padded(params, x):
    y = jnp.clip(conv(params, x, "c"), -0.3, 0.9)
    y = jnp.pad(y, ((0, 0), (1, 2), (0, 1), (0, 0))).transpose(0, 2, 1, 3)[:, ::-1]
    y, square = conv(params, y, "d"), (1, 2, 2, 1)
    return lax.reduce_window(y, -jnp.inf, lax.max, square, square, "VALID")


def thinned(params, x):
    """Windows that do not overlap are pooled in 32 bits, others in 8."""
    largest = lambda y, size, pad: lax.reduce_window(
        y, -jnp.inf, lax.max, (1, size, size, 1), (1, 2, 2, 1), pad
    )
    y = largest(jax.nn.relu(conv(params, x, "c")), 2, "SAME")
    y = jax.nn.relu(largest(conv(params, y, "d"), 3, "SAME"))
    return jnp.tanh(largest(conv(params, y, "e"), 2, "SAME"))


def averaged(params, x):
    y = jax.nn.relu(conv(params, x, "c"))
    return dense(params, y.mean((1, 2)), "f")


def dense_average(params, x):
    return dense(params, jax.nn.relu(dense(params, x, "a")), "b")


def attention(params, x):
    y = dense(params, x, "a")
    return jax.nn.softmax(y @ y.T) @ y


def twice(params, x):
    """One kernel, two layers."""
    y = jax.nn.relu(conv(params, x, "c"))
    return conv(params, y, "c")


@pytest.mark.parametrize("scales", ["float", "power_of_two"])
@pytest.mark.parametrize(
    ("fn", "params", "x", "steps"),
    [
        (residual, CONV, IMAGES, {Sum: 1}),
        (pooled, CONV, IMAGES, {Mean: 2}),
        (joined, CONV, IMAGES, {Joined: 1}),
        (padded, CONV, IMAGES, {Same: 3}),
        (thinned, CONV, IMAGES, {Same: 1}),
        (averaged, CONV, IMAGES, {Mean: 1}),
        (dense_average, DENSE, X, {}),
        (attention, DENSE, X, {Product: 2}),
        (twice, CONV, IMAGES, {}),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_steps_between_layers(fn, params, x, steps, scales):
    small, new = quantized(fn, params, x, scales=scales)
    kinds = [type(s.step) for s in all_exact(small, new, x)]
    for kind, least in steps.items():
        assert kinds.count(kind) >= least, kinds
    assert snr(ran(small, new, x), ran(fn, params, x)) > (25 if scales == "float" else 20)


@pytest.mark.parametrize("activations", ["static", "dynamic"])
def test_kernels_in_any_layout(activations):
    params = {"w": normal(0, 4, 3, 6), "v": normal(1, 5, 7), "u": normal(2, 3, 5)}

    def fn(params, x):
        y = jnp.einsum("bti,oit->tbo", x, params["w"].transpose(2, 0, 1))
        y = lax.dot_general(params["u"], y, (((0,), (0,)), ((), ())))  # the kernel stands first
        return jnp.einsum("ubo,uv->vbo", y, params["v"])

    x = normal(3, 8, 3, 4)
    small, new = quantized(fn, params, x, activations=activations)
    all_exact(small, new, x)
    assert snr(ran(small, new, x), ran(fn, params, x)) > 30


def test_dynamic_ranges_are_of_each_row():
    small, new = quantized(dense_average, DENSE, X, activations="dynamic")
    rows = [ran(small, new, X[i : i + 1]) for i in range(3)]
    np.testing.assert_allclose(ran(small, new, X), jnp.concatenate(rows), rtol=1e-6)
    small, new = quantized(averaged, CONV, IMAGES, activations="dynamic")
    scaled = IMAGES * jnp.array([1.0, 1000]).reshape(2, 1, 1, 1)
    np.testing.assert_allclose(ran(small, new, scaled)[0], ran(small, new, IMAGES)[0], rtol=1e-6)
    both = lambda params, x: jnp.einsum("bij,bkj->bik", x @ params["a"]["kernel"], x[..., :5])
    x = normal(0, 2, 3, 6)
    small, new = quantized(both, DENSE, x, activations="dynamic")
    scaled = x * jnp.array([1.0, 1000]).reshape(2, 1, 1)
    np.testing.assert_allclose(ran(small, new, scaled)[0], ran(small, new, x)[0], rtol=1e-6)
    assert snr(ran(small, new, x), ran(both, DENSE, x)) > 30


def test_weights_alone():
    small, new = quantized(dense_average, DENSE, X, activations="float")
    real = jx.quantize.dequantize(new)
    np.testing.assert_allclose(ran(small, new, X), ran(dense_average, real, X), rtol=1e-5)
    assert small.segments(new, X)[0].accumulator is None


def rnn(params, xs):
    def step(h, x):
        h = jnp.tanh(x @ params["a"]["kernel"] + h @ params["h"]["kernel"])
        return h, h.sum()

    return lax.scan(step, jnp.zeros((3, 5)), xs)


def stacked(params, x):
    return lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, params["w"])[0]


def branches(params, x):
    wide = lambda x: x @ params["a"]["kernel"]
    return lax.cond(x.sum() > 0, wide, lambda x: -wide(x), x)


def whiles(params, x):
    body = lambda state: (state[0] + 1, jnp.tanh(state[1] @ params["h"]["kernel"]))
    return lax.while_loop(lambda state: state[0] < 3, body, (0, x))[1]


def stateless(params, xs):
    return lax.map(lambda x: x @ params["a"]["kernel"], xs)


RNN = DENSE | {"h": {"kernel": normal(8, 5, 5) / 3}}
DEEP = {"w": normal(9, 4, 6, 6) / 2}


@pytest.mark.parametrize("activations", ["static", "dynamic", "float"])
@pytest.mark.parametrize(
    ("fn", "params", "x", "count"),
    [
        (rnn, RNN, normal(7, 4, 3, 6), 2),
        (stacked, DEEP, X, 1),
        (branches, DENSE, X, 2),
        (whiles, RNN, X[:, :5], 1),
        (stateless, DENSE, normal(7, 4, 3, 6), 1),
    ],
)
def test_loops_and_branches(fn, params, x, count, activations):
    small, new = quantized(fn, params, x, activations=activations)
    assert len(small.report.rows) == count
    assert not small.report.left
    found, expected = (jax.tree.leaves(y)[0] for y in (ran(small, new, x), ran(fn, params, x)))
    assert snr(found, expected) > 28
    text = str(jax.make_jaxpr(small)(new, x))
    assert text.count("preferred_element_type=int32") == (0 if activations == "float" else count)


def test_observers_see_every_turn_of_a_loop():
    """The last turn has the largest numbers; a grid from the first alone would clip them."""
    xs = normal(7, 4, 3, 6) * jnp.array([0.01, 0.1, 1.0, 10.0]).reshape(4, 1, 1)
    small, new = quantized(stateless, DENSE, xs)
    grid = small.report.rows[0].data
    assert grid is not None
    np.testing.assert_allclose(grid.scale * 255, 2 * jnp.abs(xs).max(), rtol=0.01)
    assert snr(ran(small, new, xs), stateless(DENSE, xs)) > 30


def test_stacked_kernels_have_scales_for_each_layer():
    _, new = quantized(stacked, DEEP, X)
    assert new["w"].scale.shape == (4, 1, 6)
    assert new["w"].values.dtype == jnp.int8


def test_the_tree():
    fn, params = ZOO[1].build()  # with batch norm
    _, new = quantized(fn, params, ZOO[1].images())
    inner = new["params"]
    assert isinstance(inner["conv1"]["kernel"], QTensor)
    assert inner["conv1"]["kernel"].scale.shape == (1, 1, 1, 4)
    assert set(inner["conv1"]) == {"kernel", "kernel_multiplier", "bias"}
    assert inner["conv1"]["bias"].dtype == jnp.float32
    assert "norm1" not in inner
    assert "batch_stats" not in new
    _, new = quantized(fn, params, ZOO[1].images(), scales="power_of_two")
    assert set(new["params"]["conv1"]) == {"kernel", "kernel_shift", "bias"}
    assert new["params"]["conv1"]["bias"].dtype == jnp.int32
    assert set(new["params"]["dense1"]) == {"kernel", "kernel_multiplier", "bias"}


def test_any_batch_size_and_dtype():
    fn, params = ZOO[1].build()
    small, new = quantized(fn, params, ZOO[1].images())
    x = normal(4, 9, 8, 8, 1)
    np.testing.assert_array_equal(ran(small, new, x)[:2], ran(small, new, x[:2]))
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), DENSE)
    small, new = quantized(dense_average, half, X.astype(jnp.bfloat16))
    out = ran(small, new, X.astype(jnp.bfloat16))
    assert out.dtype == jnp.bfloat16
    assert snr(out, ran(dense_average, DENSE, X)) > 25


def test_other_readers_of_a_kernel_read_what_it_stands_for():
    def tied(params, x):
        table = params["table"]
        return jnp.take(table, x, axis=0) @ table.T

    params, x = {"table": normal(0, 7, 4)}, jnp.array([1, 5])
    small, new = quantized(tied, params, x)
    assert new["table"].scale.shape == (7, 1)
    assert snr(ran(small, new, x), tied(params, x)) > 30


def test_a_leaf_that_is_read_by_no_layer_stays():
    params = DENSE | {"step": jnp.int32(3), "scale": jnp.float32(2)}
    small, new = quantized(lambda p, x: jnp.sin(dense_average(p, x)) * p["scale"], params, X)
    assert new["step"] is params["step"]
    assert "scale" in new
    assert snr(ran(small, new, X), 2 * jnp.sin(ran(dense_average, DENSE, X))) > 25
