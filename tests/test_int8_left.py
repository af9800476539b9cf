"""What int8 leaves in floating point, and how it is named: never in silence."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

import jaxaccel as jx
from tests.models import normal
from tests.test_int8 import DEEP, DENSE, RNN, X, attention, dense, ran, snr


def read(rows) -> list[str]:
    return [row.where for row in rows]


def int8(fn, params, x, **options):
    return jx.quantize.int8(fn, params, [x], calibration="minmax", **options)


def chosen(params, x):
    turn = lambda i, h: jnp.tanh(h @ params["w"][i])
    return lax.fori_loop(0, 3, turn, x) @ params["out"]


def by_the_data(params, x):
    return jnp.einsum("bi,bio->bo", x, params["w"][jnp.argmax(x[:, :4], -1)]) @ params["out"]


def computed(params, x):
    turned = jnp.transpose(params["w"], (0, 2, 1))
    return lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, turned)[0] @ params["out"]


def constants(params, x):
    fixed = normal(9, 2, 6, 6) / 2
    return lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, fixed)[0] @ params["out"]


def condition(params, x):
    test = lambda state: (state @ params["w"][0]).max() < 1e3
    return lax.while_loop(test, lambda h: 2 * h, x) @ params["out"]


def sharded(params, x):
    inner = lambda x, w: lax.scan(lambda h, w: (h @ w, None), x, w)[0]
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    specs = {"in_specs": (P("data"), P()), "out_specs": P("data"), "check_vma": False}
    return jax.shard_map(inner, mesh=mesh, **specs)(x, params["w"]) @ params["out"]


def ragged(params, x):
    return lax.ragged_dot(x, params["w"], jnp.array([1, 1, 1, 0])) @ params["out"]


@pytest.mark.parametrize(
    ("fn", "where", "reason"),
    [
        (chosen, "w", "the data decide which part of it is its kernel"),
        (by_the_data, "w", "the data decide which part of it is its kernel"),
        (computed, "w", "its kernel is computed from w"),
        (constants, "a constant", "its kernel is computed from a constant"),
        (condition, "dot_general", "it stands in the condition of a while loop"),
        (sharded, "dot_general", "it stands inside of a shard_map"),
        (ragged, "ragged_dot_general", "there is none on integers"),
    ],
)
@pytest.mark.parametrize("activations", ["static", "dynamic", "float"])
def test_what_is_left(fn, where, reason, activations):
    params = DEEP | {"out": normal(1, 6, 3)}
    small, new = int8(fn, params, X, activations=activations)
    assert read(small.report.rows) == ["out"]
    assert [(one.where, one.reason) for one in small.report.left] == [(where, reason)]
    assert "test_int8_left.py" in small.report.left[0].source
    assert snr(ran(small, new, X), ran(fn, params, X)) > 28


def test_products_go_by_a_name():
    params = DENSE | {"o": {"kernel": normal(3, 5, 4)}}
    fn = lambda params, x: dense(params, attention(params, x), "o")
    small, _ = int8(fn, params, X)
    assert read(small.report.rows) == ["a/kernel", "dot_general_0", "dot_general_1", "o/kernel"]
    for where, taken in (
        ("o*", ["o/kernel"]),
        (lambda path, leaf: path == "o/kernel", ["o/kernel"]),
        ("dot_general_1", ["dot_general_1"]),
        ({"*_0": False, "*": True}, ["a/kernel", "dot_general_1", "o/kernel"]),
    ):
        small, _ = int8(fn, params, X, where=where)
        assert read(small.report.rows) == taken
        assert {one.reason for one in small.report.left} == {"left out by where="}
    found = jx.quantize.sensitivity(fn, params, [X], lambda fn, params: 1.0)
    names = {"a/kernel", "dot_general_0", "dot_general_1", "o/kernel"}
    assert {row.kernel for row in found.layers} == names


def test_a_branch_that_calibration_does_not_take():
    fn = lambda params, x: lax.cond(x[0, 0] > 0, lambda x: dense(params, x, "a"), jnp.sin, x)
    small = {"a": {"kernel": normal(0, 6, 6)}}
    with pytest.raises(
        ValueError, match="and that enter the loop or the branch in which it stands"
    ):
        int8(fn, small, -jnp.abs(X))
    small, _ = jx.quantize.int8(fn, small, [-jnp.abs(X), jnp.abs(X)])
    assert read(small.report.rows) == ["a/kernel"]


def test_loops_keep_what_is_known_of_their_parameters():
    small, _ = int8(lambda params, xs: lax.map(lambda x: x @ params["h"]["kernel"], xs), RNN,
                    normal(7, 4, 3, 5))  # fmt: skip
    assert read(small.report.rows) == ["h/kernel"]
    assert not small.report.left
