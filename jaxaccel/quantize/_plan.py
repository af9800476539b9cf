"""Finds the program of a graph: what can run on integers, and which values share a grid."""

from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from math import inf, prod
from types import MappingProxyType
from typing import Literal, NamedTuple, TypeAlias

from jaxaccel._dataflow import flatten
from jaxaccel._graph import Atom, Graph, Node, Value, loop, primitives, values_of
from jaxaccel.fold._view import Keys, View, floating, moves, view
from jaxaccel.quantize._layers import (
    CONTRACTIONS,
    MOST_TERMS,
    Bounds,
    Layer,
    Left,
    Tail,
    bounds_of,
    contractions,
    layer,
    number_of,
    tail,
)
from jaxaccel.quantize._program import (
    Joined,
    Mean,
    Product,
    Program,
    Same,
    Step,
    Sum,
    end_of,
    nodes_of,
    operands_of,
)

Activations: TypeAlias = Literal["static", "dynamic", "float"]
CUSTOM = ("custom_jvp_call", "custom_vjp_call")
LOOPS = ("scan", "while", "cond")
_OTHERS = ("ragged_dot", "ragged_dot_general")  # products without a form on integers
_MOST_SUMMED = 2**15
# By which a parameter is read in part.
_PICKS = {"dynamic_slice", "gather", "reshape", "slice"}
# These neither compute nor choose by what an integer stands for.
_SAME = {
    *("copy", "copy_p", "reduce_max", "reduce_window_max", "reshape", "rev", "slice", "squeeze"),
    *("stop_gradient", "transpose", "broadcast_in_dim"),
}


class Choice(NamedTuple):
    """What is asked for.

    Attributes:
        takes: whether the kernel of a path, or the product of a name, is to be quantized.
        left: those that are not, with the reason.
    """

    activations: Activations
    takes: Callable[[Keys], bool]
    left: Mapping[Keys, str] = MappingProxyType({})


@dataclass(eq=False)
class Plan:
    """A program with the axes along which each kernel is scaled, and the number of its grids.

    `products` are the names of the products of data with data.
    """

    program: Program
    axes: dict[Keys, tuple[int, ...]]
    grids: int
    products: list[Keys]


class Leaf(NamedTuple):
    """A parameter as a graph reads it: in a loop, without the axes that are scanned over.

    Where `computed`, what a loop reads of values that were computed from parameters outside of it.
    """

    keys: Keys
    scanned: int = 0
    computed: bool = False


def plan(graph: Graph, leaves: Mapping[Value, Keys], choice: Choice) -> Plan:
    """The program of a graph whose first inputs are `leaves`."""
    builder = _Builder(choice)
    own = {value: Leaf(keys) for value, keys in leaves.items()}
    made = builder.build(graph, own, choice.activations == "static")
    return Plan(made, builder.axes, builder.grids, builder.products)


class _Builder:
    """Gives the grids of a graph and of its loops their numbers, in one order."""

    def __init__(self, choice: Choice) -> None:
        self.choice, self.grids, self.met = choice, 0, 0
        self.axes: dict[Keys, tuple[int, ...]] = {}
        self.products: list[Keys] = []

    def build(self, graph: Graph, leaves: Mapping[Value, Leaf], fixed: bool) -> Program:
        v = view(flatten(graph, CUSTOM), {value: leaf.keys for value, leaf in leaves.items()})
        found = Program(v)
        for node in contractions(v):
            step = self._contraction(v, node, leaves, fixed)
            if isinstance(step, Left):
                found.left.append(step)
            else:
                found.steps[node] = step
        if fixed:
            _between(found)
        if self.choice.activations == "static":
            self._number(found)
        for node in v.graph.nodes:
            if v.known.issuperset(node.outputs):
                continue
            found.left += _not_entered(node)
            if node.name in LOOPS:
                bodies = (self.build(b, _inner(v, node, b, places, leaves), False)
                          for b, places in _operands(node))  # fmt: skip
                found.bodies[node] = tuple(bodies)
        return found

    def _contraction(
        self, v: View, node: Node, leaves: Mapping[Value, Leaf], fixed: bool
    ) -> Step | Left:
        step = layer(v, node, fixed)
        if step is None:
            return self._product(v, node)
        if isinstance(step, Left):
            return step
        leaf = leaves[step.kernel.leaf]
        path = "/".join(leaf.keys)
        reason = f"its kernel is computed from {path}" if leaf.computed else self._why(leaf.keys)
        if reason:
            return Left(path, node.source, reason)
        axes = (*range(leaf.scanned), *(axis + leaf.scanned for axis in step.kernel.axes))
        if self.axes.setdefault(leaf.keys, axes) != axes:
            return Left(path, node.source, "its kernel is scaled along other axes elsewhere")
        return replace(step, tail=_limited(v, step.tail)) if step.fixed else step

    def _product(self, v: View, node: Node) -> Step | Left:
        name = f"{node.name}_{self.met}"
        step = _product(v, node, name, self.choice.activations)
        if isinstance(step, Left):
            return step
        self.met += 1
        reason = self._why((name,))
        if reason:
            return Left(name, node.source, reason)
        self.products.append((name,))
        return step

    def _why(self, keys: Keys) -> str:
        """Why it is not to be quantized; nothing if it is."""
        return self.choice.left.get(keys, "") if self.choice.takes(keys) else "left out by where="

    def _number(self, found: Program) -> None:
        """Gives every value in 8 bits its grid; values that are moved or joined share one."""
        wanted = _wanted(found)
        same = _tied(found, wanted)
        moved_ = {end_of(s) for s in found.steps.values() if isinstance(s, Same)}
        numbers: dict[Value, int] = {}
        for value in _in_order(found.view.graph):
            if value in wanted:
                root = same.root(value)
                if root not in numbers:
                    numbers[root] = self.grids
                    self.grids += 1
                found.integers[value] = numbers[root]
                if value not in moved_:
                    found.watched[value] = numbers[root]
        for step in found.steps.values():
            if isinstance(step, Product):
                found.symmetric |= {found.integers[x] for x in step.operands}


