"""A lowered graph with fewer nodes: integers are made once, early, and moved as integers."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import jax.core
import numpy as np

from jaxaccel._graph import Atom, Graph, Literal, Node, Value, needed
from jaxaccel.export._onnx._ops import OPERATION


def simplified(graph: Graph) -> Graph:
    """The same, for its results."""
    made = _Simplified(graph)
    outputs = [made.read(atom) for atom in graph.outputs]
    return needed(replace(graph, nodes=made.nodes, outputs=outputs))


class _Simplified:
    """The nodes of a graph, one after the other.

    - what is quantized as it was dequantized is what it was;
    - what is moved and then quantized is quantized and then moved: less is moved, it is fused
      with what is before, and openvino is wrong where something was added before a transpose;
    - of several reshapes the last one counts, and one to the same shape is none.
    """

    def __init__(self, graph: Graph) -> None:
        self.nodes: list[Node] = []
        self.makers: dict[Value, Node] = {}
        self.alias: dict[Value, Atom] = {}
        for node in graph.nodes:
            node = replace(node, inputs=list(map(self.read, node.inputs)))
            for one in self._instead(node):
                self.nodes.append(one)
                self.makers |= dict.fromkeys(one.outputs, one)

    def read(self, atom: Atom) -> Atom:
        return self.alias.get(atom, atom) if isinstance(atom, Value) else atom

    def _maker(self, node: Node) -> Node | None:
        source = node.inputs[0] if node.inputs else None
        return self.makers.get(source) if isinstance(source, Value) else None

    def _instead(self, node: Node) -> Iterator[Node]:
        before = self._maker(node)
        if _is(node, "QuantizeLinear") and before is not None:
            if _is(before, "DequantizeLinear") and _numbers(before) == _numbers(node):
                self.alias[node.outputs[0]] = before.inputs[0]
                return
            if before.name == "transpose" or _is(before, "Reshape"):
                yield from self._swapped(before, node)
                return
        if _is(node, "Reshape"):
            if before is not None and _is(before, "Reshape"):
                node = replace(node, inputs=[before.inputs[0], *node.inputs[1:]])
            if node.inputs[0].aval.shape == node.outputs[0].aval.shape:  # pyright: ignore
                self.alias[node.outputs[0]] = node.inputs[0]
                return
        yield node

    def _swapped(self, move: Node, quantize: Node) -> Iterator[Node]:
        source, out = move.inputs[0], quantize.outputs[0]
        q = Value(jax.core.ShapedArray(source.aval.shape, out.aval.dtype))  # pyright: ignore
        yield from self._instead(
            replace(quantize, inputs=[source, *quantize.inputs[1:]], outputs=[q])
        )
        yield from self._instead(replace(move, inputs=[self.read(q)], outputs=[out]))


def _is(node: Node, name: str) -> bool:
    return node.name == OPERATION and node.params["name"] == name


def _numbers(node: Node) -> list[Any]:
    """The scale and the zero point, with their types; of vectors none."""
    found = [np.asarray(atom.val) for atom in node.inputs[1:] if isinstance(atom, Literal)]
    return [(x.dtype, float(x)) for x in found if not x.ndim]
