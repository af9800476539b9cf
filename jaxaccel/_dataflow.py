"""What depends on what in a graph: dead code, constants, and the bodies of calls inlined."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax

from jaxaccel._graph import Atom, Graph, Node, Value, needed, run, values_of

_INLINED = ("jit", "closed_call", "eval_jaxpr", "remat2")


def known(graph: Graph, values: Iterable[Value]) -> set[Value]:
    """Everything that depends on `values` and constants alone, without effects."""
    found = {*values, *graph.constants}
    for node in graph.nodes:
        alone = found.issuperset(values_of(node.inputs))
        if alone and not node.effects:
            found.update(node.outputs)
    return found


def fold_constants(graph: Graph, given: Mapping[Value, Any]) -> Graph:
    """The graph with `given` inputs fixed, and all that depends on them alone computed now."""
    fixed = known(graph, given)
    rest = [n for n in graph.nodes if n.effects or not fixed.issuperset(n.outputs)]
    read = {value for node in rest for value in values_of(node.inputs)}
    wanted = [value for value in read.union(values_of(graph.outputs)) if value in fixed]
    free = [value for value in graph.inputs if value not in given]
    constants = dict(zip(wanted, evaluate(graph, given, wanted), strict=True))
    return Graph(free, rest, graph.outputs, constants)


def evaluate(graph: Graph, given: Mapping[Value, Any], wanted: Sequence[Value]) -> list[Any]:
    """The `wanted` values, compiled as one program, from the given inputs."""
    part = needed(graph, wanted)
    part = Graph(list(given), part.nodes, part.outputs, part.constants)
    return jax.jit(lambda arguments: run(part, arguments))(list(given.values()))


def flatten(graph: Graph) -> Graph:
    """The graph with the bodies of jit and remat in place of their calls."""
    nodes: list[Node] = []
    constants: dict[Value, Any] = {}
    outputs = _inline(graph, graph.inputs, nodes, constants)
    return Graph(graph.inputs, nodes, outputs, constants)


def _inline(
    graph: Graph, inputs: Sequence[Atom], nodes: list[Node], constants: dict[Value, Any]
) -> list[Atom]:
    renamed: dict[Value, Atom] = dict(zip(graph.inputs, inputs, strict=True))
    constants.update(graph.constants)
    rename = lambda atom: renamed.get(atom, atom) if isinstance(atom, Value) else atom
    for node in graph.nodes:
        operands = [rename(atom) for atom in node.inputs]
        if node.name in _INLINED:
            results = _inline(node.bodies[0], operands, nodes, constants)
            renamed.update(zip(node.outputs, results, strict=True))
        else:
            nodes.append(replace(node, inputs=operands))
    return [rename(atom) for atom in graph.outputs]
