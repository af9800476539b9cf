"""What identifies matches: where the chains go, and how their coefficients are computed."""

from collections.abc import Sequence
from hashlib import sha256
from typing import Any

import numpy as np

from jaxaccel._graph import Atom, Graph, Literal, Node, Value, shape_of
from jaxaccel.fold._chains import Steps
from jaxaccel.fold._match import Fold, Matches
from jaxaccel.fold._rewrite import ends
from jaxaccel.fold._view import View, aligned, elementwise


def signature(v: View, matches: Matches) -> str:
    """Equal for two traces whose chains go to the same places and have the same coefficients."""
    known: dict[Atom, str] = {}
    folds = [_fold(v, f, known) for f in matches.folds]
    merges = [_chain(v, m.steps, m.channels, known) for m in matches.merges]
    places = [(end.scale, end.bias) for end in ends(v, matches)]
    return _hash((folds, merges, places))


def _hash(parts: Any) -> str:
    return sha256(repr(parts).encode()).hexdigest()


def _fold(v: View, f: Fold, known: dict[Atom, str]) -> Any:
    c = f.contraction
    channels = [[f.axes[axis] for axis in axes] for axes in (c.outs, c.ins)]
    before = _chain(v, f.before, f.order, known)
    after = _chain(v, f.after, range(len(c.outs)), known)
    return v.leaves[f.leaf], channels, c.groups, before, after


def _chain(v: View, steps: Steps, order: Sequence[int | None], known: dict[Atom, str]) -> Any:
    found = []
    for s in steps:
        axes = sorted(v.varies(s.other)) if s.other is not None else []
        along = [order.index(s.labels[axis]) for axis in axes]
        found.append((s.node.name, s.left, along, _digest(v, s.other, known)))
    return found


def _digest(v: View, atom: Atom | None, known: dict[Atom, str]) -> str:
    """Of how a coefficient is computed, down to its constants.

    The axes along which it does not vary do not count: they have the sizes of the activation.
    """
    if not isinstance(atom, Value):
        return _constant(atom.val) if isinstance(atom, Literal) else ""
    if atom not in known:
        if atom in v.leaves:
            known[atom] = _hash(v.leaves[atom])
        elif atom in v.graph.constants:
            known[atom] = _constant(v.graph.constants[atom])
        else:
            known[atom] = _made(v, atom, known)
    return known[atom]


def _made(v: View, value: Value, known: dict[Atom, str]) -> str:
    node = v.makers[value]
    operands = [_digest(v, x, known) for x in node.inputs]
    aligns = node.name in ("broadcast_in_dim", "reshape", "squeeze")
    if aligns and aligned(node, v.varies(node.inputs[0])) is not None:
        return operands[0]  # no node, then, where a batch of one need not be broadcast to
    place = node.outputs.index(value)
    return _hash((node.name, _static(node), place, operands, _layout(v, node)))


def _layout(v: View, node: Node) -> Any:
    """How the axes of the operands stand to each other, and their sizes where these matter."""
    axes = [sorted(v.varies(x)) for x in node.inputs]
    if elementwise(node):
        along = sorted({axis for found in axes for axis in found})
        return [[along.index(axis) for axis in found] for found in axes]
    shapes = [shape_of(x) for x in (*node.inputs, *node.outputs)]
    return axes, shapes if node.name != "transpose" else ()


def _static(node: Node) -> Any:
    """Its parameters and its bodies; not the functions among them, which have no lasting name."""
    words = {name: repr(x) for name, x in sorted(node.params.items())}
    printed = lambda word: "0x" in word or (node.bodies and "{ lambda" in word)
    kept = {name: word for name, word in words.items() if not printed(word)}
    return kept, [_body(body) for body in node.bodies]


def _body(graph: Graph) -> Any:
    numbers: dict[Value, int] = {}
    made = [value for node in graph.nodes for value in node.outputs]
    for value in (*graph.inputs, *graph.constants, *made):
        numbers[value] = len(numbers)
    word = lambda x: numbers[x] if isinstance(x, Value) else _constant(x.val)
    constants = [_constant(x) for x in graph.constants.values()]
    nodes = [(n.name, _static(n), [word(x) for x in n.inputs], len(n.outputs)) for n in graph.nodes]
    shapes = [value.shape for value in numbers]
    return constants, nodes, shapes, [word(x) for x in graph.outputs]


def _constant(x: Any) -> str:
    array = np.asarray(x)
    return _hash((array.shape, array.tobytes()))
