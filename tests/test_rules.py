"""The rules of elementwise primitives, and that every rule is tested."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import primitives

from jaxaccel._rules import _table
from tests import test_rules_loops, test_rules_products, test_rules_reductions, test_rules_shapes
from tests.rules import case, check, names, shape

RANDOM = np.random.default_rng(0)
# Signs differ between the columns only: a column's sum is never undefined for one bad number.
CONSTANT = RANDOM.uniform(0.1, 0.9, (4, 3)).astype("float32") * np.array([1, -1, 1], "float32")


def positive(low: float = 0.1) -> jax.Array:
    return jnp.asarray(RANDOM.uniform(low, low + 0.8, (4, 3)), "float32")


def whole(fn: Callable) -> Callable:
    """`fn` of the operands as integers."""
    return lambda *xs: fn(*((10 * x).astype("int32") for x in xs))


def bind(name: str, **params) -> Callable:
    return lambda *xs: getattr(primitives, name).bind(*xs, **params)


def words(names: str) -> list[str]:
    return names.split()


# Of one operand; None: the function of that name in jax.lax.
UNARY: dict[str, Callable | None] = {
    **dict.fromkeys(
        words(
            "abs acos acosh asin asinh atan atanh bessel_i0e bessel_i1e cbrt ceil cos cosh digamma "
            "erf erf_inv erfc exp exp2 expm1 floor is_finite lgamma log log1p logistic neg round "
            "rsqrt sign sin sinh sqrt square stop_gradient tan tanh"
        )
    ),
    "clz": whole(lax.clz),
    "conj": lambda x: lax.imag(lax.conj(x.astype("complex64"))),
    "convert_element_type": lambda x: (3 * x).astype("int32"),
    "copy": jnp.copy,
    "imag": lambda x: lax.imag(1j * x),
    "integer_pow": lambda x: lax.integer_pow(x, 3),
    "integer_pow 0": lambda x: lax.integer_pow(x, 0),
    "integer_pow -2": lambda x: lax.integer_pow(x, -2),
    "log2": jnp.log2,
    "name": lambda x: checkpoint_name(x, "here"),
    "not": whole(lax.bitwise_not),
    "not of bool": lambda x: ~(x > 0.5),
    "one_minus_square": getattr(lax, "one_minus_square", lambda x: 1 - x * x),
    "population_count": whole(lax.population_count),
    "real": lambda x: lax.real(x.astype("complex64")),
    "reduce_precision": lambda x: lax.reduce_precision(x, 5, 2),
}

BINARY: dict[str, Callable | None] = {
    **dict.fromkeys(
        words(
            "add atan2 div eq ge gt igamma igammac le lt max min mul ne nextafter polygamma pow "
            "rem sub zeta"
        )
    ),
    "add_any": bind("add_jaxvals_p"),
    "and": whole(lax.bitwise_and),
    "complex": lambda x, y: jnp.abs(lax.complex(x, y)),
    "eq_to": bind("eq_to_p"),
    "le_to": bind("le_to_p"),
    "lt_to": bind("lt_to_p"),
    "mulhi": whole(lax.mulhi),
    "or": whole(lax.bitwise_or),
    "shift_left": whole(lax.shift_left),
    "shift_right_arithmetic": whole(lax.shift_right_arithmetic),
    "shift_right_logical": whole(lax.shift_right_logical),
    "xor": whole(lax.bitwise_xor),
}

# The table knows these to be zero nowhere, though they are at zero.
CONSERVATIVE = {"atan2", "complex", "mulhi", "nextafter"}


def summable(values: jax.Array) -> str:
    return "sums over" if np.any(np.asarray(values)) else "free"


@pytest.mark.parametrize("name", UNARY)
def test_a_function_may_be_summed_over_if_it_is_zero_at_zero(name):
    fn = UNARY[name] or getattr(lax, name)
    x = positive(1.1 if name == "acosh" else 0.1)
    check(lambda x: fn(x).sum(0), [x], [(summable(fn(jnp.zeros(2))), "free")])


@pytest.mark.parametrize("name", BINARY)
def test_a_function_of_two_may_be_summed_over_if_it_is_zero_at_zero(name):
    """Of two parameters, of one and a constant, of a constant and one."""
    fn, c, zero = BINARY[name] or getattr(lax, name), jnp.asarray(CONSTANT), jnp.zeros((4, 3))

    def three(x, y, z, w):
        return fn(x, y).sum(0), fn(z, c).sum(0), fn(c, w).sum(0)

    divides = name in ("div", "rem")  # the divisor is not masked, and no constant zero
    both = [fn(zero, c) if divides else fn(zero, zero)]
    right = [fn(zero, c), *([] if divides else both)]
    left = [fn(c, zero), *both]
    both, right, left = (
        "sums over" if name in CONSERVATIVE else summable(jnp.stack(at))
        for at in (both, right, left)
    )
    wanted = [(word, "free") for word in (both, both, right, left)]
    check(three, [positive() for _ in range(4)], wanted)


def test_functions_taken_for_non_zero_though_they_are_zero_at_zero():
    zero = jnp.zeros(2)
    for name in CONSERVATIVE:
        fn = BINARY[name] or getattr(lax, name)
        assert summable(fn(zero, zero)) == "free"


A = (4, 3)
SUMS = ("sums over", "free")
INPUT = jnp.arange(1, 5)


def clamped(low: float, high: float) -> Callable:
    return lambda x: lax.clamp(low, x, high).sum(0)


def summed(fn: Callable) -> Callable:
    return lambda *xs: fn(*xs).sum(0)


def constantly(fn: Callable, number: float) -> Callable:
    """Of no zeros, times a constant less one: zero only if the constant is one."""
    return lambda x: (jnp.cos(x) * (fn(jnp.full((4, 3), number)) - 1)).sum(0)


def undefined(fn: Callable) -> Callable:
    return lambda x, y, w: fn(jnp.abs(x), jnp.abs(y)) @ w


ELEMENTWISE = [
    case("clamp around 0", clamped(-1.0, 1.0), [A], "free"),
    case("clamp from 0", clamped(0.0, 6.0), [A], "free"),
    case("clamp above 0", clamped(0.5, 1.0), [A], SUMS),
    case("max with 0", summed(lambda x: jnp.maximum(x, 0.0)), [A], "free"),
    case("max with 1", summed(lambda x: jnp.maximum(x, 1.0)), [A], SUMS),
    case("add 0", summed(lambda x: x + 0.0), [A], "free"),
    case("add 1", summed(lambda x: x + 1.0), [A], SUMS),
    case("greater than 0", summed(lambda x: x > 0.0), [A], "free"),
    case("greater than -1", summed(lambda x: x > -1.0), [A], SUMS),
    case("power 2.0", summed(lambda x: lax.pow(jnp.abs(x), 2.0)), [A], "free"),
    case("power 0.0", summed(lambda x: lax.pow(jnp.abs(x), 0.0)), [A], SUMS),
    case("power -0.5", summed(lambda x: lax.pow(jnp.abs(x), -0.5)), [A], SUMS),
    case("integer power of a constant", summed(lambda x: x * lax.integer_pow(3.0, 0)), [A], "free"),
    case("add a scalar parameter", summed(lax.add), [A, ()], SUMS, ()),
    case("multiply by a scalar parameter", summed(lax.mul), [A, ()], "free", ()),
    case("clamp by scalar parameters", summed(lax.clamp), [(), A, ()], (), SUMS, ()),
    case("a factor not zero", summed(lambda x, y: jnp.exp(x) * y), [A, A], "free", "free"),
    case("a summand not zero", summed(lambda x, y: jnp.exp(x) + y), [A, A], SUMS, SUMS),
    case("constant sigmoid", constantly(jax.nn.sigmoid, 0.0), [A], SUMS),
    case("constant acos", constantly(lax.acos, 0.0), [A], SUMS),
    case("constant not", constantly(lax.bitwise_not, 0), [A], SUMS),
    case("constant clz", constantly(lax.clz, 0), [A], SUMS),
    case("constant xor", constantly(lambda c: c ^ 3, 5), [A], SUMS),
    case("constant or", constantly(lambda c: (c | 1) - 1, 2), [A], SUMS),
    case("constant exp", constantly(jnp.exp, 0.0), [A], "free"),
    case("not finite at 0", undefined(lax.igamma), [(4,), (4,), A], *["free"] * 3),
    case("ties", lambda x, y: x * y + y, [A, A], "free", "free", classes=7),
    case(
        "select by a scalar", summed(lambda x, y: lax.select_n(True, x, y)), [A, A], "free", "free"
    ),
    case(
        "select by a parameter",
        summed(lambda x, y: lax.select_n(x > 0, x, y)),
        [A, A],
        "free",
        "free",
    ),
    case(
        "select a case not zero",
        summed(lambda x, y: lax.select_n(x > 0, jnp.exp(x), y)),
        [A, A],
        SUMS,
        SUMS,
    ),
    case("select by a mask", summed(lambda x: jnp.where(CONSTANT > 0, x, 0)), [A], "free"),
    case("select of constants", lambda x: x + jnp.where(CONSTANT > 0, 1.0, 2.0), [A], "free"),
    case("divide what is not zero", summed(lambda x, y: jnp.exp(x) / y), [A, A], SUMS, SUMS),
    case("divide by itself", summed(lambda x: x / x), [A], SUMS),
    case("divide by a function", summed(lambda x, y: x / jnp.sin(y)), [A, A], "free", "free"),
    case("divide by a norm", lambda x: x / jnp.linalg.norm(x, axis=0), [A], SUMS),
    case(
        "log times a parameter",
        summed(lambda x, y: jnp.log(jnp.abs(x)) * y),
        [A, A],
        "free",
        "free",
    ),
    case(
        "rsqrt of a variance",
        lambda x, w: x * lax.rsqrt((w * w).sum(0)),
        [(3,), A],
        "free",
        SUMS,
        classes=3,
    ),
    case(
        "a divisor made of an input",
        lambda x, w, i: x / (i.astype("float32") @ w),
        [(3,), A, INPUT],
        "'div' of a value",
        ("stays whole", "'div' of a value"),
        "whole",
    ),
    case("meets an input", lambda x, i: x * i, [(4,), INPUT], "stays whole", "whole"),
]


@pytest.mark.parametrize(("fn", "operands", "wanted", "classes"), ELEMENTWISE)
def test_removed_is_set_to_zero(fn, operands, wanted, classes):
    check(fn, operands, wanted, classes)


NOT_TESTED = {
    **dict.fromkeys(("axis_index", "ppermute", "psum_invariant", "pvary"), "inside shard_map only"),
    "channel_shuffle": "made of three operations: tests/test_groups_shuffles.py",
    "closed_call": "has another name in JAX 0.11",
    "create_token": "has no operand and no axis",
    "eval_jaxpr": "has another name in JAX 0.10",
    "log2": "JAX 0.11 only",
    "one_minus_square": "JAX 0.11 only",
    "zeros_like": "nothing traces to it",
}


def test_every_rule_is_tested():
    cases = [*ELEMENTWISE, *test_rules_loops.CASES, *test_rules_products.CASES]
    cases += [*test_rules_reductions.REDUCTIONS, *test_rules_shapes.CASES]
    calls = [(each.values[0], each.values[1]) for each in cases]
    for functions, arity in ((UNARY, 1), (BINARY, 2)):
        calls += [(fn or getattr(lax, n), [shape(4)] * arity) for n, fn in functions.items()]
    tested = set().union(*(names(fn, operands) for fn, operands in calls))
    assert set(_table._RULES) - tested - NOT_TESTED.keys() == set()
