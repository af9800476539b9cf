"""jx.quantize.weights: which leaves, in which form, at what cost of memory; bad input."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxaccel as jx
from jaxaccel._select import flatten
from jaxaccel.quantize import QTensor, _weights
from jaxaccel.quantize._qtensor import _in_8_bits, is_qtensor, quantized

NORMAL = {"w": jax.random.normal(jax.random.key(0), (9, 5))}


@pytest.mark.parametrize("options", [{}, {"bits": 4}, {"kind": "float8_e4m3fn"}])
def test_quantizing_inside_jit(options):
    _weights._refusal.cache_clear()
    quantize = lambda params: jx.quantize.weights(params, **options)
    # Traced, and closed over: a constant of the trace.
    traced = jax.jit(quantize)(NORMAL)["w"], jax.jit(lambda: quantize(NORMAL))()["w"]
    outside = quantize(NORMAL)["w"]
    for inside in traced:
        assert np.array_equal(inside.values, outside.values)
        assert np.array_equal(inside.scale, outside.scale)
    abstract = jax.eval_shape(quantize, NORMAL)["w"]
    assert (abstract.shape, abstract.nbytes) == (outside.shape, outside.nbytes)


def test_bytes():
    params = {"w": jax.ShapeDtypeStruct((3, 3, 64, 32), jnp.float32)}
    numbers = math.prod(params["w"].shape)

    def stored(**options) -> int:
        return jax.eval_shape(lambda p: jx.quantize.weights(p, **options), params)["w"].nbytes

    assert stored() == stored(kind="float8_e5m2") == numbers + 4 * 32
    assert stored(bits=4) == numbers * 4.5 / 8
    assert stored(bits=4, group=None) == numbers / 2 + 2 * 32


def test_small_leaves_keep_8_bits():
    x = jax.random.normal(jax.random.key(0), (64, 64))
    q = jx.quantize.weights({"first": x[:, :63], "large": x}, bits=4)
    same = jx.quantize.weights({"first": x[:, :63], "large": x}, bits=4, small=64 * 64)
    jax.tree.map(np.testing.assert_array_equal, q, same)
    every = jx.quantize.weights({"first": x[:, :63]}, bits=4, small=0)
    assert every["first"].values.dtype == jnp.uint8
    assert (q["first"].values.dtype, q["large"].values.dtype) == (jnp.int8, jnp.uint8)
    for name, alone in (
        ("first", jx.quantize.weights({"w": x[:, :63]})["w"]),
        ("large", jx.quantize.weights({"w": x}, bits=4)["w"]),
    ):
        assert np.array_equal(q[name].values, alone.values)
        assert np.array_equal(q[name].scale, alone.scale)


def test_one_leaf_at_a_time(monkeypatch):
    params = {str(i): jnp.ones((64, 64)) for i in range(5)}
    allocated = lambda: sum(array.nbytes for array in jax.live_arrays())
    live = [allocated()]

    def watched(x, **options):
        live.append(allocated())
        return quantized(x, **options)

    monkeypatch.setattr(_weights, "quantized", watched)
    jx.quantize.weights(params)
    assert len(live) == 6
    assert np.diff(live).max() <= 64 * 64 + 4 * 64 + 64  # what one leaf stores, no float copy


def test_a_leaf_is_quantized_without_a_float_copy():
    x = jax.ShapeDtypeStruct((512, 512), jnp.float32)
    compiled = _in_8_bits.lower(x, kept=(1,), kind="int", calibration="max").compile()
    memory = compiled.memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < 512 * 512


def test_where():
    params = {"a": jnp.ones((2, 2)), "b": jnp.ones((2, 2))}
    q = jx.quantize.weights(params, where={"a": False, "*": True})
    assert not isinstance(q["a"], QTensor)
    assert isinstance(q["b"], QTensor)


def every(path, leaf) -> bool:
    return True


TWO = {"w": jnp.ones((2, 2))}


@pytest.mark.parametrize(
    ("params", "options", "message"),
    [
        (TWO, {"bits": 3}, "bits=3 must be 4 or 8"),
        (TWO, {"bits": True}, "bits=True must be 4 or 8"),
        (TWO, {"kind": "nf4"}, "kind='nf4' must be one of 'int', 'float8_e4m3fn', 'float8_e5m2'"),
        (TWO, {"bits": 4, "kind": "float8_e5m2"}, "'float8_e5m2' has 8 bits; pass bits=8, or kind"),
        (TWO, {"bits": 4, "group": 0}, "group=0 must be an int >= 1, or None for one scale"),
        (TWO, {"bits": 4, "group": 1.5}, r"group=1\.5 must be an int >= 1"),
        (TWO, {"bits": 4, "group": True}, "group=True must be an int >= 1"),
        (TWO, {"group": 32}, "group=32 needs bits=4: at 8 bits a channel has one scale"),
        (TWO, {"small": 9}, "small=9 needs bits=4: at 8 bits all leaves have 8"),
        (TWO, {"bits": 4, "small": -1}, "small=-1 must be an int >= 0, a count of numbers"),
        (TWO, {"bits": 4, "small": True}, "small=True must be an int >= 0"),
        (TWO, {"calibration": "kl"}, "calibration='kl' must be 'max', 'mse' or 'auto'"),
        (
            TWO,
            {"kind": "float8_e5m2", "calibration": "mse"},
            "calibration='mse' is for kind='int'; with 'float8_e5m2' pass 'max'",
        ),
        ({"b": jnp.ones(2)}, {}, "no leaf to quantize"),
        (
            {"w": jnp.ones((2, 2), int)},
            {"where": every},
            r"w: is int32 of shape \(2, 2\); leave it",
        ),
        ({"w": jnp.array([[jnp.nan]])}, {}, "w: holds NaN or infinity"),
        ({"w": np.array([[1e300]])}, {}, "w: holds NaN or infinity in float32"),
        ({"w": jnp.array([[jnp.inf]])}, {"bits": 4}, "w: holds NaN or infinity"),
        (jx.quantize.weights(TWO), {"where": every}, "w: is a QTensor already"),
        ({"w": jnp.ones(4)}, {"where": every}, r"w: is float32 of shape \(4,\); leave it out"),
        ({"w": jnp.ones(())}, {"where": every}, r"w: is float32 of shape \(\); leave it out"),
        ({"w": 1.0}, {"where": every}, "w: is float; leave it out of where="),
        (jx.quantize.weights(TWO), {}, "no leaf to quantize"),
    ],
)
def test_bad_input(params, options, message):
    with pytest.raises(ValueError, match=message):
        jx.quantize.weights(params, **options)


def test_a_device_without_float8(monkeypatch):
    asked = []

    def refuse(x, kind):
        asked.append(kind)
        raise RuntimeError("F8E5M2 is not supported\nand a long trace")

    monkeypatch.setattr(_weights, "_there_and_back", refuse)
    _weights._refusal.cache_clear()
    for _ in range(2):
        message = r"kind='float8_e5m2': cpu has none \(F8E5M2 is not supported\); pass kind='int'"
        with pytest.raises(NotImplementedError, match=message):
            jx.quantize.weights(TWO, kind="float8_e5m2")
    assert asked == ["float8_e5m2"]
    _weights._refusal.cache_clear()


def test_batch_statistics_stay_as_they_are():
    params = {"params": {"w": jnp.ones((2, 2))}, "batch_stats": {"m": jnp.ones((2, 2))}}
    q = jx.quantize.weights(params)
    assert q["batch_stats"]["m"] is params["batch_stats"]["m"]
    assert "params/w" in flatten(q, is_qtensor)
