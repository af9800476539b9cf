"""Parameters and multiply-accumulates of a labelled function without some of its channels."""

from collections.abc import Iterable, Iterator, Sequence
from math import prod
from typing import Any, NamedTuple

import numpy as np

from jaxaccel._axes import Axes, Axis
from jaxaccel._graph import Graph, Node
from jaxaccel._labels import Labelling


class Term(NamedTuple):
    """A product of the sizes of axes."""

    times: int
    axes: Sequence[tuple[Axis, Any]]  # each with its size


class Counter:
    """Counts what is left when labels are gone; every count is one pass over arrays.

    Multiply-accumulates are those of one call at the sizes of the example (a symbolic size counts
    as 1): of convolutions and dots, padding included, and one for each element-wise multiplication
    (a depthwise convolution may be written so). The body of a while loop counts once, of a `cond`
    the branch with the most.
    """

    def __init__(self, labelling: Labelling, parameters: Iterable[Axes], graph: Graph) -> None:
        self._labelling = labelling
        self._places: dict[int, int] = {}
        self._roots: list[np.ndarray] = []
        self._sizes = [1]
        terms = [Term(1, _sized(axes)) for axes in parameters]
        self._split = len(terms)
        terms += _macs(labelling, graph)
        rows = [self._row(term) for term in terms]
        width = max((len(places) for _, places in rows), default=0)
        self._times = np.array([times for times, _ in rows], dtype=np.int64)
        padded = [[*places, *[0] * (width - len(places))] for _, places in rows]
        self._factors = np.array(padded, dtype=int).reshape(len(rows), width)
        self._starts = np.cumsum([0, *map(len, self._roots)])[:-1]
        self._all = np.concatenate([np.zeros(0, int), *self._roots])
        self.before = self.after(np.zeros(0, int))

    def after(self, gone: np.ndarray) -> tuple[int, int]:
        """Parameters and multiply-accumulates without these labels."""
        lost = np.zeros(len(self._labelling), bool)
        lost[self._labelling.roots(gone)] = True
        sizes = np.array(self._sizes)
        if len(self._starts):
            sizes[1:] -= np.add.reduceat(lost[self._all].astype(int), self._starts)
        counts = self._times * sizes[self._factors].prod(1)
        return int(counts[: self._split].sum()), int(counts[self._split :].sum())

    def _row(self, term: Term) -> tuple[int, list[int]]:
        """The product of the sizes that do not change, and the places of those that may."""
        places, times = [], term.times
        for axis, size in term.axes:
            ids = getattr(axis, "ids", None)
            if ids is not None and len(ids):
                places.append(self._place(ids))
            elif isinstance(size, int):
                times *= size
        return times, places

    def _place(self, ids: np.ndarray) -> int:
        if id(ids) not in self._places:
            self._places[id(ids)] = len(self._sizes)
            self._roots.append(np.array(self._labelling.roots(ids), int))
            self._sizes.append(len(ids))
        return self._places[id(ids)]


def _macs(labelling: Labelling, graph: Graph) -> list[Term]:
    return [term for node in graph.nodes for term in _of_node(labelling, node)]


def _of_node(labelling: Labelling, node: Node) -> Iterator[Term]:
    if node.bodies:
        bodies = [_macs(labelling, body) for body in node.bodies]
        if node.name == "cond":
            bodies = [max(bodies, key=lambda terms: sum(map(_size, terms)))]
        length = node.params["length"] if node.name == "scan" else 1
        for term in (term for body in bodies for term in body):
            yield term._replace(times=length * term.times)
    elif node.name in _FACTORS:
        operands = [_sized(axes) for axes in labelling.operands[node]]
        results = _sized(labelling.results[node][0])
        yield Term(1, [*results, *_FACTORS[node.name](node, operands)])


def _size(term: Term) -> int:
    return term.times * prod(size for _, size in term.axes)


def _sized(axes: Axes) -> list[tuple[Axis, Any]]:
    return list(zip(axes, axes.shape, strict=True))


def _convolution(node: Node, operands: Sequence[Any]) -> Sequence[Any]:
    outputs = node.params["dimension_numbers"].rhs_spec[0]
    return [axis for k, axis in enumerate(operands[1]) if k != outputs]


def _dot(node: Node, operands: Sequence[Any]) -> Sequence[Any]:
    (contracted, _), _ = node.params["dimension_numbers"]
    return [operands[0][k] for k in contracted]


# For each element of the result: the sizes that it takes.
_FACTORS = {
    "conv_general_dilated": _convolution,
    "dot_general": _dot,
    "mul": lambda node, operands: [],
}
