"""The graph without the chains that were folded."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from jaxtyping import Array

from jaxaccel._dataflow import flatten, needed
from jaxaccel._graph import Graph, Node, Value
from jaxaccel._trace import trace
from jaxaccel.fold._contractions import spread
from jaxaccel.fold._match import Matches
from jaxaccel.fold._view import Keys, Labels, View, check_free


class End(NamedTuple):
    """What stands at the end of a chain: ``y * scale + bias``, either of them optional."""

    node: Node
    labels: Labels
    order: Labels
    sizes: tuple[Any, ...]
    scale: Keys | None
    bias: Keys | None


def ends(v: View, matches: Matches) -> list[End]:
    """What is put in the place of each chain."""
    found = []
    for f in matches.folds:
        node = f.after[-1].node if f.after else f.contraction.node
        order = tuple(range(len(f.contraction.outs)))
        found.append(End(node, f.labels, order, f.contraction.sizes, None, f.bias_keys(v)))
    for m in matches.merges:
        last = m.steps[-1]
        keys = [v.leaves[leaf] if leaf is not None else None for leaf in (m.scale, m.bias)]
        found.append(End(last.node, last.labels, m.channels, m.sizes, *keys))
    return found


def created(found: Sequence[End]) -> list[Keys]:
    """The paths at which a new bias or scale stands."""
    return [keys for end in found for keys in (end.scale, end.bias) if keys is not None]


def rewrite(v: View, matches: Matches, avals: Mapping[Keys, Any]) -> tuple[Graph, list[Keys]]:
    """The graph that reads the new leaves (`avals`), and the paths of its first inputs.

    Raises:
        ValueError: a new bias has the path of another leaf.
    """
    places = ends(v, matches)
    new = {keys: Value(avals[keys]) for keys in _once(created(places))}
    at = {end.node: end for end in places}
    steps = [s for chain in (*matches.folds, *matches.merges) for s in chain.steps]
    gone = {s.node: s.y for s in steps}
    renamed: dict[Value, Value] = {}
    rename = lambda atom: renamed.get(atom, atom) if isinstance(atom, Value) else atom
    nodes: list[Node] = []
    for node in v.graph.nodes:
        if node in gone:
            renamed[node.outputs[0]] = renamed.get(gone[node], gone[node])
        else:
            nodes.append(replace(node, inputs=[rename(atom) for atom in node.inputs]))
        if node in at and (at[node].scale or at[node].bias):
            out = node.outputs[0]
            nodes.append(_applied(at[node], renamed.get(out, out), new))
            renamed[out] = nodes[-1].outputs[0]
    outputs = [rename(atom) for atom in v.graph.outputs]
    graph = needed(flatten(Graph(v.graph.inputs, nodes, outputs, v.graph.constants)))
    leaves = {v.leaves[leaf]: leaf for leaf in _kept(v, graph)}
    for keys in new:
        check_free(keys, leaves, "a new bias")
    inputs = [value for value in graph.inputs if value not in v.leaves]
    leaves |= new
    return Graph([*leaves.values(), *inputs], graph.nodes, graph.outputs, graph.constants), [
        *leaves
    ]


def _applied(end: End, y: Value, new: Mapping[Keys, Value]) -> Node:
    """A call, to be inlined, of the multiplication and the addition."""
    stored = [new[keys] for keys in (end.scale, end.bias) if keys is not None]

    def apply(y: Array, *operands: Array) -> Array:
        along = [_along(end, x).astype(y.dtype) for x in operands]
        y = y * along[0] if end.scale is not None else y
        return y + along[-1] if end.bias is not None else y

    body = trace(apply, y.aval, *(value.aval for value in stored)).graph
    return Node("jit", {}, [y, *stored], [Value(y.aval)], end.node.run, (body,), end.node.info)


def _along(end: End, x: Array) -> Array:
    """A stored coefficient, broadcast along all but the axes of the channels."""
    here = [label for label in end.order if label in end.labels]  # an axis of size 1 may be gone
    sizes = [n for label, n in zip(end.order, end.sizes, strict=True) if label in end.labels]
    places = tuple(end.labels.index(label) for label in here)
    return spread(x.reshape(sizes), places, len(end.labels))


def _kept(v: View, graph: Graph) -> Iterator[Value]:
    """The parameters that are read still, and those that never were."""
    atoms = (*graph.outputs, *(atom for node in graph.nodes for atom in node.inputs))
    read = {atom for atom in atoms if isinstance(atom, Value)}
    for leaf in v.leaves:
        if leaf in read or not (leaf in v.readers or leaf in v.outputs):
            yield leaf


def _once(paths: Sequence[Keys]) -> Sequence[Keys]:
    for i, keys in enumerate(paths):
        if keys in paths[:i]:
            raise ValueError(
                f"{'/'.join(keys)}: two kernels need a new bias at this path; put each kernel in a "
                "dict of its own"
            )
    return paths
