"""Graphs: a function replayed from its graph is the function, bit for bit."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from jax import lax
from jax.experimental.xla_metadata import set_xla_metadata
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxaccel import _dataflow, _graph, _trace
from jaxaccel._rewritten import rerun
from tests.models import ZOO, Case, tiers
from tests.networks import frameworks, sequence, vision
from tests.networks.drawn import networks
from tests.shrinking import QUICKLY

CASES = [*ZOO, *vision.CASES, *sequence.CASES, *frameworks.CASES]


def replayed(fn):
    """The function that traces `fn` for its arguments and runs the graph."""

    def call(*args: Any) -> Any:
        traced = _trace.trace(fn, *args)
        return jax.tree.unflatten(traced.out_tree, _graph.run(traced.graph, jax.tree.leaves(args)))

    return call


def same(a: Any, b: Any) -> None:
    for u, v in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert u.dtype == v.dtype
        np.testing.assert_array_equal(u, v)


def same_program(a: Any, b: Any, *args: Any) -> None:
    """Two functions trace to one program; where it reads otherwise, to the same bits."""
    if program(a, *args) != program(b, *args):
        first, second = (jax.jit(fn, compiler_options=QUICKLY) for fn in (a, b))
        same(first(*args), second(*args))


def program(fn: Any, *args: Any) -> list[str]:
    """The equations in order, those of bodies too; JAX prints a body that two calls share once."""
    return list(_lines(jax.make_jaxpr(fn)(*args), {}))


def _lines(closed: Any, names: dict[Any, int]) -> Iterator[str]:
    jaxpr, consts = getattr(closed, "jaxpr", closed), getattr(closed, "consts", ())
    is_literal = lambda v: hasattr(v, "val")
    word = lambda v: str(v) if is_literal(v) else names.setdefault(v, len(names))
    words = lambda atoms: [word(v) for v in atoms]
    alive = {v for v in jaxpr.outvars if not is_literal(v)}
    needed = []
    for eqn in reversed(jaxpr.eqns):
        if eqn.effects or not alive.isdisjoint(eqn.outvars):
            needed.append(eqn)
            alive.update(v for v in eqn.invars if not is_literal(v))
    read = [(v, c) for v, c in zip(jaxpr.constvars, consts, strict=False) if v in alive]
    yield f"{words(jaxpr.invars)} {[(word(v), _bytes(c)) for v, c in read]}"
    for eqn in reversed(needed):
        params = sorted(eqn.params.items())
        texts = [f"{name}={value}" for name, value in params if not _bodies(value)]
        plain = [text for text in texts if " at 0x" not in text]
        avals = [str(out.aval) for out in eqn.outvars]
        yield f"{words(eqn.outvars)} {avals} = {eqn.primitive} {words(eqn.invars)} {plain}"
        for body in (body for _, value in params for body in _bodies(value)):
            yield from _lines(body, names)
    yield f"-> {words(jaxpr.outvars)}"


def _bytes(constant: Any) -> bytes:
    is_key = jnp.issubdtype(constant.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(constant) if is_key else constant).tobytes()


def _bodies(value: Any) -> list[Any]:
    is_body = lambda part: hasattr(part, "eqns")
    return [part for part in jax.tree.leaves(value, is_leaf=is_body) if is_body(part)]


def value_and_gradient(fn, params: Any, x: jax.Array) -> tuple[Any, Any]:
    """Of a scalar of the result, with respect to the floating parameters; and these."""
    leaves, tree = jax.tree.flatten(params)
    floats = {i: v for i, v in enumerate(leaves) if jnp.issubdtype(v.dtype, jnp.inexact)}

    def loss(wanted: dict[int, Any]) -> Any:
        whole = jax.tree.unflatten(tree, [wanted.get(i, v) for i, v in enumerate(leaves)])
        return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(fn(whole, x)))

    return jax.value_and_grad(loss), floats


def check_replay(fn, params: Any, x: jax.Array) -> None:
    again = replayed(fn)
    same_program(fn, again, params, x)
    original, floats = value_and_gradient(fn, params, x)
    same_program(original, value_and_gradient(again, params, x)[0], floats)


def tangent(x: Any) -> Any:
    return x if jnp.issubdtype(x.dtype, jnp.inexact) else np.zeros(x.shape, jax.dtypes.float0)


def check_everywhere(fn, params: Any, x: jax.Array) -> None:
    """Value, gradient, jvp and vmap, at two batch sizes."""
    again = replayed(fn)
    for batch in (x, jnp.concatenate([x, x[:1]])):
        check_replay(fn, params, batch)
        moving = lambda fn, *args: jax.jvp(fn, args, jax.tree.map(tangent, args))
        same_program(partial(moving, fn), partial(moving, again), params, batch)
        rows = (params, batch[None])
        same_program(jax.vmap(fn, (None, 0)), jax.vmap(again, (None, 0)), *rows)


@pytest.mark.parametrize("case", tiers(CASES))
def test_replay_is_the_function_and_its_gradient(case: Case):
    fn, params = case.build()
    check_everywhere(fn, params, case.images())


def check_network(network: Any) -> None:
    fn, params, shape = network
    check_everywhere(fn, params, jax.random.normal(jax.random.key(0), shape))


@given(network=networks())
def test_replay_of_random_networks(network):
    check_network(network)


@pytest.mark.full
@settings(max_examples=300)
@given(network=networks(max_steps=12))
def test_replay_of_300_random_networks(network):
    check_network(network)


def rich(params, x):
    """Every kind of call that a graph has a body for."""
    h = jax.jit(lambda h: jax.nn.relu(h) + 1)(x @ params["w"])  # a custom_jvp in a jit
    h = jax.checkpoint(jnp.sin)(h)
    h = _straight_through(h)
    h, rows = lax.scan(lambda c, r: (jnp.tanh(c @ params["u"] + r), c), h[0], h, reverse=True)
    h = lax.while_loop(lambda c: c.sum() < 10, lambda c: c + jnp.abs(params["u"][0]) + 1, h)
    h = lax.cond(h.sum() > 0, lambda a: a * 2, lambda a: -a, h)
    return {"out": h * rows, "number": jnp.float32(3) + rows.sum()}


@jax.custom_vjp
def _straight_through(x):
    return jnp.round(x * 4) / 4


_straight_through.defvjp(lambda x: (_straight_through(x), None), lambda _, g: (g,))

RICH = {
    "w": jax.random.normal(jax.random.key(0), (3, 4)),
    "u": jax.random.normal(jax.random.key(1), (4, 4)),
}


def forward(params, x):
    """`rich` without the loop and the custom vjp that forward or reverse mode refuse."""
    h = jax.nn.relu(x @ params["w"])
    return lax.scan(lambda c, r: (jnp.tanh(c @ params["u"] + r), c), h[0], jnp.sin(h))[1]


@pytest.mark.parametrize("batch", [1, 5])
def test_every_kind_of_body(batch):
    x = jax.random.normal(jax.random.key(2), (batch, 3))
    same(jax.jit(rich)(RICH, x), jax.jit(replayed(rich))(RICH, x))
    same(rich(RICH, x), replayed(rich)(RICH, x))


def test_rerun_with_the_same_bodies_is_the_call():
    x = jax.random.normal(jax.random.key(2), (5, 3))
    traced = _trace.trace(rich, RICH, x)
    seen = set()

    def rule(node, operands):
        if not node.bodies or node.name.startswith("custom"):
            return None
        seen.add(node.name)
        bodies = [lambda *a, body=body: _graph.run(body, a, rule) for body in node.bodies]
        return rerun(node, operands, bodies)

    run = jax.jit(lambda p, x: _graph.run(traced.graph, jax.tree.leaves((p, x)), rule))
    same(jax.tree.leaves(jax.jit(rich)(RICH, x)), run(RICH, x))
    assert {"jit", "remat2", "scan", "while", "cond"} <= seen


@pytest.mark.parametrize(
    "transform",
    [
        lambda f: jax.vmap(f, (None, 0)),
        lambda f: jax.jacrev(lambda p, x: f(p, x[0])),
        lambda f: jax.jacfwd(lambda p, x: f(p, x[0])),
        lambda f: jax.hessian(lambda p, x: f(p, x[0]).sum()),
        lambda f: lambda p, x: jax.linearize(lambda p: f(p, x[0]), p)[1](p),
    ],
    ids=["vmap", "jacrev", "jacfwd", "hessian", "linearize"],
)
def test_transformations(transform):
    x = jax.random.normal(jax.random.key(2), (3, 2, 3))
    same(jax.jit(transform(forward))(RICH, x), jax.jit(transform(replayed(forward)))(RICH, x))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_on_a_mesh(kind):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    x = jax.random.normal(jax.random.key(2), (8, 3))
    dense = lambda p, x: jax.nn.relu(x @ p["w"]) @ p["u"]
    with jax.set_mesh(mesh):
        split = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))
        out = jax.jit(replayed(dense))(RICH, split)
        same(jax.jit(dense)(RICH, split), out)
        assert out.sharding.spec == jax.jit(dense)(RICH, split).sharding.spec
        mapped = partial(
            jax.shard_map,
            in_specs=(PartitionSpec(), PartitionSpec("data")),
            out_specs=PartitionSpec("data"),
        )
        same(jax.jit(mapped(dense))(RICH, split), jax.jit(mapped(replayed(dense)))(RICH, split))


def test_metadata_and_scopes_survive():
    def fn(p, x):
        with set_xla_metadata(kind="dense"), jax.named_scope("block"):
            return p @ x

    x = jnp.ones((2, 2))
    text = jax.jit(replayed(fn)).lower(x, x).as_text(debug_info=True)
    assert 'kind = "dense"' in text
    assert "block/dot_general" in text


def test_dead_code_goes_and_effects_stay():
    def fn(p, x):
        _ = jnp.exp(p)
        jax.debug.print("{}", x)
        return p * 2

    names = [node.name for node in _trace.trace(fn, jnp.ones(2), jnp.ones(2)).graph.nodes]
    assert names == ["debug_print", "mul"] or names == ["debug_callback", "mul"]


def test_what_depends_on_parameters_alone_becomes_a_constant():
    def fn(p, x):
        return x * lax.rsqrt(p["var"] + 1e-5) + jax.nn.relu(p["bias"])

    params, x = {"bias": -jnp.ones(3), "var": jnp.arange(3.0)}, jnp.ones((2, 3))
    graph = _dataflow.flatten(_trace.trace(fn, params, x).graph)
    folded = _dataflow.fold_constants(
        graph, dict(zip(graph.inputs, jax.tree.leaves(params), strict=False))
    )
    assert {node.name for node in folded.nodes} <= {"mul", "add", "broadcast_in_dim"}
    assert len(folded.inputs) == 1
    np.testing.assert_allclose(_graph.run(folded, [x])[0], fn(params, x), rtol=1e-6)


def test_flatten_inlines_calls():
    graph = _dataflow.flatten(_trace.trace(rich, RICH, jnp.ones((2, 3))).graph)
    names = {node.name for node in graph.nodes}
    assert not names & {"jit", "remat2"}
    same(
        _graph.run(graph, [*jax.tree.leaves(RICH), jnp.ones((2, 3))])[0],
        jnp.float32(0) + rich(RICH, jnp.ones((2, 3)))["number"],
    )


def test_source_lines_point_at_the_model():
    traced = _trace.trace(replayed(lambda p, x: p @ x), jnp.ones((2, 2)), jnp.ones((2, 2)))
    assert traced.graph.nodes[-1].source.startswith("tests/test_graph.py:")


def test_bad_arguments_are_named():
    x = jnp.ones((2, 3))
    with pytest.raises(TypeError, match=r"conv1/kernel: expected an array, got str; fn takes"):
        _trace.trace(lambda p, x: x, {"conv1": {"kernel": "he"}}, x)
    with pytest.raises(TypeError, match=r"args\[1\]: expected an array, got object"):
        _trace.trace(lambda p, x: x, {"w": x}, object())
    with pytest.raises(TypeError, match=r"params: expected an array, got str"):
        _trace.trace(lambda p, x: x, "params", x)
    with pytest.raises(TypeError, match=r"fn returns a str at name; it may only return pytrees"):
        _trace.trace(lambda p, x: {"name": "a", "out": x}, {"w": x}, x)
    with pytest.raises(TypeError, match=r"fn returns a function; it may only return"):
        _trace.trace(lambda p, x: lambda: x, {"w": x}, x)


def test_a_closed_over_tracer_is_named():
    def outer(scale):
        return _trace.trace(lambda p, x: p * x * scale, jnp.ones(2), jnp.ones(2))

    with pytest.raises(
        TypeError,
        match=r"fn closes over a traced value of type ~float32\[\]: it is being transformed",
    ):
        jax.jit(outer)(2.0)
