"""A graph in terms of what is written: images with channels first, operations of ONNX."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax.numpy as jnp

from jaxaccel._dataflow import flatten
from jaxaccel._graph import Atom, Graph, Node, Value, graph_of, needed, run
from jaxaccel.export._onnx import _elements, _grids, _indexing, _products, _windows
from jaxaccel.export._onnx._converted import check_dtypes, check_supported
from jaxaccel.export._onnx._loops import entered
from jaxaccel.export._onnx._moved import plain, shape_of
from jaxaccel.export._onnx._ops import NAMED
from jaxaccel.export._onnx._settled import CUSTOM
from jaxaccel.export._onnx._simplified import simplified

_RULES = {
    **_elements.RULES,
    **_indexing.RULES,
    **_windows.RULES,
    **_products.RULES,
    **_grids.RULES,
}


class Lowered(NamedTuple):
    """A graph of the arguments alone, and the names of its constants that have one."""

    graph: Graph
    names: dict[Value, str]


def lowered(graph: Graph, avals: Sequence[Any]) -> Lowered:
    """Of a graph whose constants are computed."""
    flat = lambda *arguments: list(map(plain, run(graph, arguments, _rule)))
    made, _ = graph_of(flat, *avals)
    return _without_names(simplified(needed(made)))


def _rule(node: Node, operands: list[Any]) -> Sequence[Any]:
    check_dtypes(node)
    if node.outputs and all(0 in out.shape for out in node.outputs):
        # ONNX's Reshape would misread them.
        return [jnp.zeros(out.shape, out.aval.dtype) for out in node.outputs]
    if node.name in ("dot_general", "reduce_sum") and any(0 in shape_of(x) for x in operands):
        return [jnp.zeros(out.shape, out.aval.dtype) for out in node.outputs]
    rule = _RULES.get(node.name)
    results = rule(node, operands) if rule else None
    if results is not None:
        return results
    operands = list(map(plain, operands))
    if node.bodies:
        return entered(node, operands, list(map(_body, node.bodies)))
    check_supported(node)
    return node.run(operands)


def _body(graph: Graph) -> Any:
    flat = flatten(graph, CUSTOM)
    return lambda *arguments: list(map(plain, run(flat, arguments, _rule)))


def _without_names(graph: Graph) -> Lowered:
    """The names that are noted in it, taken out of it."""
    names: dict[Value, str] = {}
    alias: dict[Value, Atom] = {}
    nodes: list[Node] = []
    read = lambda atom: alias.get(atom, atom) if isinstance(atom, Value) else atom
    for node in graph.nodes:
        node = replace(node, inputs=list(map(read, node.inputs)))
        if node.name != NAMED:
            nodes.append(node)
            continue
        (source,), (out,) = node.inputs, node.outputs
        alias[out] = source
        if isinstance(source, Value) and source in graph.constants:
            names.setdefault(source, node.params["name"])
    outputs = list(map(read, graph.outputs))
    return Lowered(replace(graph, nodes=nodes, outputs=outputs), names)
