"""Calls and control flow: the analysis goes inside."""

from collections.abc import Callable, Sequence

import numpy as np

from jaxaccel._axes import OPAQUE, Axes, Axis, Labels, Ties
from jaxaccel._graph import EXPORTED, Graph, Node, is_float, jvp_graph, loop, primitives, vjp_graph
from jaxaccel._rules._table import Results, add


def _call(t: Ties, node: Node, *operands: Axes) -> Results:
    return [list(out) for out in t.inside(node.bodies[0], operands)]


def _custom_jvp(t: Ties, node: Node, *operands: Axes) -> Results:
    """Its rule is followed too: a tangent may mix what the function does not."""
    made = _call(t, node, *operands)
    if t.in_derivative:  # a rule may call its own function again
        return made
    active = [i for i, atom in enumerate(node.inputs) if is_float(atom)]
    known = (id(node.params), *active)  # one equation stands behind every use of a jitted function
    if known not in t.jvps:
        t.jvps[known] = jvp_graph(node, active)
    moved = _derivative(t, t.jvps[known], [*operands, *(operands[i] for i in active)])
    tangents = iter(moved[len(made) :])
    return [
        [_weaker(t, *axis) for axis in zip(axes, next(tangents), strict=True)]
        if is_float(out)
        else axes
        for axes, out in zip(made, node.outputs, strict=True)
    ]


def _custom_vjp(t: Ties, node: Node, *operands: Axes) -> Results:
    """Its backward pass is followed too: it may mix what its forward pass does not."""
    made = t.inside(node.bodies[0], operands)
    if t.in_derivative or EXPORTED in primitives(node.params):  # which has no gradient
        return [list(out) for out in made]
    active = [i for i, atom in enumerate(node.inputs) if is_float(atom)]
    results = [i for i, out in enumerate(node.outputs) if is_float(out)]
    backward = vjp_graph(node, active, results)
    moved = _derivative(t, backward, [*operands, *(cotangent(made[i]) for i in results)])
    for i, axes in zip(active, moved, strict=True):
        for given, found in zip(operands[i], axes, strict=True):
            if not isinstance(given, Labels) and operands[i].sources != frozenset():
                t.total(found)  # the gradient of what was broadcast sums over it
            t.same(given, found)
    return [list(out) for out in made]


def _derivative(t: Ties, graph: Graph, operands: Sequence[Axes]) -> Sequence[Axes]:
    t.in_derivative = True
    made = t.inside(graph, operands)
    t.in_derivative = False
    return made


def cotangent(axes: Axes) -> Axes:
    """The axes of a result's cotangent, which may be anything where the result is zero."""
    own = [Labels(a.ids, np.zeros_like(a.zero)) if isinstance(a, Labels) else a for a in axes]
    return Axes(tuple(own), axes.shape, None, None)


def _cond(t: Ties, node: Node, index: Axes, *operands: Axes) -> Results:
    branches = [t.inside(body, operands) for body in node.bodies]
    return [
        [t.same(*axes) for axes in zip(*results, strict=True)]
        for results in zip(*branches, strict=True)
    ]


def _scan(t: Ties, node: Node, *operands: Axes) -> Results:
    num_consts, _, num_carry = loop(node)
    consts, init = operands[:num_consts], operands[num_consts : num_consts + num_carry]
    rows = []
    for x in operands[num_consts + num_carry :]:
        t.pin(x[0], "a scan runs over it")
        rows.append(Axes(x.axes[1:], x.shape[1:], x.constant, x.sources))
    step = lambda state: t.inside(node.bodies[0], [*consts, *state, *rows])
    state, out = _fixed_point(t, init, step)
    return [*state, *([OPAQUE, *x] for x in out[num_carry:])]


def _while(t: Ties, node: Node, *operands: Axes) -> Results:
    num_cond, num_body, _ = loop(node)
    cond, consts = operands[:num_cond], operands[num_cond : num_cond + num_body]
    step = lambda state: t.inside(node.bodies[1], [*consts, *state])
    init = operands[num_cond + num_body :]
    state, _ = _fixed_point(t, init, step)
    t.inside(node.bodies[0], [*cond, *_as_operands(state, init)])
    return state


def _fixed_point(
    t: Ties, init: Sequence[Axes], step: Callable[[list[Axes]], Sequence[Axes]]
) -> tuple[list[list[Axis]], Sequence[Axes]]:
    """The axes of a loop's state; it is zero where masked only if every turn keeps it so."""
    state = [[_carried(t, x, k) for k in range(len(x))] for x in init]
    while True:
        out = step(_as_operands(state, init))
        after = [
            [_weaker(t, axis, new[k]) for k, axis in enumerate(axes)]
            for axes, new in zip(state, out[: len(state)], strict=True)
        ]
        if _zeros(after) == _zeros(state):
            return state, out
        state = after


def _as_operands(state: list[list[Axis]], init: Sequence[Axes]) -> list[Axes]:
    return [Axes(tuple(a), x.shape, None, None) for a, x in zip(state, init, strict=True)]


def _carried(t: Ties, x: Axes, k: int) -> Axis:
    whole = x[k] is OPAQUE or not isinstance(x.shape[k], int)  # a batch of any size
    return OPAQUE if whole else t.labelled(x[k], x.shape[k])


def _weaker(t: Ties, before: Axis, after: Axis) -> Axis:
    t.same(before, after)
    if isinstance(before, Labels) and isinstance(after, Labels):
        return Labels(before.ids, before.zero & after.zero)
    if isinstance(before, Labels) and after is not OPAQUE:
        return Labels(before.ids, np.zeros_like(before.zero))
    return before


def _zeros(state: list[list[Axis]]) -> list[int]:
    return [int(axis.zero.sum()) for axes in state for axis in axes if isinstance(axis, Labels)]


add("jit closed_call eval_jaxpr remat2", _call)
add("custom_jvp_call", _custom_jvp)
add("custom_vjp_call", _custom_vjp)
add("cond", _cond)
add("scan", _scan)
add("while", _while)
