"""The pass that gives every axis of every traced value its channel labels."""

from collections.abc import Container, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxaccel._axes import OPAQUE, Axes, Axis, Free, Labels, Ties
from jaxaccel._graph import Atom, Graph, Literal, Node, Trace, Value, values_of
from jaxaccel._rules import constant, few_integers, known_elements, rule_of


class Labelling(Ties):
    """The ties of a graph, and the axes of each node's operands and results."""

    def __init__(self) -> None:
        super().__init__()
        self.operands: dict[Node, list[Axes]] = {}
        self.results: dict[Node, list[Axes]] = {}
        self.outputs: dict[Graph, list[Axes]] = {}

    def inside(self, body: Graph, operands: Sequence[Axes]) -> list[Axes]:
        axes: dict[Value, Axes] = {v: _constant_axes(c) for v, c in body.constants.items()}
        axes.update(zip(body.inputs, operands, strict=True))
        caller = self.node
        for node in body.nodes:
            self.node = node
            used = [_read(axes, atom).for_use() for atom in node.inputs]
            results = self._apply(node, used)
            self.operands[node], self.results[node] = used, results
            axes.update(zip(node.outputs, results, strict=True))
        self.node = caller
        self.outputs[body] = [_read(axes, atom).for_use() for atom in body.outputs]
        return self.outputs[body]

    def _apply(self, node: Node, used: list[Axes]) -> list[Axes]:
        shapes = [out.shape for out in node.outputs]
        try:
            found = [list(axes) for axes in rule_of(node.name).tie(self, node, *used)]
        except Exception as error:
            error.add_note(f"in the rule of {node.name!r} for {[x.shape for x in used]}")
            raise
        if [len(axes) for axes in found] != [len(shape) for shape in shapes]:
            raise ValueError(
                f"the rule of {node.name!r} gives {[len(axes) for axes in found]} axes for results "
                f"of shapes {shapes}; it must return one list per result, one axis per dimension"
            )
        known = [x.sources for x in used]
        whole = None if None in known else frozenset().union(*(s for s in known if s))
        values = self._values(node, used)
        return [
            Axes(tuple(map(self._lasting, axes)), shape, number, whole, elements)
            for axes, shape, (number, elements) in zip(found, shapes, values, strict=True)
        ]

    def _values(self, node: Node, used: list[Axes]) -> list[Any]:
        """Of each result what is known: the number that all elements are, and the elements."""
        if len(node.bodies) == 1 and node.name not in ("scan", "while", "cond"):
            return [(axes.constant, axes.elements) for axes in self.outputs[node.bodies[0]]]
        return [(constant(node, used), known_elements(node, used))] * len(node.outputs)

    def _lasting(self, axis: Axis) -> Axis:
        """An axis of size 1 is whole from here on."""
        if isinstance(axis, Labels) and len(axis.ids) == 1:
            self.pin(axis, f"'{self._name()}' leaves a single index of it")
            return OPAQUE
        return axis


def _read(axes: dict[Value, Axes], atom: Atom) -> Axes:
    return _constant_axes(atom.val) if isinstance(atom, Literal) else axes[atom]


def _constant_axes(value: Any) -> Axes:
    shape = np.shape(value)
    number = None
    if shape == () and isinstance(value, np.generic | np.ndarray | int | float | bool):
        number = float(value) if np.isrealobj(value) else None
    axes = tuple(Free() for _ in shape)
    return Axes(axes, shape, number, elements=few_integers(value))


def label(
    trace: Trace, parameters: Container[int], *, keep_outputs: bool = True
) -> tuple[Labelling, list[Axes]]:
    """The labelling of a traced function, and the axes of its inputs.

    The inputs that are `parameters` get labels and are zero where masked, but for those that
    would then be a divisor; those are in ``labelling.unmasked``. The other inputs stay whole, and
    the outputs too if asked for.
    """
    unmasked: set[int] = set()
    atoms = [*(atom for node in trace.graph.nodes for atom in node.inputs), *trace.graph.outputs]
    read = set(values_of(atoms))
    while True:
        labelling = Labelling()
        inputs = [
            _parameter(labelling, place, value, place not in unmasked)
            if place in parameters
            else Axes((OPAQUE,) * len(value.shape), value.shape, None, None)
            for place, value in enumerate(trace.graph.inputs)
        ]
        for value, axes in zip(trace.graph.inputs, inputs, strict=True):
            for axis in axes if value not in read else ():
                labelling.pin(axis, "fn does not read it")
        for path, out in zip(trace.out_paths, labelling.inside(trace.graph, inputs), strict=True):
            for axis in out if keep_outputs else ():
                labelling.pin(axis, f"reaches the output {path}".rstrip())
        labelling.decide()
        if labelling.unmasked <= unmasked:
            labelling.unmasked = unmasked
            return labelling, inputs
        unmasked |= labelling.unmasked


def _parameter(ties: Ties, place: int, value: Value, masked: bool) -> Axes:
    dtype = value.aval.dtype
    whole = jnp.issubdtype(dtype, jax.dtypes.extended)  # random keys

    def axis(size: Any) -> Axis:
        if whole or size == 1 or not isinstance(size, int):
            return OPAQUE
        return Labels(ties.new(size), np.full(size, masked))

    return Axes(tuple(map(axis, value.shape)), value.shape, None, frozenset({place}))