class _Classes:
    """Values that share a grid."""

    def __init__(self) -> None:
        self._parent: dict[Value, Value] = {}

    def root(self, value: Value) -> Value:
        while value in self._parent:
            value = self._parent[value]
        return value

    def tie(self, one: Value, other: Value) -> None:
        a, b = self.root(one), self.root(other)
        if a is not b:
            self._parent[a] = b


def _tied(found: Program, wanted: Set[Value]) -> _Classes:
    same = _Classes()
    for step in found.steps.values():
        if end_of(step) in wanted and isinstance(step, Same):
            same.tie(end_of(step), step.operand)
        elif end_of(step) in wanted and isinstance(step, Joined):
            for operand in step.operands:
                if found.view.only_reader(operand) is not None:
                    same.tie(end_of(step), operand)
    return same


def _in_order(graph: Graph) -> Iterator[Value]:
    yield from graph.inputs
    for node in graph.nodes:
        yield from node.outputs


def _wanted(found: Program) -> set[Value]:
    """The values that something reads in 8 bits."""
    wanted: set[Value] = set()
    for step in reversed(list(found.steps.values())):
        if isinstance(step, Layer | Product) or end_of(step) in wanted:
            wanted.update(operands_of(step))
    return wanted


def _product(v: View, node: Node, name: str, activations: Activations) -> Product | Left:
    first, second = node.inputs
    known = not isinstance(first, Value) or not isinstance(second, Value)
    if known or v.knows(first) or v.knows(second):
        return Left(node.name, node.source, "an operand is a constant")
    assert isinstance(first, Value)
    assert isinstance(second, Value)
    picked = v.sources([*_picked(v, first), *_picked(v, second)])
    if picked:
        paths = ", ".join("/".join(v.leaves[leaf]) for leaf in picked)
        return Left(paths, node.source, "the data decide which part of it is its kernel")
    if activations == "float":
        return Left(node.name, node.source, "it has no kernel, and activations are float")
    if node.name != "dot_general":
        return Left(node.name, node.source, "its kernel is computed from the data")
    terms = prod(first.shape[axis] for axis in node.params["dimension_numbers"][0][0])
    if not (floating(first) and floating(second)):
        return Left(node.name, node.source, f"operands of {first.aval.dtype}, {second.aval.dtype}")
    if not isinstance(terms, int) or terms > MOST_TERMS:
        return Left(node.name, node.source, f"a sum of {terms} products may not fit 32 bits")
    return Product(node, (first, second), name)


def _picked(v: View, value: Atom) -> list[Value]:
    """The value of which this is a part, if that is known and only the place of the part is not."""
    while isinstance(value, Value) and not v.knows(value):
        maker = v.makers.get(value)
        if maker is None or not (moves(maker) or maker.name in _PICKS):
            return []
        value = maker.inputs[0]
    return [value] if isinstance(value, Value) else []


def _not_entered(node: Node) -> Iterator[Left]:
    """The products that stay what they are because of where they stand, or of their kind."""
    if node.name in _OTHERS:
        yield Left(node.name, node.source, "there is none on integers")
    params, place = node.params, f"it stands inside of a {node.name}"
    if node.name == "while":
        params, place = {"": params["cond_jaxpr"]}, "it stands in the condition of a while loop"
    if node.name not in ("scan", "cond"):
        for name in primitives(params):
            if name in (*CONTRACTIONS, *_OTHERS):
                yield Left(name, node.source, place)


def _between(found: Program) -> None:
    """Adds the steps between layers: what can be done with integers that are there already."""
    v = found.view
    ready = {end_of(s) for s in found.layers if s.fixed}
    inside = {n for s in found.layers for n in nodes_of(v, s)}
    for node in v.graph.nodes:
        step = None if node in inside or node in found.steps else _step(v, node, ready)
        if step is not None:
            found.steps[node] = step
            inside.update(nodes_of(v, step))
            ready.add(end_of(step))
    order = {node: i for i, node in enumerate(v.graph.nodes)}
    found.steps = dict(sorted(found.steps.items(), key=lambda item: order[item[0]]))


