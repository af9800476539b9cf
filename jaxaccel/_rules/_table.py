"""The table: primitive -> rule."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from jax.extend.core import Primitive
from jaxtyping import Array

from jaxaccel._axes import OPAQUE, Axes, Axis, Free, Ties
from jaxaccel._graph import Node


class Cut(NamedTuple):
    """What is left of a node: the kept indices of each axis, None where all are."""

    operands: list[list[np.ndarray | None]]
    results: list[list[np.ndarray | None]]
    shapes: list[tuple[Any, ...]]  # of the results


Results: TypeAlias = Sequence[Sequence[Axis]]
Tie: TypeAlias = Callable[..., Results]
Resize: TypeAlias = Callable[[Node, Sequence[Array], Cut], Sequence[Array]]


class Rule(NamedTuple):
    """How a primitive ties axes, and how it runs where some of their indices are gone."""

    tie: Tie
    resize: Resize


_RULES: dict[str, Rule] = {}


def as_traced(node: Node, operands: Sequence[Array], cut: Cut) -> Sequence[Array]:
    """For primitives that read every size off their operands."""
    return node.run(operands)


def changed(params: Callable[[Node, Sequence[Array], Cut], dict[str, Any]]) -> Resize:
    """Runs the node with some of its static parameters changed."""
    return lambda node, operands, cut: node.run(operands, **params(node, operands, cut))


def add(names: str, tie: Tie, resize: Resize = as_traced) -> None:
    for name in names.split():
        _RULES[name] = Rule(tie, resize)


def rule_of(name: str) -> Rule:
    return _RULES.get(name, _UNKNOWN)


def register_rule(
    primitive: Primitive | str, tie: Tie, resize: Resize | None = None, *, replace: bool = False
) -> None:
    """Teaches the channel analysis one more primitive.

    A primitive without a rule pins every parameter axis that reaches it. A rule says which axes
    of its operands and results go together, so that `jaxaccel.groups`, pruning and tensor
    parallelism see through it. Test a new rule with `jaxaccel.check_rule`.

    Args:
        primitive: the primitive, or its name, as `jaxaccel.groups` prints it. A name is not
            checked.
        tie: ``tie(t, node, *operands)``, called with the node (``node.name``, ``node.params``,
            ``node.outputs[0].shape``) and, for each operand, its axes (``x[k]``, ``len(x)``,
            ``x.shape``, ``x.constant``). Operands that no parameter has a part in, such as
            integer indices, come like any other. It returns a list with one entry per result:
            the list of that result's axes. It may

            - pass an axis of an operand on, pinned or not: ``x[0]``. The result is then taken to
              be zero wherever the operand is; where it is not (indices, exp):
              ``t.same(x[0], zero=False)``;
            - ``t.same(a, b)``: tie two axes index by index; the tied axis. The result is taken
              to be zero where both are zero; else ``zero=``, a bool or a bool array with one
              element per index;
            - ``t.product(a, b)``: the same, zero where either is;
            - ``t.contract(a, b)``: two axes are multiplied and summed over;
            - ``t.total(a)``: an axis is summed over;
            - ``t.pin(a, "why")``: nothing of this axis may go; it does nothing to an axis of no
              parameter;
            - ``t.free()`` for a result's axis that no operand has, ``t.whole`` for a new one
              that must stay whole (pin the axes it is made from).
        resize: ``resize(node, operands, cut)`` runs the node on smaller operands and returns the
            list of results. ``cut.shapes`` are the results' new shapes; ``cut.operands[i][k]``
            are the indices that axis k of operand i has left, None for all; ``cut.results`` the
            same. The default, ``node.run(operands)``, is right unless a size is among the static
            parameters; then for example ``node.run(operands, new_sizes=cut.shapes[0])``.
        replace: whether an existing rule may be replaced.

    Raises:
        TypeError: `primitive` is neither, or `tie` or `resize` cannot be called.
        ValueError: the primitive has a rule, and `replace` is false.

    >>> import jax, jaxaccel as jx
    >>> from jax.extend.core import Primitive
    >>> from jax.interpreters import mlir
    >>> swap = Primitive("swap_last_axes")
    >>> _ = swap.def_impl(lambda x: jax.numpy.swapaxes(x, -1, -2))
    >>> _ = swap.def_abstract_eval(lambda x: x.update(shape=(*x.shape[:-2], *x.shape[:-3:-1])))
    >>> mlir.register_lowering(swap, mlir.lower_fun(swap.impl, multiple_results=False))
    >>> jx.register_rule(swap, lambda t, node, x: [[*x.axes[:-2], x[-1], x[-2]]])
    >>> print(jx.check_rule(swap.bind, jax.ShapeDtypeStruct((3, 4), "float32")))
    operand 0: axis 0 free, axis 1 free
    """
    name = primitive.name if isinstance(primitive, Primitive) else primitive
    if not isinstance(name, str):
        raise TypeError(f"primitive: {primitive!r} is neither a Primitive nor the name of one")
    for part, given in (("tie", tie), ("resize", resize)):
        if not callable(given) and not (part == "resize" and given is None):
            raise TypeError(f"{part}: {given!r} cannot be called; see jx.register_rule")
    if name in _RULES and not replace:
        raise ValueError(f"{name!r} has a rule already; pass replace=True to replace it")
    _RULES[name] = Rule(tie, resize or as_traced)


def _pin_all(t: Ties, node: Node, *operands: Axes) -> Results:
    whole = False
    for operand in operands:
        for axis in operand:
            t.pin(axis, f"'{node.name}' has no rule (jx.register_rule adds one)")
            whole = whole or not isinstance(axis, Free)
    return [[OPAQUE if whole else Free() for _ in out.shape] for out in node.outputs]


_UNKNOWN = Rule(_pin_all, as_traced)


def pinned(t: Ties, axis: Axis, why: str) -> Axis:
    """The axis after something that treats its indices unlike each other; its labels stay."""
    t.pin(axis, why)
    return Free() if isinstance(axis, Free) else OPAQUE
