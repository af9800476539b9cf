"""The pass that gives every axis of every traced value its channel labels."""

from collections.abc import Container, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from jaxaccel._axes import OPAQUE, Axes, Axis, Free, Labels, Ties
from jaxaccel._graph import Atom, Graph, Literal, Node, Value
from jaxaccel._rules import constant, few_integers, known_elements, rule_of
from jaxaccel._trace import Trace


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


# Indices of axes of inputs: place -> axis -> indices.
Gone: TypeAlias = Mapping[int, Mapping[int, np.ndarray]]


def label(
    trace: Trace,
    parameters: Container[int],
    *,
    keep_outputs: bool = True,
    gone: Gone | None = None,
    alike: Mapping[int, int] | None = None,
) -> tuple[Labelling, list[Axes]]:
    """The labelling of a traced function, and the axes of its inputs.

    The inputs that are `parameters` get labels and are zero where masked, but for those that
    would then be a divisor; those are in ``labelling.unmasked``. The other inputs stay whole, and
    if asked for the outputs and what is not read. Where it is known what is `gone`, open choices
    follow it. What in an output depends on no label of an input goes with the input that it is
    `alike`, as a gradient of zeros.
    """
    unmasked: set[int] = set()
    while True:
        labelling = Labelling()
        inputs = [
            _parameter(labelling, place, value, place not in unmasked)
            if place in parameters
            else Axes((OPAQUE,) * len(value.shape), value.shape, None, None)
            for place, value in enumerate(trace.graph.inputs)
        ]
        outputs = labelling.inside(trace.graph, inputs)
        if keep_outputs:
            _pin_unread(labelling, inputs, outputs)
        for path, out in zip(trace.out_paths, outputs, strict=True):
            for axis in out if keep_outputs else ():
                labelling.pin(axis, f"reaches the output {path}".rstrip())
        for out, place in (alike or {}).items():
            _follow(labelling, outputs[out], inputs[place], inputs)
        labelling.decide(None if gone is None else ids(inputs, gone))
        if labelling.unmasked <= unmasked:
            labelling.unmasked = unmasked
            return labelling, inputs
        unmasked |= labelling.unmasked


def _follow(labelling: Labelling, output: Axes, like: Axes, inputs: Sequence[Axes]) -> None:
    """Ties the indices of an output that no input is tied to with those of an input."""
    known = np.zeros(len(labelling), bool)
    for axis in (axis for axes in inputs for axis in axes if isinstance(axis, Labels)):
        known[labelling.roots(axis.ids)] = True
    for axis, own in zip(output, like, strict=True):
        if isinstance(own, Labels) and isinstance(axis, Labels):
            free = ~known[labelling.roots(axis.ids)]
            labelling.tie(axis.ids[free], own.ids[free])
        elif isinstance(own, Labels) and isinstance(axis, Free) and axis.ids is None:
            labelling.same(axis, own)


# What only chooses among the indices of its first operand.
_SELECTING = {"slice", "split", "gather", "dynamic_slice", "squeeze"}


def _pin_unread(labelling: Labelling, inputs: Sequence[Axes], outputs: Sequence[Axes]) -> None:
    """Indices that no operation reads, as rows of a table beyond the example's length."""
    read = np.zeros(len(labelling), bool)
    reading = [outputs]
    for node, operands in labelling.operands.items():
        if not node.bodies and node.name not in _SELECTING:
            reading.append(operands)
    for axis in (axis for operands in reading for axes in operands for axis in axes):
        ids = None if axis is OPAQUE else getattr(axis, "ids", None)
        if ids is not None:
            read[labelling.roots(ids)] = True
    for axis in (axis for axes in inputs for axis in axes):
        if isinstance(axis, Labels):
            labelling.pin(axis, "fn does not read it", ~read[labelling.roots(axis.ids)])


def ids(inputs: Sequence[Axes], gone: Gone) -> np.ndarray:
    """The labels of indices of the inputs' axes."""
    found = [np.zeros(0, int)]
    for place, axes in gone.items():
        for k, indices in axes.items():
            axis = inputs[place][k]
            if isinstance(axis, Labels):
                found.append(axis.ids[indices])
    return np.concatenate(found)


def _parameter(ties: Ties, place: int, value: Value, masked: bool) -> Axes:
    dtype = value.aval.dtype
    whole = jnp.issubdtype(dtype, jax.dtypes.extended)  # random keys

    def axis(size: Any) -> Axis:
        if whole or size == 1 or not isinstance(size, int):
            return OPAQUE
        return Labels(ties.new(size), np.full(size, masked))

    return Axes(tuple(map(axis, value.shape)), value.shape, None, frozenset({place}))
