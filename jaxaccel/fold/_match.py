"""Which chains of a graph go where. It looks at the structure alone, never at a parameter."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from jaxaccel._graph import Atom, Graph, Node, Value, loop, shape_of
from jaxaccel.fold._chains import Steps, backward, behind_pad, forward, gains, leading, step, varies
from jaxaccel.fold._contractions import Contraction, contraction
from jaxaccel.fold._report import Refused
from jaxaccel.fold._view import Keys, Labels, View, beside, floating, moved, moves, view


class Fold(NamedTuple):
    """A kernel with the chains before and after its contraction."""

    contraction: Contraction
    leaf: Value
    axes: Labels  # of the kernel operand: the leaf's
    before: Steps
    order: Labels  # of the input channels in the steps before
    after: Steps
    bias: Value | None  # the leaf whose path the new bias takes

    @property
    def steps(self) -> Steps:
        return self.before + self.after

    @property
    def end(self) -> Value:
        """Where the new bias is added."""
        return (self.after[-1].node if self.after else self.contraction.node).outputs[0]

    @property
    def labels(self) -> Labels:
        """The output channel of each axis there."""
        return self.after[-1].labels if self.after else self.contraction.labels

    def bias_keys(self, v: View) -> Keys | None:
        """The path of the new bias, if there is one."""
        if not any(s.shifts for s in self.steps):
            return None
        return v.leaves[self.bias] if self.bias else beside(v.leaves[self.leaf], "bias")


class Merge(NamedTuple):
    """A chain without a kernel; its multiplications and additions go into leaves of its own."""

    steps: Steps
    channels: tuple[int, ...]  # the axes along which it varies
    scale: Value | None
    bias: Value | None

    @property
    def sizes(self) -> tuple[Any, ...]:
        return tuple(self.steps[0].y.shape[axis] for axis in self.channels)


@dataclass(eq=False)
class Matches:
    """What is to be done with a graph."""

    folds: list[Fold] = field(default_factory=list)
    merges: list[Merge] = field(default_factory=list)
    refused: list[Refused] = field(default_factory=list)


def match(v: View) -> Matches:
    """All that can be folded in a graph, and what cannot and why."""
    found = Matches()
    contractions = [c for node in v.graph.nodes if (c := contraction(v, node))]
    after = {c.node: _after(v, c, found) for c in contractions}
    taken = {s.node for steps in after.values() for s in steps}
    for c in contractions:
        fold = _fold(v, c, after[c.node], taken, found)
        if fold is not None:
            found.folds.append(fold)
            taken.update(s.node for s in fold.before)
    folded = {s.node for fold in found.folds for s in fold.steps}
    _merge_all(v, folded, found)
    found.refused += _in_loops(v)
    return found


def _refuse(v: View, found: Matches, c: Contraction, reason: str) -> None:
    leaf = v.origin(c.kernel)
    where = "/".join(v.leaves[leaf]) if leaf in v.leaves else c.node.name
    entry = Refused(where, c.node.source, reason)
    if entry not in found.refused:
        found.refused.append(entry)


def _after(v: View, c: Contraction, found: Matches) -> Steps:
    """The chain behind a contraction, empty where its kernel cannot take it."""
    channels = range(len(c.outs))
    steps, end, labels = forward(v, c.node.outputs[0], c.labels, channels)
    reason = _unfit(v, c, steps)
    if reason and gains(v, steps):
        _refuse(v, found, c, reason)
    readers = v.readers.get(end, [])
    if len(readers) + (end in v.outputs) > 1:
        rest = (forward(v, end, labels, channels, node).steps for node in readers)
        if any(further and gains(v, further) for further in rest):
            _refuse(v, found, c, f"{_name(v, end, c)} has another reader")
    return () if reason else steps


def _name(v: View, value: Value, c: Contraction) -> str:
    maker = v.makers[value]
    return "its result" if maker is c.node else f"the result of {maker.name} at {maker.source}"


def _unfit(v: View, c: Contraction, steps: Steps) -> str | None:
    """Why the kernel cannot take the coefficients of `steps`."""
    leaf, axes = _kernel(v, c)
    if leaf is None:
        used = ["/".join(v.leaves[leaf]) for leaf in v.sources([c.kernel])]
        return f"its kernel is computed from {', '.join(used)}" if used else "its kernel is fixed"
    if None in [x for x, size in zip(axes, c.kernel.shape, strict=True) if size != 1]:
        return "its kernel is a parameter whose axes are merged or split"
    if not floating(leaf):
        return f"its kernel is {leaf.aval.dtype}"
    if v.read_by(leaf) - {c.node, *(s.node for s in steps)}:
        return "its kernel has another reader"
    return None


def _kernel(v: View, c: Contraction) -> tuple[Value | None, Labels]:
    """The one leaf that is the kernel, and which of its axes the kernel's are."""
    path: list[Node] = []
    value: Atom = c.kernel
    while isinstance(value, Value) and value not in v.leaves:
        maker = v.makers.get(value)
        if maker is None or not moves(maker):
            return None, ()
        path.append(maker)
        value = maker.inputs[0]
    labels: Labels = tuple(range(len(shape_of(value))))
    for node in reversed(path):
        labels = moved(node, labels)
    return (value, labels) if isinstance(value, Value) else (None, ())


