"""Chains of additions and multiplications by what depends on parameters alone."""

from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple, TypeAlias

from jaxaccel._graph import Atom, Literal, Node, Value, shape_of
from jaxaccel.fold._view import Labels, View, floating, moved, moves

_SHIFTS = ("add", "sub")


class Step(NamedTuple):
    """One node ``y op other``, or ``other op y`` where not `left`; `labels` are those of y."""

    node: Node
    y: Value
    other: Atom | None  # None for a negation
    left: bool
    labels: Labels

    @property
    def shifts(self) -> bool:
        return self.node.name in _SHIFTS

    @property
    def out(self) -> Value:
        return self.node.outputs[0]


Steps: TypeAlias = tuple[Step, ...]


class Run(NamedTuple):
    """A chain, the value at which it ends, and the labels there."""

    steps: Steps
    end: Value
    labels: Labels


def step(view: View, node: Node, labels: Labels = ()) -> Step | None:
    """The node as a step of a chain, if it is affine in its one operand that is not known."""
    if node.name == "neg" and isinstance(node.inputs[0], Value):
        found = Step(node, node.inputs[0], None, True, labels)
    elif node.name in ("add", "sub", "mul", "div"):
        first, second = node.inputs
        left = view.knows(second)
        y, other = (first, second) if left else (second, first)
        if not isinstance(y, Value) or not view.knows(other) or (node.name == "div" and not left):
            return None
        found = Step(node, y, other, left, labels)
    else:
        return None
    same = found.y.shape == found.out.shape and floating(found.y)
    return found if same and not view.knows(found.y) and not _averages(view, found) else None


def _averages(view: View, found: Step) -> bool:
    """Whether it divides a sum: by a count that depends on the shape of the arguments."""
    maker = view.makers.get(found.y)
    while maker is not None and moves(maker) and isinstance(maker.inputs[0], Value):
        maker = view.makers.get(maker.inputs[0])
    constant = isinstance(found.other, Literal) and not found.shifts
    return constant and maker is not None and maker.name.startswith("reduce_")


def varies(view: View, found: Step) -> set[int | None]:
    """The labels of the axes along which the coefficient varies; None for another axis."""
    if found.other is None or not shape_of(found.other):
        return set()
    return {found.labels[axis] for axis in view.varies(found.other)}


def forward(
    view: View,
    value: Value,
    labels: Labels,
    channels: Collection[int | None] | None,
    first: Node | None = None,
    taken: Collection[Node] = (),
) -> Run:
    """The chain that starts at `value`.

    It varies along `channels` only; where they are None, along those of its first step that
    varies. `first` is the reader to take where `value` has several.
    """
    steps: list[Step] = []
    node = first or view.only_reader(value)
    while node is not None and node not in taken:
        found = step(view, node, labels)
        if found is not None:
            along = varies(view, found)
            if None in along or (channels is not None and not along <= set(channels)):
                break
            if channels is None and along:
                channels = along - {None}
            steps.append(found)
        elif moves(node) and _keeps(labels, moved(node, labels), node):
            labels = moved(node, labels)
        else:
            break
        value = node.outputs[0]
        node = view.only_reader(value)
    return Run(tuple(steps), value, labels)


def _keeps(before: Labels, after: Labels, node: Node) -> bool:
    """Whether every labelled axis of more than one element still has its label."""
    sizes = shape_of(node.inputs[0])
    wide = {x for x, size in zip(before, sizes, strict=True) if x is not None and size != 1}
    return wide <= set(after)


def backward(view: View, value: Value, taken: Collection[Node]) -> tuple[Value, list[Node], bool]:
    """What may lead to `value`: where it starts, its nodes, and if another reader cut it."""
    nodes: list[Node] = []
    start, cut = value, False
    while (node := view.makers.get(value)) is not None and node not in taken:
        found = step(view, node)
        before = found.y if found else node.inputs[0] if moves(node) else None
        if not isinstance(before, Value):
            break
        cut = cut or view.only_reader(value) is None
        if cut and found:
            return start, nodes[::-1], True
        if not cut:
            nodes.append(node)
            start = before
        value = before
    return start, nodes[::-1], False


def leading(
    view: View, start: Value, nodes: Sequence[Node], places: Sequence[int]
) -> tuple[Steps, Labels]:
    """The longest end of `nodes` that varies along `places` only, the axes it leads to.

    Returns the steps and, for each of the places, its label in them.
    """
    for i in range(len(nodes) + 1):
        value = nodes[i - 1].outputs[0] if i else start
        labels: Labels = tuple(range(len(value.shape)))
        steps: list[Step] = []
        for node in nodes[i:]:
            found = step(view, node, labels)
            steps += [found] if found else []
            labels = labels if found else moved(node, labels)
        order = tuple(labels[place] for place in places)
        if all(varies(view, s) <= set(order) - {None} for s in steps):
            return tuple(steps), order
    raise AssertionError("an empty chain varies along no axis")


def behind_pad(
    view: View, start: Value, nodes: Sequence[Node], places: Sequence[int], taken: Collection[Node]
) -> Steps:
    """The chain that could end in `nodes`, were `start` not made by a pad of other axes."""
    pad = view.makers.get(start)
    if pad is None or pad.name != "pad" or view.only_reader(start) is None:
        return ()
    unpadded = pad.inputs[0]
    if not isinstance(unpadded, Value):
        return ()
    first, before, _ = backward(view, unpadded, taken)
    steps, order = leading(view, first, [*before, pad, *nodes], places)
    sizes = (nodes[-1].outputs[0] if nodes else start).shape
    whole = all(x is not None or sizes[place] == 1 for x, place in zip(order, places, strict=True))
    return steps if whole and any(s.node in before for s in steps) else ()


def computed(view: View, atom: Atom | None) -> bool:
    """Whether `atom` is computed from parameters, not one of them as it is."""
    return isinstance(atom, Value) and view.origin(atom) is None and bool(view.sources([atom]))


def gains(view: View, steps: Iterable[Step], scales: bool = False) -> bool:
    """Whether one addition (and, if it `scales`, one multiplication) is less than the steps."""
    steps = tuple(steps)
    left = any(s.shifts for s in steps) + (scales and any(not s.shifts for s in steps))
    return len(steps) > left or any(computed(view, s.other) for s in steps)
