"""A flat graph, and what of it depends on parameters alone."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import jax.numpy as jnp
import numpy as np

from jaxaccel._dataflow import flatten, known, needed
from jaxaccel._graph import Atom, Graph, Node, Value, shape_of
from jaxaccel._rules.shapes import blocks

Keys: TypeAlias = tuple[str, ...]
# For every axis of a value what it stands for; None: nothing that is followed.
Labels: TypeAlias = tuple[int | None, ...]

_ELEMENTWISE = {
    *("abs", "add", "cbrt", "convert_element_type", "copy", "copy_p", "cos", "div", "exp", "exp2"),
    *("expm1", "integer_pow", "log", "log1p", "logistic", "max", "min", "mul", "neg", "pow"),
    *("reduce_precision", "rsqrt", "select_n", "sign", "sin", "sqrt", "square", "stop_gradient"),
    *("sub", "tan", "tanh"),
}
_MOVES = {
    *("broadcast_in_dim", "convert_element_type", "copy", "copy_p", "reshape", "squeeze"),
    *("stop_gradient", "transpose"),
}


@dataclass(frozen=True, eq=False)
class View:
    """A graph without calls or dead code, with the readers and the maker of each value.

    `leaves` are the parameters, `known` all that depends on them and on constants alone, and
    `varying` for these the axes along which the elements may differ.
    """

    graph: Graph
    leaves: dict[Value, Keys]
    readers: dict[Value, list[Node]]
    makers: dict[Value, Node]
    outputs: set[Value]
    known: set[Value]
    varying: dict[Value, frozenset[int]]

    def knows(self, atom: Atom | None) -> bool:
        return atom in self.known if isinstance(atom, Value) else atom is not None

    def varies(self, atom: Atom) -> frozenset[int]:
        return self.varying[atom] if isinstance(atom, Value) else _wide(atom)

    def only_reader(self, value: Value) -> Node | None:
        readers = self.readers.get(value, [])
        return readers[0] if len(readers) == 1 and value not in self.outputs else None

    def origin(self, atom: Atom) -> Value | None:
        """The leaf of which `atom` is a copy, but for its dtype, layout and repetition."""
        while isinstance(atom, Value) and atom not in self.leaves:
            maker = self.makers.get(atom)
            if maker is None or maker.name not in _MOVES:
                return None
            atom = maker.inputs[0]
        return atom if isinstance(atom, Value) else None

    def read_by(self, leaf: Value) -> set[Node | None]:
        """The nodes at which `leaf`, or what is computed from parameters, meets the data."""
        found: set[Node | None] = set()
        seen, todo = {leaf}, [leaf]
        while todo:
            value = todo.pop()
            found |= {None} if value in self.outputs else set()
            for node in self.readers.get(value, []):
                if not self.known.issuperset(node.outputs):
                    found.add(node)
                new = [v for v in node.outputs if v in self.known and v not in seen]
                seen.update(new)
                todo += new
        return found

    def sources(self, atoms: Iterable[Atom | None]) -> list[Value]:
        """The leaves from which `atoms` are computed, in the order of the parameters."""
        seen: set[Value] = set()
        todo = [atom for atom in atoms if isinstance(atom, Value)]
        while todo:
            value = todo.pop()
            if value not in seen and value in self.makers:
                todo += [v for v in self.makers[value].inputs if isinstance(v, Value)]
            seen.add(value)
        return [leaf for leaf in self.leaves if leaf in seen]


def view(graph: Graph, leaves: Mapping[Value, Keys]) -> View:
    """The view of a graph in which `leaves` are the parameters."""
    graph = needed(flatten(graph))
    readers: dict[Value, list[Node]] = {}
    for node in graph.nodes:
        for atom in node.inputs:
            if isinstance(atom, Value):
                readers.setdefault(atom, []).append(node)
    makers = {value: node for node in graph.nodes for value in node.outputs}
    outputs = {atom for atom in graph.outputs if isinstance(atom, Value)}
    found = known(graph, leaves)
    varying = _varying(graph, found)
    return View(graph, dict(leaves), readers, makers, outputs, found, varying)


def beside(keys: Keys, name: str) -> Keys:
    """The path of `name` next to a leaf; Keras has whole paths as keys of one flat dict."""
    parent, slash, _ = keys[-1].rpartition("/") if keys else ("", "", "")
    return (*keys[:-1], f"{parent}{slash}{name}")


def check_free(keys: Keys, taken: Iterable[Keys], what: str) -> None:
    """Raises a ValueError where a leaf stands at this path, below it or above it."""
    for other in taken:
        if keys[: len(other)] == other[: len(keys)]:
            raise ValueError(
                f"{'/'.join(keys)}: {what} needs this path, but "
                f"{'/'.join(other) or 'the only array'} stands there; rename that leaf, or put "
                "each kernel in a dict of its own"
            )


def floating(atom: Atom) -> bool:
    return jnp.issubdtype(getattr(atom.aval, "dtype", bool), jnp.floating)


def _wide(atom: Atom) -> frozenset[int]:
    return frozenset(i for i, size in enumerate(shape_of(atom)) if size != 1)


def _varying(graph: Graph, values: set[Value]) -> dict[Value, frozenset[int]]:
    found = {value: _wide(value) for value in values}
    for node in graph.nodes:
        if node.outputs[:1] and node.outputs[0] in values:
            operands = [found[a] if isinstance(a, Value) else _wide(a) for a in node.inputs]
            found |= {v: _varies(node, operands, _wide(v)) for v in node.outputs}
    return found


def _varies(node: Node, operands: list[frozenset[int]], wide: frozenset[int]) -> frozenset[int]:
    """The axes along which the result may vary, given those of its operands."""
    if elementwise(node):
        return frozenset().union(*operands) & wide
    places = aligned(node, operands[0]) if node.name in _MOVES else None
    return wide if places is None else places


def elementwise(node: Node) -> bool:
    return node.name in _ELEMENTWISE


def aligned(node: Node, axes: frozenset[int]) -> frozenset[int] | None:
    """Where a node of `_MOVES` puts these axes; None if it merges or splits one of them."""
    labels = tuple(i if i in axes else None for i in range(len(shape_of(node.inputs[0]))))
    kept = moved(node, labels)
    if {axis for axis in kept if axis is not None} != axes:
        return None
    return frozenset(i for i, axis in enumerate(kept) if axis is not None)


def moved(node: Node, labels: Labels) -> Labels:
    """Where the labels of the operand's axes stand in the result of a pad or one of `_MOVES`."""
    old, new = shape_of(node.inputs[0]), node.outputs[0].shape
    if node.name == "transpose":
        return tuple(labels[i] for i in node.params["permutation"])
    if node.name == "squeeze":
        return tuple(x for i, x in enumerate(labels) if i not in node.params["dimensions"])
    if node.name == "broadcast_in_dim":
        places = dict(zip(map(int, node.params["broadcast_dimensions"]), labels, strict=True))
        return tuple(places.get(i) for i in range(len(new)))
    if node.name == "pad":
        edges = node.params["padding_config"]
        return tuple(x if not any(edge) else None for x, edge in zip(labels, edges, strict=True))
    if node.name != "reshape":
        return labels
    return (None,) * len(new) if node.params["dimensions"] else _reshaped(old, new, labels)


def _reshaped(old: Sequence[Any], new: Sequence[Any], labels: Labels) -> Labels:
    """The labels of the axes that a reshape neither merges nor splits."""
    found: list[int | None] = [None] * len(new)
    for ins, outs in blocks(old, new):
        if len(ins) == len(outs) == 1:
            found[outs[0]] = labels[ins[0]]
    return tuple(found)


def moves(node: Node) -> bool:
    """Whether the node only permutes axes, adds or drops axes of size 1, or casts floats."""
    if node.name not in _MOVES or node.name == "stop_gradient":
        return False
    if node.name == "convert_element_type":
        return floating(node.inputs[0]) and floating(node.outputs[0])
    return np.prod(shape_of(node.inputs[0]), dtype=object) == np.prod(
        node.outputs[0].shape, dtype=object
    )
