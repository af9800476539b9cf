"""A call as a graph with the paths of its arguments: where every transform begins."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.core
import numpy as np

from jaxaccel._graph import (
    EXPORTED,
    Graph,
    aval_of,
    graph_of,
    leaf_paths,
    needed,
    primitives,
    values_of,
)
from jaxaccel._slices import sliced


class Trace(NamedTuple):
    """A traced call: its graph, and where its flat inputs and outputs stand in the trees."""

    graph: Graph
    paths: list[str]  # of every input; "params/conv1/kernel" for the first argument's leaves
    num_params: int  # how many inputs are leaves of the first argument
    out_tree: Any
    out_paths: list[str]


class Opaque:
    """A function without a graph; `refusal` says so to who asks for one."""

    refusal: str


def check_transparent(fn: Any) -> None:
    """Raises a TypeError for an `Opaque` function, and one that `jax.jit` wraps."""
    while fn is not None:
        if isinstance(fn, Opaque):
            raise TypeError(fn.refusal)
        fn = getattr(fn, "__wrapped__", None)


def trace(fn: Callable, *args: Any) -> Trace:
    """The graph of ``fn(*args)`` without dead code; the leaves of `args` are arrays or avals.

    Raises:
        TypeError: a leaf of `args` or of the result is no array, the first of `args` or the result
            has no leaves, `fn` closes over a value that is being traced, or it passes its
            parameters to an `Opaque` function.
    """
    check_transparent(fn)
    arguments = [leaf_paths(arg, "" if i == 0 else f"args[{i}]") for i, arg in enumerate(args)]
    if not arguments[0]:
        raise TypeError(f"params: {args[0]!r} has no arrays; fn takes its parameters first")
    avals = [
        jax.tree.unflatten(jax.tree.structure(arg), [aval_of(p, v) for p, v in leaves.items()])
        for arg, leaves in zip(args, arguments, strict=True)
    ]
    graph, out_tree = graph_of(lambda *a: _checked(fn(*a)), *avals)
    for constant in graph.constants.values():
        if isinstance(constant, jax.core.Tracer):
            raise TypeError(
                f"fn closes over a traced value of type {jax.typeof(constant)}: it is being "
                "transformed outside of fn; pass it to fn as an argument"
            )
    paths = [path for leaves in arguments for path in leaves]
    graph = needed(sliced(graph).graph)
    _check_calls(graph, len(arguments[0]))
    out_paths = leaf_paths(jax.tree.unflatten(out_tree, graph.outputs))
    return Trace(graph, paths, len(arguments[0]), out_tree, list(out_paths))


def _check_calls(graph: Graph, num_params: int) -> None:
    """Raises where parameters go into a function whose graph is not known."""
    of_params = set(graph.inputs[:num_params])
    for node in graph.nodes:
        if of_params.isdisjoint(values_of(node.inputs)):
            continue
        of_params.update(node.outputs)
        if EXPORTED in (node.name, *primitives(node.params)):
            raise TypeError(
                f"fn passes parameters to a function of jx.export.load ({node.source}), which "
                "cannot be transformed; call the function that it was saved from"
            )


def _checked(result: Any) -> Any:
    leaves = leaf_paths(result)
    if not leaves:
        raise TypeError(f"fn returns no arrays, but {result!r}; it may only return pytrees of them")
    for path, leaf in leaves.items():
        if not isinstance(leaf, jax.Array | np.ndarray | np.generic | bool | int | float | complex):
            where = f" at {path}" if path else ""
            raise TypeError(
                f"fn returns a {type(leaf).__name__}{where}; it may only return pytrees of arrays"
            )
    return result
