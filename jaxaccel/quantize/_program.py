"""A function as integer steps between the floating-point ones, from its graph alone."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple, TypeAlias

from jaxaccel._graph import Node, Value, values_of
from jaxaccel.fold._view import View
from jaxaccel.quantize._layers import Bounds, Layer, Left, Tail


class Product(NamedTuple):
    """A contraction of data with data."""

    node: Node
    operands: tuple[Value, Value]
    name: str


class Sum(NamedTuple):
    """A residual addition."""

    node: Node
    operands: tuple[Value, Value]
    tail: Tail


class Mean(NamedTuple):
    """A sum over `terms` elements, times a factor: their mean, if that is ``1 / terms``."""

    node: Node
    operand: Value
    factor: float
    terms: int
    tail: Tail


class Joined(NamedTuple):
    """A concatenation."""

    node: Node
    operands: tuple[Value, ...]


class Same(NamedTuple):
    """A node that moves, selects or limits integers, which keep their grid."""

    node: Node
    operand: Value
    bounds: Bounds


Step: TypeAlias = Layer | Product | Sum | Mean | Joined | Same


@dataclass(eq=False)
class Program:
    """What is done where.

    Attributes:
        view: the graph.
        steps: by their first node, in order, those that run on integers.
        integers: every value that is held in 8 bits, with the number of its grid.
        watched: of these, the ones whose range decides the grid.
        symmetric: the grids whose zero point is 0.
        bodies: the programs of loops and branches.
        left: what stays in floating point.
    """

    view: View
    steps: dict[Node, Step] = field(default_factory=dict)
    integers: dict[Value, int] = field(default_factory=dict)
    watched: dict[Value, int] = field(default_factory=dict)
    symmetric: set[int] = field(default_factory=set)
    bodies: dict[Node, tuple["Program", ...]] = field(default_factory=dict)
    left: list[Left] = field(default_factory=list)

    @property
    def layers(self) -> list[Layer]:
        """Of this graph, not of its loops."""
        return [step for step in self.steps.values() if isinstance(step, Layer)]

    def runs(self, step: Step) -> bool:
        """Whether a step runs on integers: a contraction always, others if that is wanted."""
        return isinstance(step, Layer | Product) or end_of(step) in self.integers

    @cached_property
    def bounds(self) -> dict[Value, Bounds]:
        """To which numbers a value is limited before it gets its grid."""
        tails = (s.tail for s in self.steps.values() if isinstance(s, Layer | Sum | Mean))
        return {tail.end: tail.bounds for tail in tails}

    @cached_property
    def alive(self) -> set[Node]:
        """The nodes that are needed besides those inside of steps."""
        graph, found = self.view.graph, set[Node]()
        inside = {n for s in self.steps.values() if self.runs(s) for n in nodes_of(self.view, s)}
        wanted = set(values_of(graph.outputs))
        for node in reversed(graph.nodes):
            step = self.steps.get(node)
            if node in inside:
                continue
            if step is not None and self.runs(step):
                needed = end_of(step) in wanted
                operands: Sequence[Value] = operands_of(step)
            else:
                needed = node.effects or not wanted.isdisjoint(node.outputs)
                operands = values_of(node.inputs)
            if needed:
                found.add(node)
                wanted.update(operands)
        return found

    @property
    def all(self) -> Iterator["Program"]:
        """This one and those of its loops."""
        yield self
        for bodies in self.bodies.values():
            for body in bodies:
                yield from body.all


def end_of(step: Step) -> Value:
    """The value that leaves the step."""
    return step.tail.end if isinstance(step, Layer | Sum | Mean) else step.node.outputs[0]


def stays_integer(step: Step) -> bool:
    """Whether its result can be in 8 bits: it has constants of its own, or needs none."""
    return step.fixed if isinstance(step, Layer) else not isinstance(step, Product)


def operands_of(step: Step) -> tuple[Value, ...]:
    """The values that it reads in 8 bits."""
    if isinstance(step, Layer):
        return (step.contraction.data,)
    return (step.operand,) if isinstance(step, Mean | Same) else step.operands


def first_of(step: Step) -> Node:
    """The node with which it begins."""
    return step.contraction.node if isinstance(step, Layer) else step.node


def nodes_of(v: View, step: Step) -> list[Node]:
    """The nodes from the one after the first to the one that makes the end."""
    found: list[Node] = []
    value = first_of(step).outputs[0]
    while value is not end_of(step):
        node = v.only_reader(value)
        assert node is not None
        found.append(node)
        value = node.outputs[0]
    return found