def _step(v: View, node: Node, ready: set[Value]) -> Step | None:
    """A node that can run on integers which are there."""
    operands = values_of(node.inputs)
    if not operands or operands[0] not in ready or not floating(node.outputs[0]):
        return None
    limited = bounds_of(v, node)
    if limited is not None and _on_every_grid(limited[1]):
        return Same(node, *limited)
    if node.name in ("add", "add_any"):
        return _sum(v, node, operands) if ready.issuperset(operands) else None
    if node.name == "concatenate":
        return Joined(node, tuple(operands)) if ready.issuperset(node.inputs) else None
    if node.name in ("reduce_sum", "reduce_window_sum"):
        return _mean(v, node, operands[0])
    return Same(node, operands[0], Bounds()) if _keeps_grid(v, node) else None


def _limited(v: View, tail: Tail) -> Tail:
    """With the bounds of a relu behind a pooling or a reshape, which it may as well precede."""
    node, value = v.only_reader(tail.end), tail.end
    while node is not None and _keeps_grid(v, node) and node.inputs[0] is value:
        value = node.outputs[0]
        node = v.only_reader(value)
    limited = bounds_of(v, node) if node is not None and tail.bounds == Bounds() else None
    return replace(tail, bounds=limited[1]) if limited and _on_every_grid(limited[1]) else tail


def _on_every_grid(bounds: Bounds) -> bool:
    """Whether a grid, which has 0, has each of the bounds too or nothing beyond it."""
    return bounds.low <= 0 <= bounds.high


def _keeps_grid(v: View, node: Node) -> bool:
    if node.name == "reduce_window_max":  # of a window in the padding alone the maximum is -inf
        sides = zip(node.params["padding"], node.params["window_dimensions"], strict=True)
        return all(low < size and high < size for (low, high), size in sides)
    if node.name == "pad":
        return number_of(v, node.inputs[1]) == 0
    return node.name in _SAME or moves(node)


def _sum(v: View, node: Node, operands: Sequence[Value]) -> Sum | None:
    if len(operands) != 2 or operands[0].shape != operands[1].shape:
        return None
    out = node.outputs[0]
    after = tail(v, out, (None,) * len(out.shape), sums=False)
    return Sum(node, (operands[0], operands[1]), _limited(v, after))


def _mean(v: View, node: Node, operand: Value) -> Mean | None:
    """A sum of not too many elements, with the number by which it is divided."""
    if node.name == "reduce_sum":
        terms = prod(operand.shape[axis] for axis in node.params["axes"])
    else:
        terms = prod(node.params["window_dimensions"])
    if not isinstance(terms, int) or not 0 < terms <= _MOST_SUMMED:
        return None
    value, factor = node.outputs[0], 1.0
    scaled = v.only_reader(value)
    if scaled is not None and scaled.name in ("mul", "div") and scaled.inputs[0] is value:
        number = number_of(v, scaled.inputs[1])
        if number is not None and 0 < number < inf:
            value = scaled.outputs[0]
            factor = number if scaled.name == "mul" else 1 / number
    after = tail(v, value, (None,) * len(value.shape), sums=False)
    return Mean(node, operand, factor, terms, _limited(v, after))


def _operands(node: Node) -> list[tuple[Graph, list[int | None]]]:
    """The bodies of a loop, and for each of their inputs its place among the node's operands.

    None for what the loop changes. The condition of a while loop is not entered.
    """
    if node.name == "cond":
        return [(body, list(range(1, len(node.inputs)))) for body in node.bodies]
    consts, body_consts, carry = loop(node)
    changed: list[int | None] = [None] * carry
    if node.name == "scan":
        scanned = range(consts + carry, len(node.inputs))
        return [(node.bodies[0], [*range(consts), *changed, *scanned])]
    return [(node.bodies[1], [*range(consts, consts + body_consts), *changed])]


def _inner(
    v: View, node: Node, body: Graph, places: Sequence[int | None], leaves: Mapping[Value, Leaf]
) -> dict[Value, Leaf]:
    """The inputs of a body that are parameters, or computed from these alone."""
    found = {}
    first = len(node.inputs) if node.name != "scan" else sum(loop(node)[::2])
    for value, place in zip(body.inputs, places, strict=True):
        atom = None if place is None else node.inputs[place]
        if not isinstance(atom, Value) or not v.knows(atom):
            continue
        assert place is not None
        if atom in leaves:
            found[value] = leaves[atom]._replace(scanned=leaves[atom].scanned + (place >= first))
        else:
            sources = v.sources([atom])
            names = ", ".join("/".join(v.leaves[leaf]) for leaf in sources)
            found[value] = Leaf((names or "a constant",), computed=True)
    return found
