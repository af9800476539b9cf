"""The biases that go into the accumulators of their layers."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxaccel._dataflow import evaluate
from jaxaccel._graph import Value
from jaxaccel.fold._coefficients import compose
from jaxaccel.fold._view import Keys, View, beside
from jaxaccel.quantize._layers import Layer
from jaxaccel.quantize._program import Program


class Biases(NamedTuple):
    """Of each layer that has one: the numbers, and the path where they are kept.

    `gone` are the leaves that nothing else reads.
    """

    of: dict[Layer, np.ndarray]
    keys: dict[Layer, Keys]
    gone: set[Keys]


def biases(program: Program, layers: Sequence[Layer], leaves: Mapping[Keys, Any]) -> Biases:
    """What the layers add to their sums, one number for each output channel."""
    view = program.view
    found = Biases({}, {}, set())
    shifted = [layer for layer in layers if layer.tail.shifts]
    nodes = {s.node for layer in shifted for s in layer.tail.shifts}
    others = [s.other for layer in shifted for s in layer.tail.shifts if isinstance(s.other, Value)]
    given = {leaf: leaves[view.leaves[leaf]] for leaf in view.sources(others)}
    wanted = list(dict.fromkeys(others))
    values = dict(zip(wanted, evaluate(view.graph, given, wanted), strict=True))
    for layer in shifted:
        c = layer.contraction
        shift = compose(layer.tail.shifts, tuple(range(len(c.outs))), values).shift
        found.of[layer] = np.broadcast_to(np.asarray(shift, np.float64), c.sizes)
        found.keys[layer] = _path(view, layer)
    found.gone.update(view.leaves[leaf] for leaf in given if view.read_by(leaf) <= nodes)
    return found


def _path(view: View, layer: Layer) -> Keys:
    """That of the bias beside the kernel, if nothing else reads it; else one named so."""
    kernel = view.leaves[layer.kernel.leaf]
    nodes = {s.node for s in layer.tail.shifts}
    for s in layer.tail.shifts:
        leaf = view.origin(s.other) if s.other is not None else None
        if leaf in view.leaves and view.read_by(leaf) <= nodes:
            keys = view.leaves[leaf]
            if beside(keys, "") == beside(kernel, ""):
                return keys
    return beside(kernel, "bias")
