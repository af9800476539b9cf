"""The rules of loops, branches and calls, and of what is generated or stays as it is."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint
from jax.extend.random import threefry_2x32
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from tests.rules import case, check

A = (4, 3)
SUMS, SCANNED = "sums over", "a scan runs over it"
XS = (SCANNED, "free")


def rnn(keep: Callable = jnp.tanh) -> Callable:
    """Of a kernel and inputs: the last state and all states."""
    return lambda w, x: lax.scan(lambda h, row: (keep(row @ w + h), h), jnp.zeros(4), x)


def last(fn: Callable) -> Callable:
    return lambda *xs: fn(*xs)[0].sum()


def recurrent(w: Any, u: Any, h: Any, x: Any) -> Any:
    return lax.scan(lambda h, row: (jnp.tanh(row @ w + h @ u), h), h, x)


def slowly(w: jax.Array) -> Any:
    """The second state is zero where masked for one turn only."""
    return lax.scan(lambda c, _: ((jnp.cos(w), c[0]), None), (w, w), None, length=3)[0][::-1]


def swapping(a: Any, b: Any) -> Any:
    return lax.scan(lambda c, _: ((c[1], c[0]), None), (a, b), None, length=3)[0]


def counted(x: Any) -> Any:
    return lax.scan(lambda c, _: (2 * c, c), jnp.arange(4.0), None, length=3)[0] + x


def onto_input(x: Any, i: Any) -> Any:
    return lax.scan(lambda c, _: (c + x, None), i * 1.0, None, length=3)[0]


def until(condition: Callable) -> Callable:
    return lambda x: lax.while_loop(condition, lambda x: 2 * x, jnp.abs(x) + 0 * x)


def doubled(x: Any) -> Any:
    return lax.while_loop(lambda s: s[0] < 3, lambda s: (s[0] + 1, s[1] * 2), (0, x))[1].sum(0)


LOOPS = [
    case("scan from zeros", rnn(), [(3, 4), (5, 3)], "free", XS, classes=3 + 4),
    case("scan, the last state", last(rnn()), [(3, 4), (5, 3)], "free", XS),
    case("scan loses zero", last(rnn(jnp.cos)), [(3, 4), (5, 3)], ("free", SUMS), XS),
    case("scan loses zero slowly", last(slowly), [(4,)], SUMS),
    case(
        "scan from a parameter",
        recurrent,
        [(3, 4), (4, 4), (4,), (5, 3)],
        "free",
        "free",
        "free",
        XS,
        classes=3 + 4,
    ),
    case(
        "scan, all states",
        lambda w, x: rnn()(w, x)[1].sum(1),
        [(3, 4), (5, 3)],
        "free",
        XS,
    ),
    case(
        "scan backwards",
        lambda w: lax.scan(lambda c, _: (c + w, c), w, None, length=3, reverse=True)[1].sum(1),
        [(4,)],
        "free",
    ),
    case("scan swaps", swapping, [(4,), (4,)], "free", "free", classes=4),
    case("scan of a constant", counted, [(4,)], "free"),
    case("scan of an input", onto_input, [(4,), jnp.arange(4)], "stays whole", "whole"),
    case("while", doubled, [A], "free", classes=7),
    case("while a sum is small", until(lambda x: x.sum() < 9), [(4,)], "free"),
    case("while a maximum is small", until(lambda x: x.max() < 9), [(4,)], "'reduce_max'"),
    case("while no zeros are summed", until(lambda x: jnp.exp(x).sum() < 30), [(4,)], SUMS),
    case("fori", lambda x: lax.fori_loop(0, 3, lambda i, s: s + jnp.sin(s), x), [A], "free"),
    case(
        "fori by a parameter",
        lambda x, w: lax.fori_loop(0, 3, lambda i, s: s @ w, x),
        [(4, 3), (3, 3)],
        "free",
        "free",
        classes=4 + 3,
    ),
]


def cond(one: Callable, other: Callable) -> Callable:
    return lambda *xs: lax.cond(jnp.array(True), one, other, *xs)


def first(x: Any, *_: Any) -> Any:
    return x


def second(x: Any, y: Any) -> Any:
    return y


@jax.custom_vjp
def times_sine(x: jax.Array, y: jax.Array) -> jax.Array:
    return x * jnp.sin(y)


times_sine.defvjp(lambda x, y: (x * jnp.sin(y), (x, y)), lambda r, g: (g * r[1], g * r[0]))


@jax.custom_jvp
def reversing(x: jax.Array) -> jax.Array:
    """Its derivative ties what it does not."""
    return 2 * x


reversing.defjvp(lambda x, t: (2 * x[0], 2 * t[0][..., ::-1]))


@jax.custom_jvp
def not_zero(x: jax.Array) -> jax.Array:
    """Its derivative is not zero where it is: the sine of itself and more."""
    return 2 * x


not_zero.defjvp(lambda x, t: (2 * x[0], 2 * t[0] + jnp.cos(x[0]) * t[0].sum(-1, keepdims=True)))


def gradient(fn: Callable) -> Callable:
    return lambda *xs: jax.grad(lambda xs: fn(*xs).sum())(xs)


def total(fn: Callable) -> Callable:
    return lambda *xs: fn(*xs).sum()


def remembered(x: jax.Array, w: jax.Array) -> jax.Array:
    """Its gradient has a closed call for what no turn of the loop changes."""
    turns = lambda x, w: lax.scan(lambda c, _: (c * w + jnp.sin(2 * w), None), x, None, length=3)
    keep = jax.checkpoint_policies.everything_saveable
    return jax.checkpoint(turns, policy=keep)(x, w)[0]


CALLS = [
    case("cond", cond(first, second), [(4,), (4,)], "free", "free", classes=4),
    case("cond, a branch not zero", total(cond(jnp.exp, first)), [(4,)], SUMS),
    case("cond, a constant branch", cond(first, lambda x: jnp.arange(4.0)), [(4,)], "free"),
    case("cond, a zero branch", total(cond(first, jnp.zeros_like)), [(4,)], "free"),
    case("cond by a parameter", lambda x: lax.cond(x.sum() > 0, first, jnp.sin, x), [A], "free"),
    case(
        "cond of constants",
        lambda x: x + lax.cond(x.sum() > 0, lambda: jnp.arange(4.0), lambda: jnp.ones(4)),
        [(4,)],
        "free",
    ),
    case("switch", lambda x: lax.switch(1, [jnp.sin, jnp.tan, first], x), [A], "free"),
    case(
        "switch by an input",
        lambda x, i: lax.switch(i, [jnp.sin, jnp.tan, first], x).sum(),
        [A, jnp.int32(2)],
        "free",
        (),
    ),
    case("jit", total(jax.jit(lambda x: 2 * jax.jit(jnp.sin)(x))), [A], "free"),
    case(
        "remat",
        jax.checkpoint(lambda x, w: jnp.sin(x @ w)),
        [(4, 3), (3, 2)],
        "free",
        "free",
        classes=9,
    ),
    case("relu", total(jax.nn.relu), [A], "free"),
    case("silu", total(jax.nn.silu), [A], "free"),
    case("gelu", total(jax.nn.gelu), [A], "free"),
    case("softplus", total(jax.nn.softplus), [(4,)], SUMS),
    case("silu, its gradient", gradient(jax.nn.silu), [A], "free"),
    case("custom jvp that reverses", lambda x: reversing(x), [(4,)], "free", classes=2),
    case("custom jvp that is not zero", total(not_zero), [(4,)], SUMS),
    case("custom jvp, its gradient", gradient(lambda x: reversing(x) ** 2), [(4,)], "free"),
    case("custom vjp", total(times_sine), [A, A], "free", "free", classes=7),
    case("custom vjp, its gradient", gradient(times_sine), [A, A], "free", "free"),
    case(
        "remat of a scan, its gradient",
        gradient(remembered),
        [A, A],
        "free",
        "free",
    ),
    case("no rule", jnp.linalg.cholesky, [jnp.eye(3)], "'cholesky' has no rule"),
    case("no rule for constants", lambda x: x @ jnp.linalg.cholesky(jnp.eye(3)), [A], "free"),
]

KEY = jax.random.key(0)
HERE, EXPLICIT = (
    NamedSharding(jax.make_mesh((1,), ("data",), axis_types=(kind,)), PartitionSpec())
    for kind in (AxisType.Auto, AxisType.Explicit)
)


def noise(draw: Callable) -> Callable:
    """A draw for each element of the parameter, that may not depend on how many are left."""
    return lambda x: x + draw(x.shape)


def bits(shape: tuple[int, ...]) -> jax.Array:
    return lax.rng_bit_generator(jnp.arange(4, dtype="uint32"), shape)[1] % 100


def threefry(shape: tuple[int, ...]) -> jax.Array:
    key, counts = jnp.arange(2, dtype="uint32"), jnp.arange(12, dtype="uint32")
    return threefry_2x32(key, counts).reshape(shape) % 100


GENERATED = [
    case("iota", lambda x: x * jnp.arange(3.0), [A], "free"),
    case("iota along rows", lambda x: x + lax.broadcasted_iota("float32", (4, 3), 0), [A], "free"),
    case("uniform", noise(lambda s: jax.random.uniform(KEY, s)), [A], "free"),
    case("normal", noise(lambda s: jax.random.normal(jax.random.fold_in(KEY, 2), s)), [A], "free"),
    case(
        "split",
        noise(lambda s: jax.random.normal(jax.random.split(jax.random.clone(KEY))[0], s)),
        [A],
        "free",
    ),
    case(
        "an old key",
        noise(lambda s: jax.random.uniform(jax.random.fold_in(jax.random.PRNGKey(1), 1), s)),
        [A],
        "free",
    ),
    case("gamma", noise(lambda s: jax.random.gamma(KEY, 2.0, s)), [A], "free"),
    case(
        "gamma of a parameter",
        lambda x: jax.random.gamma(KEY, jnp.exp(x)),
        [(3,)],
        "needs all of its operand",
    ),
    case(
        "dropout",
        lambda x: jnp.where(jax.random.bernoulli(KEY, 0.5, x.shape), x, 0).sum(0),
        [A],
        "free",
    ),
    case("threefry", noise(threefry), [A], "free"),
    case("bit generator", noise(bits), [A], "free"),
    case("rng_uniform", lambda x: x + 0 * lax.rng_uniform(0.0, 1.0, x.shape), [A], "free"),
    case(
        "a key as an operand", lambda x, k: x + jax.random.uniform(k, x.shape), [A, KEY], "free", ()
    ),
    case("empty", lambda x: x + 0 * lax.empty(x.shape, "int32"), [A], "free"),
]

UNCHANGED = [
    case(
        "barrier",
        lambda x, y: lax.optimization_barrier((x, y)),
        [(4,), (3,)],
        "free",
        "free",
        classes=7,
    ),
    case("layout constraint", lambda x: with_layout_constraint(x, Layout((1, 0))), [A], "free"),
    case("reshard", total(lambda x: jax.sharding.reshard(x, EXPLICIT)), [A], "free"),
    case("device_put", total(jax.device_put), [A], "free"),
    case(
        "sharding constraint", total(lambda x: lax.with_sharding_constraint(x, HERE)), [A], "free"
    ),
]


def over_rows(collective: Callable) -> Callable:
    return lambda x: jax.vmap(lambda row: collective(row, "rows"), axis_name="rows")(x)


# Merely conservative: the columns could go.
COLLECTIVES = [
    case(name, over_rows(getattr(lax, name)), [A], f"'{name}' over an array axis")
    for name in ("psum", "pmax", "pmin")
]

CASES = COLLECTIVES + LOOPS + CALLS + GENERATED + UNCHANGED


@pytest.mark.parametrize(("fn", "operands", "wanted", "classes"), CASES)
def test_removed_is_set_to_zero(fn, operands, wanted, classes):
    check(fn, operands, wanted, classes)
