"""Folding: random chains around every contraction, and the reasons for what is refused."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax import lax

import jaxaccel as jx
from tests.networks.vision import normals
from tests.test_fold import close, convolve, primitives, quietly, scaled

NCHW = ("NCHW", "OIHW", "NCHW")


def dense(x, kernel):
    return x @ kernel


# Contraction, the shapes of data and kernel, the axes of the result and of the data for channels.
CONTRACTIONS = {
    "dense": (dense, (2, 3, 4), (4, 5), (2,), (2,)),
    "kernel first": (lambda x, w: jnp.einsum("oi,bi->ob", w, x), (2, 4), (5, 4), (0,), (1,)),
    "kernel moved": (lambda x, w: x @ w[0].T, (2, 4), (1, 5, 4), (1,), (1,)),
    "heads": (partial(jnp.einsum, "bti,ihd->bthd"), (2, 3, 4), (4, 2, 5), (2, 3), (2,)),
    "merge": (partial(jnp.einsum, "bthd,hdo->bto"), (2, 3, 2, 5), (2, 5, 4), (2,), (2, 3)),
    "experts": (partial(jnp.einsum, "bei,eio->ebo"), (2, 3, 4), (3, 4, 5), (0, 2), (1, 2)),
    "nhwc": (convolve, (2, 4, 4, 3), (2, 2, 3, 5), (3,), (3,)),
    "nchw": (partial(convolve, layout=NCHW), (2, 3, 4, 4), (5, 3, 2, 2), (1,), (1,)),
    "grouped": (partial(convolve, groups=2), (2, 4, 4, 6), (2, 2, 3, 4), (3,), (3,)),
    "multiplier": (partial(convolve, groups=3), (2, 4, 4, 3), (2, 2, 1, 6), (3,), (3,)),
    "dilated": (partial(convolve, rhs_dilation=(2, 1)), (2, 4, 4, 3), (2, 2, 3, 2), (3,), (3,)),
}
OPS = {
    "add": lambda y, c: y + c,
    "from the left": lambda y, c: c + y,
    "sub": lambda y, c: y - c,
    "sub from": lambda y, c: c - y,
    "mul": lambda y, c: c * y,
    "div": lambda y, c: y / c,
    "neg": lambda y, c: -y,
}
SHIFTS = ("add", "from the left", "sub", "sub from")
FORMS = {
    "leaf": lambda c, y: c,
    "scalar": lambda c, y: 1.5,
    "computed": lambda c, y: lax.rsqrt(c**2 + 0.1),
    "stretched": lambda c, y: jnp.broadcast_to(c, y.shape),
}
STEPS = st.lists(st.tuples(st.sampled_from([*OPS, "turn"]), st.sampled_from([*FORMS])), max_size=4)


def walk(y, steps, coefficients, channels):
    """Applies the steps; a turn reverses the axes, so that the channels stand elsewhere."""
    channels = list(channels)
    for (op, form), c in zip(steps, coefficients, strict=True):
        if op == "turn":
            y, channels = y.T, [y.ndim - 1 - axis for axis in channels]
            continue
        if c is not None:
            c = jnp.moveaxis(c.reshape(c.shape + (1,) * (y.ndim - c.ndim)), range(c.ndim), channels)
        y = OPS[op](y, None if op == "neg" else FORMS[form](c, y))
    return y


@given(st.sampled_from([*CONTRACTIONS]), STEPS, STEPS, st.integers(0, 99))
def test_random_chains_become_one_kernel_and_one_bias(name, before, after, seed):
    contract, data, kernel, outs, ins = CONTRACTIONS[name]
    before = [step for step in before if step[0] != "turn"]
    with jax.enable_x64(True):
        random = np.random.default_rng(seed)

        def draw(axes, shape, steps):
            sizes = [shape[axis] for axis in axes]
            read = [op not in ("neg", "turn") and form != "scalar" for op, form in steps]
            return [random.uniform(0.5, 2, sizes) if r else None for r in read]

        x, w = random.normal(size=data), random.normal(size=kernel)
        y = contract(x, w)
        chains = {
            "before": draw(ins, data, before),
            "after": draw(outs, y.shape, after),
        }
        params = jax.tree.map(jnp.asarray, {"layer": {"kernel": w}} | chains)

        def fn(params, x):
            x = walk(x, before, params["before"], ins)
            y = contract(x, params["layer"]["kernel"])
            return walk(y, after, params["after"], outs)

        folded, new = quietly(fn, params, jnp.asarray(x))
        close(folded(new, x[:1]), fn(params, x[:1]), 1e-11)
        check_folded(fn, folded, new, [*before, *(s for s in after if s[0] != "turn")], x)


def check_folded(fn, folded, new, steps, x):
    shifts = any(op in SHIFTS for op, _ in steps)
    computed = any(form == "computed" and op != "neg" for op, form in steps)
    if len(steps) > shifts or computed:
        assert set(new) == {"layer"}
        assert set(new["layer"]) == {"kernel", "bias"} if shifts else {"kernel"}
        left = [p for p in primitives(folded, new, x) if p in ("add", "sub", "mul", "div", "neg")]
        assert left == ["add"] * shifts
    else:
        assert folded is fn


REFUSED = {
    "another reader": (lambda p, x: ((y := x @ p["w"]) * p["c"], y), "its result has another read"),
    "tied": (
        lambda p, x: (p["c"] * (x @ p["w"]), x @ p["w"]),
        "w: its kernel has another reader",
    ),
    "weight norm": (
        lambda p, x: p["c"] * (x @ (p["w"] / jnp.linalg.norm(p["w"], axis=0))),
        "dot_general: its kernel is computed from w",
    ),
    "split": (lambda p, x: 2 * (jnp.repeat(x, 2, 1) @ p["w"].reshape(6, 2)), "merged or split"),
    "fixed": (lambda p, x: p["c"] * (x @ np.ones((3, 4), np.float32)), "its kernel is fixed"),
    "scan": (
        lambda p, x: lax.scan(lambda h, v: (h, p["c"] * (v @ p["w"])), 0.0, x),
        "scan: inside scan",
    ),
    "no scale of its own": (
        lambda p, x: jnp.tanh(x @ p["w"]) * lax.rsqrt(p["c"]) - p["c"],
        "mul: no convolution or dot before it, and no scale",
    ),
    "shape": (lambda p, x: jnp.tanh(x.T @ p["t"]) * lax.rsqrt(p["c"]), "mul: no convolution"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_the_reason_and_returned_as_it_is(name):
    fn, reason = REFUSED[name]
    params = scaled() | {"t": jnp.ones((2, 4))}
    with pytest.warns(UserWarning, match=f"nothing to fold.*1 refused.*{reason}"):
        folded, new = jx.fold.batchnorm(fn, params, jnp.ones((2, 3)))
    assert folded is fn
    assert new is params


# Coefficients that depend on the shape (2, 3, 3) or (3, 6, 3) of the data.
BY_SHAPE = {
    "literal": lambda p, x: (x @ p["w"]) / x.shape[0],
    "exponent": lambda p, x: (x @ p["w"]) * p["s"] ** x.shape[0],
    "exponent in a loop": lambda p, x: (
        (x @ p["w"]) * lax.fori_loop(0, 1, lambda _, s: s ** x.shape[0], p["s"])
    ),
    "exponent of a time": lambda p, x: (x @ p["w"]) * (1 - jnp.exp(-p["s"])) ** x.shape[1],
    "index": lambda p, x: (x @ p["w"]) * p["temp"][x.shape[0]] * p["s"][None],
    "sum": lambda p, x: (x @ p["w"]) * jnp.broadcast_to(p["s"], (x.shape[0], 4)).sum(0),
    "kernel": lambda p, x: (x @ (p["u"] if len(x) == 2 else p["u"].T)) * jnp.sqrt(p["s"][:3]),
    "head": lambda p, x: heads(p, x) * 2 * (p["s"][:2] if len(x) == 2 else p["s"][:2, None]),
    "outer": lambda p, x: (
        heads(p, x)
        * (p["s"][:2] * p["s"][2:, None] if len(x) == 2 else p["s"][:2, None] * p["s"][2:])
    ),
    "summed along": lambda p, x: (
        heads(p, x)
        * jnp.broadcast_to(p["s"][:2] if len(x) == 2 else p["s"][:2, None], (2, 2)).sum(0)
    ),
}


def heads(p, x):
    return jnp.einsum("bti,ihd->bthd", x, p["h"])


@pytest.mark.parametrize("name", BY_SHAPE)
def test_a_constant_that_depends_on_the_shape_is_noticed(name):
    fn = BY_SHAPE[name]
    shapes = {"w": (3, 4), "u": (3, 3), "h": (3, 2, 2)}
    params = normals(shapes) | {"s": jnp.arange(1.0, 5.0) / 3, "temp": jnp.arange(1.0, 9.0)}
    folded, new = jx.fold.batchnorm(fn, params, jnp.ones((2, 3, 3)))
    close(folded(new, jnp.ones((2, 3, 3))), fn(params, jnp.ones((2, 3, 3))), 1e-5)
    with pytest.raises(ValueError, match="for these arguments fn has other chains, or other const"):
        folded(new, jnp.ones((3, 6, 3)))


# Coefficients that do not, though they have the batch's shape or are computed in a loop.
FREE = {
    "stretched": lambda p, x: (
        (x @ p["w"]) * lax.rsqrt(jnp.broadcast_to(p["c"] ** 2, (*x.shape[:-1], 4)))
    ),
    "turned": lambda p, x: (
        (x @ p["w"]).T * jnp.broadcast_to(jnp.tanh(p["c"]), (*x.shape[:-1], 4)).T
    ),
    "custom rule": lambda p, x: (x @ p["w"]) * jax.nn.softplus(jax.nn.silu(p["c"])),
    "new rule at each call": lambda p, x: (x @ p["w"]) * exponential(p["c"]),
    "loop": lambda p, x: (x @ p["w"]) * lax.fori_loop(0, 3, lambda _, c: jnp.sin(c), p["c"]),
    "vmap": lambda p, x: jax.vmap(lambda row: (row @ p["w"] - p["c"]) * jnp.exp(p["c"]))(x),
    "product": lambda p, x: (x @ p["w"]) * (p["c"] @ jnp.ones((4, 4))),
}


def exponential(c):
    rule = jax.custom_vjp(lambda c: jnp.exp(c))
    rule.defvjp(lambda c: (jnp.exp(c), jnp.exp(c)), lambda e, t: (e * t,))
    return rule(c)


@pytest.mark.parametrize("name", FREE)
def test_any_batch_size_with_any_coefficient(name):
    folded, new = jx.fold.batchnorm(FREE[name], scaled(), jnp.ones((2, 3)))
    for size in (1, 2, 5):
        x = jax.random.normal(jax.random.key(size), (size, 3))
        close(folded(new, x), FREE[name](scaled(), x), 1e-5)


def test_nothing_to_fold_and_nothing_refused():
    fn = lambda p, x: jax.nn.relu(x @ p["w"] + p["c"]) @ p["w"].T
    params = scaled()
    plain = "nothing to fold; fn and params are returned as they are$"
    with pytest.warns(UserWarning, match=plain):
        folded, new = jx.fold.batchnorm(fn, params, jnp.ones((2, 3)))
    assert folded is fn
    assert new is params


def test_a_reshape_in_another_order_ends_the_chain():
    fn = lambda p, x: lax.reshape(x @ p["w"], (4, 4), (1, 0)) * jnp.sqrt(p["c"] ** 2)
    with pytest.warns(UserWarning, match="nothing to fold"):
        folded, new = jx.fold.batchnorm(fn, scaled(), jnp.ones((4, 3)))
    close(folded(new, jnp.eye(4, 3)), fn(scaled(), jnp.eye(4, 3)), 1e-6)


@pytest.mark.parametrize(
    "divided",
    [
        lambda p, y: y * lax.rsqrt(p["v"]),
        lambda p, y: y / jnp.sqrt(p["v"])[None],
        lambda p, y: y * (p["c"] / p["v"]),
        lambda p, y: 2 * y / p["v"],
        lambda p, y: y * p["v"] ** -2,
        lambda p, y: y * p["v"] ** -0.7,
    ],
)
def test_a_divisor_of_zero(divided):
    fn = lambda p, x: divided(p, x @ p["w"])
    params = scaled() | {"a": jnp.zeros(4), "v": jnp.array([1.0, 0, 0, 2])}
    message = "^v: 2 of 4 values are zero, and it divides; it cannot be folded into w$"
    with pytest.raises(ValueError, match=message):
        jx.fold.batchnorm(
            lambda p, x: fn(p, x) * lax.rsqrt(p["a"] + 1) + p["a"], params, jnp.ones((2, 3))
        )


def test_a_divisor_that_becomes_zero_and_what_is_not_finite_otherwise():
    params = scaled() | {"v": jnp.ones(4)}
    x = jnp.ones((2, 3))
    with pytest.raises(ValueError, match=r"^v: a divisor computed from it is zero; it cannot be"):
        jx.fold.batchnorm(lambda p, x: (x @ p["w"]) * lax.rsqrt(p["v"] - 1), params, x)
    with pytest.raises(ValueError, match=r"^a coefficient is not finite; it cannot be folded into"):
        jx.fold.batchnorm(lambda p, x: (x @ p["w"]) * jnp.exp(p["v"] * 100), params, x)
