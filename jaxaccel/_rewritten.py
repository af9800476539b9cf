"""A function with some of its ops replaced, wherever in its calls and loops they stand."""

from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_derivatives import SymbolicZero

from jaxaccel._graph import (
    Body,
    Graph,
    Node,
    Rule,
    aval_of,
    graph_of,
    is_float,
    jvp_graph,
    leaf_paths,
    loop,
    run,
    vjp_graph,
)
from jaxaccel._slices import check_sizes, sliced
from jaxaccel._trace import check_transparent


def rewritten(fn: Callable, rule: Rule, concerns: Callable[[Node], bool]) -> Callable:
    """``fn`` with the results of `rule` for the nodes it `concerns`; it traces at every call."""

    @wraps(fn)
    def call(*args: Any, **kwargs: Any) -> Any:
        graph, leaves, out_tree = flat_graph(fn, args, kwargs)
        return jax.tree.unflatten(out_tree, everywhere(graph, leaves, rule, concerns))

    return call


def with_slices(fn: Callable) -> Callable:
    """``fn`` with slices where jax.numpy gathers for a symbolic size: they are faster.

    Raises:
        ValueError: `fn` is not for every size.
    """

    @wraps(fn)
    def call(*args: Any) -> Any:
        graph, leaves, out_tree = flat_graph(fn, args, {})
        check_sizes(graph)
        graph, made = sliced(graph)
        as_it_is = lambda node, operands: node.run(operands)
        return jax.tree.unflatten(out_tree, everywhere(graph, leaves, as_it_is, made.__contains__))

    return call


def flat_graph(fn: Callable, args: Any, kwargs: Any) -> tuple[Graph, list[Any], Any]:
    """The graph of a call as it is traced, the arguments' leaves, and the tree of its result.

    Raises:
        TypeError: a leaf is no array, or the function has no graph.
    """
    check_transparent(fn)
    leaves, tree = jax.tree.flatten((args, kwargs))

    def flat(*leaves: Any) -> Any:
        args, kwargs = jax.tree.unflatten(tree, leaves)
        return fn(*args, **kwargs)

    paths = [*leaf_paths(args, "args"), *leaf_paths(kwargs, "kwargs")]
    graph, out_tree = graph_of(flat, *map(aval_of, paths, leaves))
    return graph, leaves, out_tree


def everywhere(
    graph: Graph, arguments: Sequence[Any], rule: Rule, concerns: Callable[[Node], bool]
) -> list[Any]:
    """Runs a graph with the results of `rule`, inside of its calls and loops too."""
    known: dict[Node, bool] = {}

    def touched(node: Node) -> bool:
        if node not in known:
            inside = (inner for body in node.bodies for inner in body.nodes)
            known[node] = concerns(node) or any(map(touched, inside))
        return known[node]

    def deep(node: Node, operands: list[Any]) -> Sequence[Any] | None:
        if not touched(node):
            return None
        if not node.bodies:
            return rule(node, operands)
        bodies = [lambda *args, body=body: again(body, args) for body in node.bodies]
        if node.name == "custom_jvp_call":
            return custom_jvp(node, operands, bodies[0], again)
        if node.name == "custom_vjp_call":
            return custom_vjp(node, operands, bodies[0], again)
        return rerun(node, operands, bodies)

    def again(body: Graph, arguments: Sequence[Any]) -> list[Any]:
        return run(body, arguments, deep)

    return again(graph, arguments)


def custom_jvp(
    node: Node, operands: list[Any], body: Callable, again: Callable[..., list[Any]]
) -> list[Any]:
    """A traced custom rule cannot be bound around another body: its own jvp is traced."""
    called = jax.custom_jvp(lambda *args: tuple(body(*args)))

    def jvp(primals: Sequence[Any], tangents: Sequence[Any]) -> Any:
        active = [
            i
            for i, (atom, tangent) in enumerate(zip(node.inputs, tangents, strict=True))
            if is_float(atom) and not isinstance(tangent, SymbolicZero)
        ]
        results = again(jvp_graph(node, active), [*primals, *(tangents[i] for i in active)])
        outputs, moved = results[: len(node.outputs)], iter(results[len(node.outputs) :])
        none = lambda out: np.zeros(jnp.shape(out), jax.dtypes.float0)
        pairs = zip(node.outputs, outputs, strict=True)
        return tuple(outputs), tuple(next(moved) if is_float(v) else none(o) for v, o in pairs)

    called.defjvp(jvp, symbolic_zeros=True)
    return list(called(*operands))