def _fold(
    v: View, c: Contraction, after: Steps, taken: Collection[Node], found: Matches
) -> Fold | None:
    start, nodes, cut = backward(v, c.data, taken)
    before, order = leading(v, start, nodes, c.places)
    if cut:
        _refuse(v, found, c, "what it reads has another reader")
    hidden = behind_pad(v, start, nodes, c.places, taken) + after
    if len(hidden) > len(after) and gains(v, hidden) and not _unfit(v, c, hidden):
        place = f" at {source}" if (source := v.makers[start].source) else ""
        _refuse(v, found, c, f"padding: the pad{place} separates it from the chain before")
    if c.padded and any(s.shifts for s in before):
        _refuse(v, found, c, "padding: what is added before it is not added to the zeros")
        before = ()
    reason = _unfit(v, c, before + after)
    if before and reason:
        _refuse(v, found, c, reason)
    leaf, axes = _kernel(v, c)
    if reason or leaf is None or not gains(v, before + after):
        return None
    return Fold(c, leaf, axes, before, order, after, _own_bias(v, c, leaf, after))


def _own_bias(v: View, c: Contraction, kernel: Value, steps: Steps) -> Value | None:
    """The bias beside the kernel, if the chain adds it and nothing else reads it."""
    for s in steps:
        leaf = v.origin(s.other) if s.node.name == "add" and s.other is not None else None
        if leaf in v.leaves and beside(v.leaves[leaf], "") == beside(v.leaves[kernel], ""):
            return leaf if _holds(v, leaf, c.sizes, steps) else None
    return None


def _holds(v: View, leaf: Value, sizes: Sequence[Any], steps: Steps) -> bool:
    """Whether the leaf has the shape of the channels, and is read by these steps alone."""
    wide = lambda shape: [size for size in shape if size != 1]
    alone = v.read_by(leaf) <= {s.node for s in steps}
    return alone and floating(leaf) and wide(leaf.shape) == wide(sizes)


def _merge_all(v: View, folded: Collection[Node], found: Matches) -> None:
    seen = set(folded)
    for node in v.graph.nodes:
        first = None if node in seen else step(v, node)
        if first is None:
            continue
        axes = tuple(range(len(first.y.shape)))
        steps = forward(v, first.y, axes, None, node, folded).steps
        seen.update(s.node for s in steps)
        if gains(v, steps, scales=True) and v.sources(s.other for s in steps):
            _merge(v, steps, found)


def _merge(v: View, steps: Steps, found: Matches) -> None:
    channels = sorted({x for s in steps for x in varies(v, s) if x is not None})
    sizes = [steps[0].y.shape[axis] for axis in channels]
    scale = _first(v, steps, sizes, "mul", "div")
    bias = _first(v, steps, sizes, "add", "sub")
    scales = any(not s.shifts or (s.node.name == "sub" and not s.left) for s in steps)
    shifts = any(s.shifts for s in steps)
    if (scales and scale is None) or (shifts and bias is None):
        reason = "no convolution or dot before it, and no scale and bias of its own to hold it"
        found.refused.append(Refused(steps[0].node.name, steps[0].node.source, reason))
        return
    kept = (scale if scales else None, bias if shifts else None)
    found.merges.append(Merge(steps, tuple(channels), *kept))


def _first(v: View, steps: Steps, sizes: Sequence[Any], op: str, inverse: str) -> Value | None:
    """The first leaf that is a factor (or a term) of the chain and can hold the product."""
    for s in steps:
        direct = s.node.name == op or (s.node.name == inverse and not s.left)
        for leaf in _terms(v, s.other, op, inverse) if direct else ():
            if _holds(v, leaf, sizes, steps):
                return leaf
    return None


def _terms(v: View, atom: Atom | None, op: str, inverse: str) -> Iterator[Value]:
    leaf = v.origin(atom) if atom is not None else None
    if leaf in v.leaves:
        yield leaf
    maker = v.makers.get(atom) if isinstance(atom, Value) and leaf is None else None
    if maker is not None and (maker.name in (op, inverse) or moves(maker)):
        for part in maker.inputs if maker.name == op else maker.inputs[:1]:
            yield from _terms(v, part, op, inverse)


def _in_loops(v: View) -> Iterator[Refused]:
    """Loops and branches that hold something to fold; they are not entered."""
    for node in v.graph.nodes:
        for body, operands in _bodies(node):
            given = {
                value: (node.name, str(i))
                for i, (value, atom) in enumerate(zip(body.inputs, operands, strict=False))
                if v.knows(atom)
            }
            inside = match(view(body, given))
            if inside.folds or inside.merges or inside.refused:
                yield Refused(node.name, node.source, f"inside {node.name}")
                break


def _bodies(node: Node) -> list[tuple[Graph, Sequence[Atom | None]]]:
    """The bodies of a loop with the operands that they read; None for what the loop changes."""
    if node.name == "cond":
        return [(body, node.inputs[1:]) for body in node.bodies]
    if node.name not in ("scan", "while"):
        return []
    consts, body_consts, carry = loop(node)
    changed: list[Atom | None] = [None] * carry
    if node.name == "scan":
        return [(node.bodies[0], [*node.inputs[:consts], *changed, *node.inputs[consts + carry :]])]
    return [(node.bodies[1], [*node.inputs[consts : consts + body_consts], *changed])]
