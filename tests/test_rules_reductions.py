"""The rules of reductions, sorts and pooling."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from tests.rules import case, check

A, B = (4, 3), (2, 3, 4)
IMAGES = (2, 4, 4, 3)
SUMS = "sums over"


def added(constant: Callable) -> Callable:
    return lambda x: x + constant()


def reduced(fn: Callable, **how: Any) -> Callable:
    """`fn` over axis 1; what is left is summed over axis 0."""
    return lambda x: fn(x, 1, **how).sum(0)


def over(name: str) -> tuple[str, str]:
    return "free", f"'{name}' over it"


def at_zero(x: jax.Array, axis: int) -> jax.Array:
    return lax.reduce_and(x == 0, (axis,))


def pooled(start: float, fn: Callable, width: int = 2) -> Callable:
    sizes = (1, width, width, 1)
    return lambda x: lax.reduce_window(x, np.float32(start), fn, sizes, sizes, "VALID")


def outer_sum(fn: Callable) -> Callable:
    return lambda *xs: fn(*xs).sum((0, 3))


def pool_gradient(x: jax.Array, g: jax.Array) -> jax.Array:
    return jax.vjp(pooled(-np.inf, lax.max), x)[1](g)[0]


def pool_tangent(x: jax.Array, t: jax.Array) -> jax.Array:
    return jax.jvp(pooled(-np.inf, lax.max), (x,), (t,))[1]


def pool(name: str) -> tuple[str, str, str, str]:
    return "free", f"'{name}' moves over it", f"'{name}' moves over it", "free"


REDUCTIONS = [
    case("sum", lambda x: x.sum((0, 2)), [B], "free", classes=9),
    case("sum what is not zero", lambda x: jnp.cos(x).sum((0, 2)), [B], (SUMS, "free", SUMS)),
    case("max", reduced(jnp.max), [A], over("reduce_max")),
    case("min", reduced(jnp.min), [A], over("reduce_min")),
    case("prod", reduced(jnp.prod), [A], over("reduce_prod")),
    case("and", lambda x: lax.reduce_and(x > 0, (1,)).sum(0), [A], over("reduce_and")),
    case("or", lambda x: lax.reduce_or(x > 0, (1,)).sum(0), [A], over("reduce_or")),
    case("xor", lambda x: lax.reduce_xor(x > 0, (1,)).sum(0), [A], over("reduce_xor")),
    case("and of what is not zero", reduced(at_zero), [A], (SUMS, "'reduce_and'")),
    case("argmax", reduced(jnp.argmax), [A], over("argmax")),
    case("argmin", reduced(jnp.argmin), [A], over("argmin")),
    case(
        "max of what is not zero",
        reduced(lambda x, k: jnp.exp(x).max(k)),
        [A],
        (SUMS, "'reduce_max'"),
    ),
    *(
        case(name, reduced(getattr(lax, name)), [A], ("free", f"'{name}' along it"))
        for name in ("cumsum", "cumprod", "cummax", "cummin")
    ),
    case("cumlogsumexp", reduced(lax.cumlogsumexp), [A], (SUMS, "'cumlogsumexp' along it")),
    case("cumsum of ones", added(lambda: jnp.cumsum(jnp.ones(4))), [(4,)], "free"),
    case(
        "sort",
        lambda x: lax.sort(x, dimension=1).sum(0),
        [A],
        ("free", "sorted along it"),
        classes=4,
    ),
    case(
        "sort two",
        lambda x, y: lax.sort((x, y), dimension=1),
        [A, A],
        *[("free", "sorted along it")] * 2,
        classes=4,
    ),
    case(
        "sort, one not zero",
        lambda x, y: lax.sort((x, jnp.exp(y)), dimension=1)[0].sum(0),
        [A, A],
        *[("free", "sorted along it")] * 2,
    ),
    case("argsort", lambda x: jnp.argsort(x, 1), [A], ("free", "sorted along it")),
    case("argsort and sum", lambda x: jnp.argsort(x, 1).sum(0), [A], (SUMS, "sorted along it")),
    case("top_k", lambda x: lax.top_k(x, 2), [A], ("free", "'top_k' along it"), classes=4),
    case("top_k and sum", lambda x: lax.top_k(x, 2)[0].sum(0), [A], ("free", "'top_k' along it")),
    case(
        "top_k indices and sum",
        lambda x: lax.top_k(x, 2)[1].sum(0),
        [A],
        (SUMS, "'top_k' along it"),
    ),
    case("top_k of ones", added(lambda: lax.top_k(jnp.ones(4), 4)[1]), [(4,)], "free"),
    case(
        "approx_max_k", lambda x: lax.approx_max_k(x, 2), [A], ("free", "'approx_top_k' along it")
    ),
    case("fft", lambda x: jnp.abs(jnp.fft.fft(x)).sum(0), [A], ("free", "'fft' along it")),
    case("fft of ones", added(lambda: jnp.abs(jnp.fft.fft(jnp.ones(4)))), [(4,)], "free"),
    case("max pool", outer_sum(pooled(-np.inf, lax.max)), [IMAGES], pool("reduce_window_max")),
    case("min pool", outer_sum(pooled(np.inf, lax.min)), [IMAGES], pool("reduce_window_min")),
    case("average pool", outer_sum(pooled(0, lax.add)), [IMAGES], pool("reduce_window_sum")),
    case(
        "max pool gradient",
        outer_sum(pool_gradient),
        [IMAGES, (2, 2, 2, 3)],
        *[pool("select_and_scatter_add")] * 2,
        classes=5,
    ),
    case(
        "max pool tangent",
        outer_sum(pool_tangent),
        [IMAGES, IMAGES],
        *[pool("select_and_gather_add")] * 2,
        classes=5,
    ),
    case("pool from a value", pooled(1, lax.max), [IMAGES], "no rule"),
    case(
        "max pool of padding",
        lambda x: lax.reduce_window(x, -np.inf, lax.max, (1, 1), (1, 1), ((0, 0), (1, 1))),
        [A],
        ("free", "moves over it"),
    ),
]


@pytest.mark.parametrize(("fn", "operands", "wanted", "classes"), REDUCTIONS)
def test_removed_is_set_to_zero(fn, operands, wanted, classes):
    check(fn, operands, wanted, classes)
