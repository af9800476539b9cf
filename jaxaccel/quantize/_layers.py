"""Which convolutions and dot products run on integers, and what is done to their accumulators."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import inf, prod
from typing import NamedTuple

import numpy as np

from jaxaccel._graph import Atom, Literal, Node, Value
from jaxaccel.fold._chains import Step, step, varies
from jaxaccel.fold._contractions import Contraction, contraction
from jaxaccel.fold._view import Labels, View, floating, moved, moves

CONTRACTIONS = ("conv_general_dilated", "dot_general")
# Of which the sum, its correction and a bias of 2^29 steps fit 32 bits.
MOST_TERMS = 3 * 2**29 // (128 * 255)


class Bounds(NamedTuple):
    """The real numbers to which a relu, a relu6 or a clip limits a value."""

    low: float = -inf
    high: float = inf


@dataclass(frozen=True, eq=False)
class Kernel:
    """The parameter that is the kernel of a contraction.

    Attributes:
        leaf: the parameter.
        outs: of each output axis of the contraction, the axis of the leaf; None for one of size 1.
        ins: the same of each input axis; None also for one that is merged or split.
        path: the nodes that lead from the leaf to the contraction.
    """

    leaf: Value
    outs: Labels
    ins: Labels
    path: tuple[Node, ...]

    @property
    def axes(self) -> tuple[int, ...]:
        """Those of the leaf along which a scale is kept."""
        return tuple(sorted(axis for axis in self.outs if axis is not None))


@dataclass(frozen=True, eq=False)
class Tail:
    """What follows a sum while it is in 32 bits.

    Attributes:
        moves: nodes that only move it, or choose of it: max pooling, which may as well precede what
            rises with the sum.
        shifts: additions of a bias.
        bounds: of the relus behind these.
        end: the value that leaves, and `labels` the output channel of each of its axes.
    """

    moves: tuple[Node, ...]
    shifts: tuple[Step, ...]
    bounds: Bounds
    end: Value
    labels: Labels


@dataclass(frozen=True, eq=False)
class Layer:
    """A convolution or a dot product of data with a kernel.

    Where it is `fixed`, what follows is done in 32 bits, with constants of its own.
    """

    contraction: Contraction
    kernel: Kernel
    tail: Tail
    fixed: bool


@dataclass(frozen=True)
class Left:
    """What stays in floating point, and why."""

    where: str
    source: str
    reason: str


def bounds_of(view: View, node: Node) -> tuple[Value, Bounds] | None:
    """The operand of a relu, relu6 or clip between fixed numbers, and its bounds."""
    if node.name == "clamp":
        low, x, high = node.inputs
        numbers = number_of(view, low), number_of(view, high)
        if isinstance(x, Value) and not view.knows(x) and None not in numbers:
            return x, Bounds(*numbers)  # pyright: ignore[reportArgumentType]
    if node.name in ("max", "min"):
        for x, other in (node.inputs, node.inputs[::-1]):
            number = number_of(view, other)
            if isinstance(x, Value) and not view.knows(x) and number is not None:
                return x, Bounds(low=number) if node.name == "max" else Bounds(high=number)
    return None


def number_of(view: View, atom: Atom) -> float | None:
    """The one number that all elements are, where no parameter and no argument decides it."""
    while isinstance(atom, Value) and (maker := view.makers.get(atom)) is not None:
        if maker.name not in ("broadcast_in_dim", "convert_element_type", "copy"):
            return None
        atom = maker.inputs[0]
    value = atom.val if isinstance(atom, Literal) else view.graph.constants.get(atom)
    if not isinstance(value, np.ndarray | np.generic | float | int) or np.ndim(value):
        return None
    number = float(value)
    return None if np.isnan(number) else number


def tail(view: View, value: Value, labels: Labels, sums: bool = True) -> Tail:
    """What follows `value` and has no other reader: moves and biases first, relus after.

    Where it is of no contraction (not `sums`): the relus alone.
    """
    found: list[Node] = []
    shifts: list[Step] = []
    limits = Bounds()
    node = view.only_reader(value)
    while node is not None:
        limited = bounds_of(view, node)
        bias = _bias(view, node, labels) if sums and limits == Bounds() else None
        if limited is not None:
            low, high = limited[1]
            limits = Bounds(min(max(limits.low, low), high), min(max(limits.high, low), high))
        elif bias is not None:
            shifts.append(bias)
        elif sums and _thins(node, labels):
            found.append(node)
        elif sums and moves(node) and limits == Bounds():
            after = moved(node, labels)
            if set(labels) - {None} - set(after):
                break
            found.append(node)
            labels = after
        elif node.name != "convert_element_type" or not moves(node):
            break
        value = node.outputs[0]
        node = view.only_reader(value)
    return Tail(tuple(found), tuple(shifts), limits, value, labels)


def _thins(node: Node, labels: Labels) -> bool:
    """Whether it is a max pooling of windows that do not overlap: in 32 bits, but before the rest.

    None of them lies in the padding alone, and each channel has its own.
    """
    if node.name != "reduce_window_max":
        return False
    p = node.params
    windows = list(zip(p["window_dimensions"], p["window_strides"], p["padding"], strict=True))
    own = all(
        window == (1, 1, (0, 0))
        for window, label in zip(windows, labels, strict=True)
        if label is not None
    )
    apart = all(size <= step and max(edges) < size for size, step, edges in windows)
    return own and apart and {*p["base_dilation"], *p["window_dilation"]} == {1}


def _bias(view: View, node: Node, labels: Labels) -> Step | None:
    """The node as the addition of one number for each output channel."""
    found = step(view, node, labels)
    if found is None or not found.shifts or (node.name == "sub" and not found.left):
        return None
    return found if None not in varies(view, found) else None


def layer(view: View, node: Node, fixed: bool) -> Layer | Left | None:
    """The node as a layer; why it cannot be one; None if it has no kernel.

    `fixed` tells whether what follows may be done in 32 bits: not in loops, and not where the
    kernel has another reader.
    """
    c = contraction(view, node)
    if c is None or not view.sources([c.kernel]):
        return None
    kernel, reason = _kernel(view, c)
    reason = reason or unfit(c)
    if kernel is None or reason:
        where = ", ".join("/".join(view.leaves[leaf]) for leaf in view.sources([c.kernel]))
        return Left(where, node.source, reason)
    value = node.outputs[0]
    own = fixed and not view.read_by(kernel.leaf) - {node}
    after = tail(view, value, c.labels) if own else Tail((), (), Bounds(), value, c.labels)
    return Layer(c, kernel, after, own)


def unfit(c: Contraction) -> str:
    """Why a contraction cannot run on integers."""
    terms = prod(n for i, n in enumerate(c.kernel.shape) if i not in c.outs)
    if not (floating(c.data) and floating(c.kernel) and floating(c.node.outputs[0])):
        return f"its operands are {c.data.aval.dtype} and {c.kernel.aval.dtype}"
    if not isinstance(terms, int) or terms > MOST_TERMS:
        return f"a sum of {terms} products may not fit 32 bits"
    if not all(c.kernel.shape):
        return "its kernel is empty"
    if c.node.params.get("batch_group_count", 1) != 1:
        return "its batch is in groups"
    return ""


def _kernel(view: View, c: Contraction) -> tuple[Kernel | None, str]:
    path: list[Node] = []
    value: Atom = c.kernel
    while isinstance(value, Value) and value not in view.leaves:
        maker = view.makers.get(value)
        if maker is None or not moves(maker):
            used = ", ".join("/".join(view.leaves[leaf]) for leaf in view.sources([value]))
            return None, f"its kernel is computed from {used}"
        path.append(maker)
        value = maker.inputs[0]
    assert isinstance(value, Value)
    labels: Labels = tuple(range(len(value.shape)))
    for node in reversed(path):
        labels = moved(node, labels)
    outs = tuple(labels[axis] if c.kernel.shape[axis] != 1 else None for axis in c.outs)
    if any(x is None and c.kernel.shape[axis] != 1 for x, axis in zip(outs, c.outs, strict=True)):
        return None, "its output channels are merged or split"
    return Kernel(value, outs, tuple(labels[axis] for axis in c.ins), tuple(reversed(path))), ""


def contractions(view: View) -> Iterator[Node]:
    """The convolutions and dot products that read data, in order."""
    for node in view.graph.nodes:
        if node.name in CONTRACTIONS and not view.known.issuperset(node.outputs):
            yield node