def custom_vjp(
    node: Node, operands: list[Any], body: Callable, again: Callable[..., list[Any]]
) -> list[Any]:
    """The same for a custom vjp; its backward pass begins by computing the residuals again."""
    active = [i for i, atom in enumerate(node.inputs) if is_float(atom)]
    results = [i for i, out in enumerate(node.outputs) if is_float(out)]
    called = jax.custom_vjp(lambda *args: tuple(body(*args)))

    def backward(args: Sequence[Any], cotangents: Sequence[Any]) -> Any:
        graph = vjp_graph(node, active, results)
        made = iter(again(graph, [*args, *(cotangents[i] for i in results)]))
        return tuple(next(made) if is_float(atom) else None for atom in node.inputs)

    called.defvjp(lambda *args: (tuple(body(*args)), args), backward)
    return list(called(*operands))


def rerun(node: Node, operands: Sequence[Any], bodies: Sequence[Body]) -> list[Any]:
    """Runs a call or a loop with other bodies, whose operands may have other shapes."""
    if node.name == "scan":
        return _scan(node, operands, bodies[0])
    if node.name == "while":
        consts, body_consts, _ = loop(node)
        first, second, carry = _split(operands, consts, body_consts)
        return list(
            lax.while_loop(
                lambda state: bodies[0](*first, *state)[0],
                lambda state: tuple(bodies[1](*second, *state)),
                tuple(carry),
            )
        )
    if node.name == "cond":
        index, *rest = operands
        index = lax.convert_element_type(index, np.int32)
        return list(lax.switch(index, [lambda *a, b=b: tuple(b(*a)) for b in bodies], *rest))
    called = lambda *a: tuple(bodies[0](*a))
    if node.name == "remat2":
        kept = {name: node.params[name] for name in ("prevent_cse", "policy")}
        called = jax.checkpoint(called, **kept)
        if node.params["differentiated"]:
            operands = _barred(operands, kept["prevent_cse"])
    elif node.name == "jit":
        called.__name__ = node.params["name"]
        called = jax.jit(called, **_shardings(node.params))
    return list(called(*operands))


def _barred(operands: Sequence[Any], prevent_cse: bool | Sequence[bool]) -> list[Any]:
    """What JAX lowers a remat to: the compiler may not take it for the first computation."""
    flags = [prevent_cse] * len(operands) if isinstance(prevent_cse, bool) else prevent_cse
    pairs = list(zip(operands, flags, strict=True))
    barred = iter(lax.optimization_barrier(tuple(x for x, flag in pairs if flag)))
    return [next(barred) if flag else x for x, flag in pairs]


def _scan(node: Node, operands: Sequence[Any], body: Body) -> list[Any]:
    num_consts, _, num_carry = loop(node)
    consts, init, xs = _split(operands, num_consts, num_carry)

    def step(carry: Any, x: Any) -> Any:
        out = body(*consts, *carry, *x)
        return tuple(out[:num_carry]), tuple(out[num_carry:])

    kept = {name: node.params[name] for name in ("length", "reverse", "unroll")}
    carry, ys = lax.scan(step, tuple(init), tuple(xs), **kept)
    return [*carry, *ys]


def _split(items: Sequence[Any], first: int, second: int) -> tuple[list, list, list]:
    both = first + second
    return list(items[:first]), list(items[first:both]), list(items[both:])


def _shardings(params: Mapping[str, Any]) -> dict[str, Any]:
    given = {}
    for name in ("in_shardings", "out_shardings"):
        wanted = [s if isinstance(s, jax.sharding.Sharding) else None for s in params[name]]
        if any(wanted):
            given[name] = tuple(wanted)
    return given
