"""QTensor: its invariants as properties, its values against Python numbers."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import jaxaccel as jx
from jaxaccel._select import flatten
from jaxaccel.quantize import QTensor
from jaxaccel.quantize._qtensor import is_qtensor, quantized
from tests import oracles
from tests.models import ZOO, tiers

# Subnormals are flushed to zero by XLA; a scale takes some of float32's range below 2^-100.
NUMBERS = st.floats(-(2.0**99), 2.0**99, width=32, allow_subnormal=False).map(
    lambda v: v if abs(v) > 2.0**-100 else 0.0
)
ARRAYS = hnp.arrays(
    np.float32, hnp.array_shapes(min_dims=2, max_dims=4, max_side=5), elements=NUMBERS
)


def spread(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    """Numbers of all sizes: no two scales agree."""
    return np.random.default_rng(seed).standard_t(2, shape).astype(np.float32)


SPREAD = st.builds(spread, st.integers(0, 99), hnp.array_shapes(min_dims=2, max_dims=4, max_side=5))
GROUPS = st.none() | st.integers(1, 9)
FLOAT8 = {"float8_e4m3fn": (4, 3, 448.0), "float8_e5m2": (5, 2, 57344.0)}


def close(bound):
    """And what float32 division may add."""
    return bound * (1 + 1e-4)


@given(ARRAYS)
def test_invariants(x):
    q = jx.quantize.weights({"w": jnp.asarray(x)})["w"]
    assert q.values.dtype == jnp.int8
    assert q.values.shape == q.shape == x.shape
    assert q.scale.shape == (1,) * (x.ndim - 1) + x.shape[-1:]
    assert q.scale.dtype == jnp.float32
    values, scale = np.asarray(q.values, np.float64), np.asarray(q.scale, np.float64)
    assert np.abs(values).max() <= 127
    assert (scale > 0).all()
    # Half a step, and what float32 division may add to it; subnormals are flushed to zero.
    assert (np.abs(x - values * scale) <= scale * (0.5 + 1e-4)).all()
    assert (values[x == 0] == 0).all()


@given(hnp.arrays(np.float32, st.tuples(st.integers(1, 6), st.integers(1, 4)),
                  elements=st.integers(-1000, 1000).map(lambda i: i / 64)))  # fmt: skip
def test_values_and_scales_against_python(x):
    q = jx.quantize.weights({"w": jnp.asarray(x)})["w"]
    for c in range(x.shape[1]):
        values, scale = oracles.quantize_channel(x[:, c])
        # XLA divides by a scalar through its reciprocal: half a step goes either way.
        near = [oracles.nearest_codes(float(v) / scale) for v in x[:, c]]
        found = np.asarray(q.values[:, c]).tolist()
        assert all(f == v or {f, v} <= n for f, v, n in zip(found, values, near, strict=True))
        np.testing.assert_allclose(float(q.scale[0, c]), scale, rtol=1e-6)


@settings(max_examples=8)
@given(SPREAD, st.data())
def test_axes_keep_scales_of_their_own(x, data):
    axes = data.draw(st.sets(st.integers(0, x.ndim - 1), min_size=1, max_size=x.ndim - 1))
    drawn = tuple(a - x.ndim if data.draw(st.booleans()) else a for a in axes)
    q = quantized(jnp.asarray(x), drawn)
    assert q.scale.shape == tuple(size if a in axes else 1 for a, size in enumerate(x.shape))
    for group in oracles.groups_of(x, tuple(sorted(axes)), None):
        largest = max(abs(float(x[i])) for i in group)
        scale = float(np.broadcast_to(q.scale, x.shape)[group[0]])
        assert scale == pytest.approx(largest / 127 if largest else 1, rel=1e-6)
        codes = np.asarray(q.values)
        assert all(int(codes[i]) in oracles.nearest_codes(float(x[i]) / scale) for i in group)


@settings(max_examples=8)
@example(spread(0, (3, 7, 2)), 4, "max")
@example(spread(1, (61, 3)), None, "mse")
@given(ARRAYS | SPREAD, GROUPS, st.sampled_from(["max", "mse"]))
def test_invariants_of_4_bits(x, group, calibration):
    params = {"w": jnp.asarray(x)}
    q = jx.quantize.weights(params, 4, group=group, small=0, calibration=calibration)["w"]
    rows, channels = x.size // x.shape[-1], x.shape[-1]
    size = group or rows
    assert q.values.dtype == jnp.uint8
    assert q.values.shape == (-(-rows // 2), channels)
    assert q.scale.dtype == jnp.bfloat16
    assert q.scale.shape == (-(-rows // size), channels)
    assert (q.shape, q.ndim) == (x.shape, x.ndim)
    assert q.nbytes == channels * (-(-rows // 2) + 2 * -(-rows // size))
    nibbles = np.asarray(q.values)
    assert ((nibbles & 15 > 0) & (nibbles >> 4 > 0)).all()
    scale, back = np.asarray(q.scale, np.float64), np.asarray(q.dequantize(), np.float64)
    # Group after group of each channel: as the scales read from top to bottom, left to right.
    groups = oracles.groups_of(x, (x.ndim - 1,), size)
    for step, where in zip(scale.T.reshape(-1), groups, strict=True):
        numbers = np.array([float(x[i]) for i in where])
        errors = np.abs([float(back[i]) - float(x[i]) for i in where])
        full = np.abs(numbers).max() / 7 or 1
        if calibration == "max":
            assert step == pytest.approx(full, rel=2**-8)
            assert errors.max() <= close(step / 2)
        else:
            assert 0.3 * full * (1 - 2**-8) <= step <= full * (1 + 2**-8)
            assert (errors <= close(np.maximum(step / 2, np.abs(numbers) - 7 * step))).all()
        assert step == 1 or numbers.any()
    assert (back[x == 0] == 0).all()


@settings(max_examples=8)
@example(spread(0, (5, 3, 4)), 4, 1, 1)
@example(spread(0, (3, 2, 3, 2)), 2, 3, 2)
@given(SPREAD, GROUPS, st.integers(0, 3), st.integers(1, 3))
def test_unpacking_is_exact_under_jit(x, group, first, count):
    axes = tuple(sorted({(first + i) % x.ndim for i in range(count)}))
    q = quantized(jnp.asarray(x), axes[::-1], bits=4, group=group)
    assert q.packing is not None
    where = (np.asarray(q.scale), x.shape, axes, q.packing.group)
    expected = oracles.unpacked(np.asarray(q.values), *where)
    assert np.array_equal(jax.jit(QTensor.dequantize)(q), expected)
    steps = oracles.unpacked(np.full(q.values.shape, 0x99), *where)  # every code is 1
    assert (np.abs(expected - x) <= close(steps / 2)).all()


@pytest.mark.parametrize(("bits", "group"), [(4, 3), (4, 16), (4, None), (8, None)])
@pytest.mark.parametrize("size", [1e-25, 1.0, 1e25])  # whose squares float32 cannot hold
def test_mse_finds_the_least_error(bits, group, size):
    x = np.random.default_rng(0).standard_t(3, (70, 3)).astype(np.float32) * np.float32(size)
    squares = {}
    for calibration in ("max", "mse"):
        q = quantized(jnp.asarray(x), bits=bits, group=group, calibration=calibration)
        squares[calibration] = (np.asarray(q.dequantize(), np.float64) - x) ** 2
    largest, digits = {4: (7, 8), 8: (127, 24)}[bits]
    for where in oracles.groups_of(x, (1,), group):
        found = {name: sum(square[i] for i in where) for name, square in squares.items()}
        best = oracles.least_squared_error([float(x[i]) for i in where], largest, digits)
        assert best * 0.999 <= found["mse"] <= best * 1.001
        assert found["mse"] <= found["max"] * 1.00001


def test_mse_lowers_the_error_of_normal_weights():
    x = jax.random.normal(jax.random.key(0), (512, 64))

    def error(**options) -> float:
        back = jx.quantize.weights({"w": x}, bits=4, **options)["w"].dequantize()
        return float(np.linalg.norm(back - x) / np.linalg.norm(x))

    assert 0.096 < error(calibration="max") < 0.099
    assert 0.090 < error() < 0.094


@pytest.mark.parametrize("kind", FLOAT8)
@settings(max_examples=8)
@given(x=ARRAYS | SPREAD)
def test_invariants_of_float8(kind, x):
    exponent, mantissa, largest = FLOAT8[kind]
    q = jx.quantize.weights({"w": jnp.asarray(x)}, kind=kind)["w"]
    assert q.values.dtype == kind
    assert q.values.shape == q.shape == x.shape
    assert q.scale.shape == (1,) * (x.ndim - 1) + x.shape[-1:]
    values, scale = np.asarray(q.values, np.float64), np.asarray(q.scale, np.float64)
    peak = np.abs(x).max(tuple(range(x.ndim - 1)), keepdims=True)
    np.testing.assert_allclose(scale, np.where(peak > 0, peak / largest, 1), rtol=1e-6)
    assert (np.abs(values).max(tuple(range(x.ndim - 1)), keepdims=True)[peak > 0] == largest).all()
    numbers = np.array(oracles.float8_numbers(exponent, mantissa, largest))
    quotient = np.abs(x / scale)
    off = np.abs(quotient[..., None] - numbers).min(-1)
    assert (np.abs(quotient - np.abs(values)) <= off + 1e-6 * quotient).all()
    assert (values * x >= 0).all()
    spacing = 2.0 ** (2 - 2 ** (exponent - 1) - mantissa)
    bound = np.maximum(np.abs(x) * 2.0 ** -(mantissa + 1), scale * spacing / 2)
    assert (np.abs(x - values * scale) <= close(bound)).all()
    assert (values[x == 0] == 0).all()


# One shape, so that each form is compiled once: nine rows, an odd number, in three ragged groups.
FORMS = [{}, {"bits": 4, "group": 4}, {"kind": "float8_e4m3fn"}]
NORMAL = {"w": jax.random.normal(jax.random.key(0), (9, 5))}


@pytest.mark.parametrize("options", FORMS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_dequantize_returns_to_the_type(dtype, options):
    params = {"kernel": jnp.linspace(-1, 1, 45, dtype=dtype).reshape(9, 5), "bias": jnp.ones(3)}
    back = jx.quantize.dequantize(jx.quantize.weights(params, **options))
    assert back["kernel"].dtype == dtype
    assert back["kernel"].shape == (9, 5)
    assert back["bias"] is params["bias"]
    np.testing.assert_allclose(
        back["kernel"].astype(float), params["kernel"].astype(float), atol=0.11 if options else 0.02
    )


@pytest.mark.parametrize("options", FORMS)
def test_float64(options):
    params = {"w": np.linspace(-1, 1, 45).reshape(9, 5)}
    assert jx.quantize.dequantize(jx.quantize.weights(params, **options))["w"].dtype == jnp.float32
    with jax.enable_x64(True):
        q = jx.quantize.weights(params, **options)["w"]
        assert q.dequantize().dtype == jnp.float64
        assert q.scale.dtype.itemsize <= 4


@pytest.mark.parametrize("options", FORMS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_the_largest_numbers_stay_finite(dtype, options):
    signs = np.ones((9, 5)) * [1, -1, 0, -1, 1]
    x = jnp.asarray(signs, dtype) * jnp.finfo(dtype).max
    back = jx.quantize.dequantize(jx.quantize.weights({"w": x}, **options))["w"]
    shares = np.asarray(back, float) / float(jnp.finfo(dtype).max)
    np.testing.assert_allclose(shares, signs, rtol=0.01)


@pytest.mark.parametrize("options", FORMS)
@pytest.mark.parametrize("shape", [(0, 4), (3, 0)])
def test_empty_arrays(shape, options):
    q = jx.quantize.weights({"w": jnp.ones(shape)}, **options)["w"]
    assert q.shape == q.dequantize().shape == shape


@pytest.mark.parametrize("case", tiers(ZOO))
def test_quantized_networks_stay_close_under_jit(case):
    fn, params = case.build()
    x = case.images()
    qparams = jx.quantize.weights(params)
    out = jax.jit(lambda q, x: fn(jx.quantize.dequantize(q), x))(qparams, x)
    exact = np.asarray(jax.jit(fn)(params, x))
    assert np.abs(out - exact).max() < 0.06 * np.abs(exact).max()
    kernels = [q for q in flatten(qparams, is_qtensor).values() if isinstance(q, QTensor)]
    assert kernels
    assert all(leaf.dtype == jnp.int8 for leaf in (q.values for q in kernels))


@pytest.mark.parametrize("options", FORMS)
def test_quantizing_twice_changes_nothing(options):
    once = jx.quantize.weights(NORMAL, **options)
    twice = jx.quantize.weights(jx.quantize.dequantize(once), **options)
    assert np.array_equal(once["w"].values, twice["w"].values)


def sharding(*spec) -> Any:
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))


@pytest.mark.parametrize("options", FORMS)
def test_a_pytree_that_jits_and_shards(options):
    q = jx.quantize.weights({"w": jnp.ones((6, 16)), "b": jnp.ones(3)}, **options)
    assert len(jax.tree.leaves(q)) == 3
    assert jax.jit(lambda q: q)(q)["w"].dtype == "float32"
    layout = jax.tree.map(lambda _: sharding(), q)
    channels = sharding(None, "data")
    layout["w"] = dataclasses.replace(layout["w"], values=channels, scale=channels)
    placed = jax.device_put(q, layout)
    assert placed["w"].values.addressable_shards[0].data.shape[1] == 2
    back = jx.quantize.dequantize(placed)["w"]
    assert back.addressable_shards[0].data.shape == (6, 2)
    np.testing.assert_allclose(back, np.ones((6, 16)), rtol=0.01)


def test_a_layout_is_written_by_hand():
    q = jx.quantize.weights({"w": jnp.ones((8, 4))})
    placed = jax.device_put(q, {"w": QTensor(sharding("data"), sharding(), "float32")})
    assert placed["w"].values.addressable_shards[0].data.shape == (1, 4)
    np.testing.assert_allclose(jx.quantize.dequantize(placed)["w"], np.ones((8, 4)))


@pytest.mark.parametrize("options", FORMS)
def test_saving_without_pickle(options, tmp_path):
    q = jx.quantize.weights(NORMAL, **options)
    leaves, structure = jax.tree.flatten(q)
    # NumPy's files know neither bfloat16 nor float8: their bytes are kept as whole numbers.
    raw = [np.asarray(leaf).view(f"u{leaf.dtype.itemsize}") for leaf in leaves]
    np.savez(tmp_path / "q.npz", *raw)
    with np.load(tmp_path / "q.npz", allow_pickle=False) as file:
        loaded = [file[f"arr_{i}"].view(leaf.dtype) for i, leaf in enumerate(leaves)]
    back = jax.tree.unflatten(structure, loaded)
    expected = jx.quantize.dequantize(q)["w"]
    assert np.array_equal(jx.quantize.dequantize(jax.tree.map(jnp.asarray, back))["w"], expected)
