"""QTensor: its invariants as properties, its values against Python numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import jaxaccel as jx
from jaxaccel._select import flatten
from jaxaccel.quantize import QTensor
from tests import oracles
from tests.models import ZOO, tiers

ARRAYS = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=2, max_dims=4, max_side=5),
    elements=st.floats(-(2.0**99), 2.0**99, width=32),
)


@given(ARRAYS)
def test_invariants(x):
    q = jx.quantize.weights({"w": jnp.asarray(x)})["w"]
    assert q.values.dtype == jnp.int8
    assert q.values.shape == x.shape
    assert q.scale.shape == (1,) * (x.ndim - 1) + x.shape[-1:]
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
        assert np.asarray(q.values[:, c]).tolist() == values
        np.testing.assert_allclose(float(q.scale[0, c]), scale, rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_dequantize_returns_to_the_type(dtype):
    params = {"kernel": jnp.linspace(-1, 1, 12, dtype=dtype).reshape(4, 3), "bias": jnp.ones(3)}
    back = jx.quantize.dequantize(jx.quantize.weights(params))
    assert back["kernel"].dtype == dtype
    assert back["bias"] is params["bias"]
    np.testing.assert_allclose(
        back["kernel"].astype(float), params["kernel"].astype(float), atol=0.02
    )


@pytest.mark.parametrize("case", tiers(ZOO))
def test_quantized_networks_stay_close_under_jit(case):
    fn, params = case.build()
    x = case.images()
    qparams = jx.quantize.weights(params)
    out = jax.jit(lambda q, x: fn(jx.quantize.dequantize(q), x))(qparams, x)
    exact = np.asarray(jax.jit(fn)(params, x))
    assert np.abs(out - exact).max() < 0.06 * np.abs(exact).max()
    kernels = [q for q in jax.tree.leaves(qparams, is_leaf=lambda n: isinstance(n, QTensor))
               if isinstance(q, QTensor)]  # fmt: skip
    assert kernels
    assert all(leaf.dtype == jnp.int8 for leaf in (q.values for q in kernels))


def test_quantizing_twice_changes_nothing():
    params = {"w": jax.random.normal(jax.random.key(0), (7, 5))}
    once = jx.quantize.weights(params)
    twice = jx.quantize.weights(jx.quantize.dequantize(once))
    assert np.array_equal(once["w"].values, twice["w"].values)


def test_a_pytree_that_jits_and_shards():
    q = jx.quantize.weights({"w": jnp.ones((8, 4))})
    assert len(jax.tree.leaves(q)) == 2
    assert jax.jit(lambda q: q)(q)["w"].dtype == "float32"
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec
    layout = {
        "w": QTensor(
            jax.sharding.NamedSharding(mesh, spec("data")),  # pyright: ignore[reportArgumentType]
            jax.sharding.NamedSharding(mesh, spec()),  # pyright: ignore[reportArgumentType]
            "float32",
        )
    }
    placed = jax.device_put(q, layout)
    assert placed["w"].values.addressable_shards[0].data.shape == (1, 4)
    np.testing.assert_allclose(jx.quantize.dequantize(placed)["w"], np.ones((8, 4)))


def test_where():
    params = {"a": jnp.ones((2, 2)), "b": jnp.ones((2, 2))}
    q = jx.quantize.weights(params, where={"a": False, "*": True})
    assert not isinstance(q["a"], QTensor)
    assert isinstance(q["b"], QTensor)


def every(path, leaf) -> bool:
    return True


@pytest.mark.parametrize(
    ("params", "options", "message"),
    [
        ({"w": jnp.ones((2, 2))}, {"bits": 4}, "bits=4 must be 8"),
        ({"b": jnp.ones(2)}, {}, "no leaf to quantize"),
        (
            {"w": jnp.ones((2, 2), int)},
            {"where": every},
            r"w: is int32 of shape \(2, 2\); leave it",
        ),
        ({"w": jnp.array([[jnp.nan]])}, {}, "w: holds NaN or infinity"),
        (jx.quantize.weights({"w": jnp.ones((2, 2))}), {"where": every}, "w: is a QTensor already"),
        ({"w": jnp.ones(4)}, {"where": every}, r"w: is float32 of shape \(4,\); leave it out"),
        (jx.quantize.weights({"w": jnp.ones((2, 2))}), {}, "no leaf to quantize"),
    ],
)
def test_bad_input(params, options, message):
    with pytest.raises(ValueError, match=message):
        jx.quantize.weights(params, **options)


def test_batch_statistics_stay_as_they_are():
    params = {"params": {"w": jnp.ones((2, 2))}, "batch_stats": {"m": jnp.ones((2, 2))}}
    q = jx.quantize.weights(params)
    assert q["batch_stats"]["m"] is params["batch_stats"]["m"]
    assert "params/w" in flatten(q, lambda n: isinstance(n, QTensor))
