"""What depends on what in a graph: constants, bodies of calls inlined, shuffles as one node."""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from jaxaccel._graph import Atom, Graph, Node, Value, needed, run, shape_of, values_of

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


def flatten(graph: Graph, also: Collection[str] = ()) -> Graph:
    """The graph with the bodies of jit and remat, and of `also`, in place of their calls."""
    nodes: list[Node] = []
    constants: dict[Value, Any] = {}
    outputs = _inline(graph, graph.inputs, nodes, constants, {*_INLINED, *also})
    return Graph(graph.inputs, nodes, outputs, constants)


def _inline(
    graph: Graph,
    inputs: Sequence[Atom],
    nodes: list[Node],
    constants: dict[Value, Any],
    names: Collection[str],
) -> list[Atom]:
    renamed: dict[Value, Atom] = dict(zip(graph.inputs, inputs, strict=True))
    constants.update(graph.constants)
    rename = lambda atom: renamed.get(atom, atom) if isinstance(atom, Value) else atom
    for node in graph.nodes:
        operands = [rename(atom) for atom in node.inputs]
        if node.name in names:
            results = _inline(node.bodies[0], operands, nodes, constants, names)
            renamed.update(zip(node.outputs, results, strict=True))
        else:
            nodes.append(replace(node, inputs=operands))
    return [rename(atom) for atom in graph.outputs]


def shuffles(graph: Graph) -> Graph:
    """The graph where splitting an axis, swapping the parts and merging them is one node.

    That node permutes the axis, as the shuffle of ShuffleNet does, so that no index of the axis
    depends on another.
    """
    makers = {value: node for node in graph.nodes for value in node.outputs}
    uses = Counter(values_of([*(a for node in graph.nodes for a in node.inputs), *graph.outputs]))
    nodes: dict[int, Node] = {}
    for place, node in enumerate(graph.nodes):
        bodies = tuple(map(shuffles, node.bodies))
        nodes[place] = _shuffle(node, makers, uses) or replace(node, bodies=bodies)
    merged = Graph(graph.inputs, list(nodes.values()), graph.outputs, graph.constants)
    return needed(merged)


def _shuffle(merge: Node, makers: Mapping[Any, Node], uses: Counter[Value]) -> Node | None:
    """The node of a reshape with the transpose and the reshape before it, if they permute."""
    if merge.name != "reshape":
        return None
    chain = [merge]
    for name in ("transpose", "reshape"):
        source = chain[-1].inputs[0]
        before = makers.get(source) if isinstance(source, Value) else None
        if before is None or before.name != name or uses[before.outputs[0]] > 1:
            return None
        chain.append(before)
    _, swap, split = chain
    full, parts = (shape_of(split.inputs[0]), shape_of(split.outputs[0]))
    axis = next((k for k, (a, b) in enumerate(zip(full, parts, strict=False)) if a != b), None)
    if axis is None or shape_of(merge.outputs[0]) != full:
        return None
    end = axis + 1 + len(parts) - len(full)
    swapped = swap.params["permutation"]
    rest = [k for k in range(len(parts)) if not axis <= k < end]
    if (*parts[:axis], *parts[end:]) != (*full[:axis], *full[axis + 1 :]):
        return None
    if any(swapped[k] != k for k in rest) or not isinstance(full[axis], int):
        return None
    local = [k - axis for k in swapped[axis:end]]
    order = np.arange(full[axis]).reshape(parts[axis:end]).transpose(local).ravel()
    run = lambda operands: merge.run(swap.run(split.run(operands)))
    params = {"axis": axis, "order": order}
    return replace(merge, name="channel_shuffle", params=params, inputs=split.inputs, run=run)
