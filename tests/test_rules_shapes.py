"""The rules of primitives that move, cut or join axes."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from tests.rules import case, check

A, B = (4, 3), (2, 3, 4)
FACTOR = "only one of them can shrink"
SUMS = "sums over"


def reshaped(*sizes: int) -> Callable:
    return lambda x: x.reshape(sizes)


def shuffled(x: jax.Array) -> jax.Array:
    return x.reshape(2, 3, 4).swapaxes(1, 2).reshape(2, 12)


def apart(*sizes: int) -> Callable:
    return lambda x: (x.reshape(sizes), x.max(-1))


RESHAPES = [
    case("merge", reshaped(12), [A], (FACTOR, "free"), classes=3),
    case("merge, the last pinned", apart(12), [A], ("free", "'reduce_max'"), classes=4),
    case("merge 3", reshaped(24), [B], (FACTOR, FACTOR, "free"), classes=4),
    case("merge 3 and sum", lambda x: x.reshape(24).sum(), [B], (FACTOR, FACTOR, "free")),
    case("split", reshaped(4, 3), [(12,)], "free", classes=3),
    case("split in 3", reshaped(2, 2, 2), [(8,)], "free", classes=2),
    case("merge and split", reshaped(4, 6), [B], (FACTOR, FACTOR, "free"), classes=2),
    case("beside", reshaped(4, 3, 6), [(4, 3, 2, 3)], ("free", "free", FACTOR, "free"), classes=10),
    case("sizes that do not fit", reshaped(6, 2), [A], (FACTOR, "free"), classes=1),
    case("shuffle", shuffled, [(2, 12)], "free"),
    case("to size 1", reshaped(1, 4, 1, 3), [A], "free", classes=7),
    case("from size 1", reshaped(4, 3), [(1, 4, 1, 3)], ("whole", "free") * 2, classes=7),
    case("merge with size 1", reshaped(4), [(4, 1)], ("free", "whole"), classes=4),
    case("empty", reshaped(0, 2), [(0, 3)], ("free", "an empty array")),
    case(
        "merge with an input",
        lambda x, i: (x * i[:, None]).reshape(-1),
        [(3,), jnp.arange(4)],
        "free",
        "whole",
        classes=3,
    ),
    case(
        "merge with a constant",
        lambda x: jnp.broadcast_to(x, (4, 3)).reshape(-1),
        [(3,)],
        "free",
        classes=3,
    ),
    case("there and back", lambda x: x.reshape(12).reshape(4, 3), [A], (FACTOR, "free"), classes=3),
    case(
        "there and back, with an input",
        lambda x, i: (x * i[:, None]).reshape(-1).reshape(4, 3) * x,
        [(3,), jnp.arange(4)],
        "free",
        "whole",
        classes=3,
    ),
]


def at(*indices: int, **how: Any) -> Callable:
    return lambda x: x.at[jnp.array(indices)].get(**how)


def scattered(name: str, fn: Callable = lambda x: x) -> Callable:
    return lambda x, y: getattr(x.at[jnp.array([0, 2])], name)(fn(y))


def padded(value: float, *config: tuple[int, int, int], fn: Callable = lambda x: x) -> Callable:
    return lambda x: fn(lax.pad(x, np.float32(value), config))


def along(x: jax.Array) -> jax.Array:
    return jnp.take_along_axis(x, jnp.array([[0, 1], [1, 1], [2, 0], [0, 0]]), 1)


def by_rows(x: jax.Array) -> jax.Array:
    """One known index for each row."""
    rows = lax.GatherDimensionNumbers((), (1,), (1,), (0,), (0,))
    return lax.gather(x, jnp.array([[2], [0], [1], [1]]), rows, (1, 1), mode="clip")


def joined(*parts: Any, fn: Callable = lambda x: x) -> Callable:
    """The parameters and constants, along the last axis."""
    return lambda *xs: fn(jnp.concatenate([*xs, *parts], -1))


def total(x: jax.Array) -> jax.Array:
    return x.sum(0)


def added(constant: Callable) -> Callable:
    return lambda x: x + constant()


ONES, ZEROS = np.ones((4, 2), "float32"), np.zeros((4, 2), "float32")
PICKS, TAKES = "'gather' picks", "a dynamic slice takes"
WRITES, ROWS = "writes at indices", "writes its rows"
PART, SINGLE, PADS = "writes a part of", "takes a single index", "padding crops it"

MOVES = [
    case("transpose", lambda x: x.transpose(2, 0, 1) * jnp.ones((4, 2, 3)), [B], "free", classes=9),
    case("squeeze", lambda x: lax.squeeze(x, (1,)), [(4, 1, 3)], ("free", "whole", "free")),
    case("rev", lambda x: lax.rev(x, (1,)), [A], "free", classes=7),
    case("rev meets itself", lambda x: lax.rev(x, (1,)) + x, [A], "free", classes=4 + 2),
    case("rev a constant", added(lambda: lax.rev(jnp.arange(4.0), (0,))), [(4,)], "free"),
    case("new axis", lambda x: jnp.broadcast_to(x, (2, 4)), [(4,)], "free", classes=4),
    case("new axis and sum", lambda x: jnp.broadcast_to(x, (2, 4)).sum(), [(4,)], "free"),
    case("new axis meets", lambda x, y: x + y, [(4,), (2, 4)], "free", "free", classes=6),
    case("stretch", lambda x: jnp.broadcast_to(x, (3, 4)), [(1, 4)], ("whole", "free")),
    case("stretch meets", lambda x, y: x + y, [(1, 4), (3, 4)], ("whole", "free"), "free"),
    case("concatenate", joined(), [A, (4, 2)], "free", "free", classes=4 + 5),
    case("concatenate and sum", joined(fn=jnp.sum), [A, (4, 2)], "free", "free"),
    case("concatenate meets", lambda x, y: joined()(x, x) + y, [A, (4, 6)], "free", "free"),
    case("concatenate with ones", joined(ONES), [A], "free", classes=7),
    case("concatenate with ones, sum", joined(ONES, fn=jnp.sum), [A], (SUMS, "free")),
    case(
        "concatenate with zeros, sum", joined(jnp.zeros_like(ONES), fn=total), [A], (SUMS, "free")
    ),
    case(
        "concatenate with ones, meet",
        lambda x, y: joined(ONES)(x) + y,
        [A, (4, 5)],
        "free",
        "free",
        classes=9,
    ),
    case(
        "concatenate with ones, dot",
        lambda x, y: joined(ONES)(x) @ y,
        [A, (5, 2)],
        "free",
        "free",
        classes=11,
    ),
    case(
        "concatenate with an input",
        lambda x, i: joined()(x, i * 1.0),
        [(3,), jnp.arange(4)],
        "free",
        "whole",
    ),
    case(
        "concatenate constants",
        added(lambda: jnp.concatenate([jnp.zeros(2), jnp.ones(3)])),
        [(5,)],
        "free",
    ),
    case("stack", lambda x, y: jnp.stack([x, y], 1), [A, A], "free", "free", classes=7),
    case("stack and sum", lambda x, y: jnp.stack([x, y], 1).sum(), [A, A], "free", "free"),
    case("unstack", lambda x: jnp.unstack(x, axis=1), [A], ("free", "taken apart"), classes=4),
    case("tile", lambda x: jnp.tile(x, (2, 1)), [A], "free", classes=7),
    case("tile and sum", lambda x: jnp.tile(x, (2, 3)).sum(0), [A], "free"),
    case("tile size 1", lambda x: jnp.tile(x, (2, 3)), [(1, 4)], ("whole", "free")),
    case("tile a constant", added(lambda: jnp.tile(jnp.arange(3.0), 2)), [(6,)], "free"),
    case(
        "split at",
        lambda x: jnp.split(x, [2, 3], 1),
        [(4, 6)],
        ("free", "a single index"),
        classes=9,
    ),
    case(
        "split meets itself",
        lambda x: lax.mul(*jnp.split(x, 2, 1)),
        [(4, 6)],
        "free",
        classes=4 + 3,
    ),
    case("slice", lambda x: x[1:3], [A], "free", classes=7),
    case(
        "slice in two",
        lambda x, y: jnp.vstack([x[:3], x[3:]]) * y,
        [(5, 3), (5, 3)],
        "free",
        "free",
        classes=8,
    ),
    case(
        "slice with stride",
        lambda x: lax.slice(x, (1, 0), (6, 3), (2, 1)),
        [(6, 3)],
        "free",
        classes=6 + 3,
    ),
    case("slice even and odd", lambda x: x[::2] * x[1::2], [(6, 3)], "free", classes=3 + 3),
    case("slice in thirds", lambda x: x[::3] + x[1::3] * x[2::3], [(12, 3)], "free", classes=4 + 3),
    case("slice one with stride", lambda x: x[1::3], [A], (SINGLE, "free"), classes=3 + 3),
    case("slice one", lambda x: x[2:3], [A], (SINGLE, "free"), classes=3 + 3),
    case(
        "slice a constant",
        added(lambda: lax.slice(jnp.arange(9.0), (1,), (9,), (2,))),
        [(4,)],
        "free",
    ),
    case("pad", padded(0, (1, 2, 0), (0, 0, 0)), [A], "free", classes=7),
    case("pad and sum", padded(0, (1, 2, 0), (0, 0, 0), fn=jnp.sum), [A], "free"),
    case(
        "pad and meet", lambda x, y: jnp.pad(x, (1, 2)) * y, [(4,), (7,)], "free", "free", classes=7
    ),
    case("pad with 1", padded(1, (1, 2, 0), (0, 0, 0)), [A], "free"),
    case("pad with 1, sum", padded(1, (1, 2, 0), (0, 0, 0), fn=total), [A], (SUMS, "free")),
    case(
        "pad with 1, sum the other", padded(1, (0, 0, 0), (1, 2, 0), fn=total), [A], (SUMS, "free")
    ),
    case("pad inside", padded(0, (0, 0, 1), (0, 0, 0)), [A], (PADS, "free")),
    case("pad by less than nothing", padded(0, (-1, 0, 0), (0, 1, 0)), [A], (PADS, "free")),
    case("pad with a parameter", lambda x, y: lax.pad(x, y, [(1, 1, 0)]), [(4,), ()], "free", ()),
    case("pad ones", added(lambda: jnp.pad(jnp.ones(2), 1)), [(4,)], "free"),
    case("take", lambda x: jnp.take(x, jnp.array([0, 2, 2]), axis=1), [A], "free", classes=4 + 3),
    case("permute", lambda x: x[:, np.array([2, 0, 1])] + x, [A], "free", classes=4 + 1),
    case("permute pairs", lambda x: x[jnp.array([1, 0, 3, 2])] * x, [A], "free", classes=2 + 3),
    case("take from the end", lambda x: x[jnp.array([-1, 0])], [A], "free", classes=4 + 3),
    case("take computed", lambda x: x[2 * jnp.array([0, 1]) + 1], [A], "free", classes=4 + 3),
    case("take and sum", lambda x: x[jnp.array([1, 1, 3])].sum(0), [A], "free", classes=4 + 3),
    case("take by rows", by_rows, [A], ("free", PICKS), classes=4),
    case("take outside", at(0, 9, mode="clip"), [A], (PICKS, "free")),
    case(
        "take both",
        lambda x, y: x[:, jnp.array([2, 1, 0])] @ y[jnp.array([1, 0, 2])],
        [A, (3, 2)],
        "free",
        "free",
        classes=4 + 3 + 2,
    ),
    case(
        "take by an input",
        lambda x, i: x[i],
        [A, jnp.array([[0, 1], [2, 2]])],
        (PICKS, "free"),
        "whole",
    ),
    case("fill with 7", at(0, 9, mode="fill", fill_value=7.0), [A], (PICKS, "free")),
    case(
        "fill with 7, sum",
        lambda x: at(0, 9, mode="fill", fill_value=7.0)(x).sum(1),
        [A],
        (PICKS, SUMS),
    ),
    case(
        "fill with 0, sum",
        lambda x: at(0, 9, mode="fill", fill_value=0.0)(x).sum(1),
        [A],
        (PICKS, "free"),
    ),
    case(
        "take at pairs",
        lambda x: x[jnp.array([0, 1]), jnp.array([1, 1])],
        [(4, 3, 5)],
        (PICKS, PICKS, "free"),
    ),
    case("take along", along, [A], ("free", PICKS)),
    case(
        "take at a parameter",
        lambda x, y: jnp.take(x, jnp.abs(y).astype(int), 0, mode="clip").sum(0),
        [A, (5,)],
        (PICKS, "free"),
        SUMS,
    ),
    case("take from ones", added(lambda: jnp.ones((4, 3))[jnp.array([0, 2])]), [(2, 3)], "free"),
    case("scatter-add", scattered("add"), [A, (2, 3)], (WRITES, "free"), "free", classes=5),
    case("scatter-sub", scattered("subtract"), [A, (2, 3)], (WRITES, "free"), "free"),
    case(
        "scatter",
        scattered("set"),
        [A, (2, 3)],
        (WRITES, "free"),
        (ROWS, "free"),
    ),
    case(
        "scatter-mul",
        scattered("multiply"),
        [A, (2, 3)],
        (WRITES, "free"),
        (ROWS, "free"),
    ),
    case(
        "scatter-min",
        scattered("min"),
        [A, (2, 3)],
        (WRITES, "free"),
        (ROWS, "free"),
    ),
    case(
        "scatter-max",
        scattered("max"),
        [A, (2, 3)],
        (WRITES, "free"),
        (ROWS, "free"),
    ),
    case(
        "scatter-add what is not zero",
        scattered("add", jnp.exp),
        [A, (2, 3)],
        (WRITES, "free"),
        (SUMS, "free"),
    ),
    case(
        "scatter to columns",
        lambda x, y: x.at[:, jnp.array([0, 2])].add(y),
        [A, (4, 2)],
        ("free", WRITES),
        "free",
    ),
    case(
        "scatter ones, sum", lambda x: x.at[jnp.array([0, 2])].set(1.0).sum(1), [A], (WRITES, SUMS)
    ),
    case("scatter a part", lambda x, y: x.at[0, 1:].add(y), [A, (2,)], (WRITES, PART), PART),
    case("scatter to zeros", added(lambda: jnp.zeros(4).at[2].set(5.0)), [(4,)], "free"),
    case(
        "take along, its gradient",
        lambda g: jax.vjp(along, jnp.zeros(A))[1](g),
        [(4, 2)],
        "free",
    ),
    case(
        "dynamic slice",
        lambda x, i: lax.dynamic_slice_in_dim(x, i, 2, 1),
        [A, jnp.int32(1)],
        ("free", TAKES),
        (),
    ),
    case(
        "dynamic update",
        lambda x, y: lax.dynamic_update_slice(x, y, (1, 0)),
        [A, (2, 3)],
        (PART, "free"),
        (PART, "free"),
    ),
    case(
        "dynamic update of all",
        lambda x, y: lax.dynamic_update_slice(x, y, (0, 0)),
        [A, A],
        "free",
        "free",
        classes=7,
    ),
    case(
        "dynamic update of zeros",
        added(lambda: lax.dynamic_update_slice(jnp.zeros(4), jnp.ones(2), (1,))),
        [(4,)],
        "free",
    ),
    case("bitcast", lambda x: lax.bitcast_convert_type(x, "int32").sum(0), [A], "free"),
    case("bitcast, narrower", lambda x: lax.bitcast_convert_type(x, "int8").sum(0), [A], "free"),
    case(
        "bitcast, wider",
        lambda x: lax.bitcast_convert_type(x.astype("int16"), "int32"),
        [(4, 2)],
        ("free", "bits are put"),
    ),
]


CASES = RESHAPES + MOVES


@pytest.mark.parametrize(("fn", "operands", "wanted", "classes"), CASES)
def test_removed_is_set_to_zero(fn, operands, wanted, classes):
    check(fn, operands, wanted, classes)
