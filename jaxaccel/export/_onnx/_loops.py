"""Rules for loops and branches: what jax2onnx has no form for, in terms of what it has."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from jax import lax

from jaxaccel._graph import Node, loop
from jaxaccel._rewritten import rerun

Bodies = Sequence[Callable[..., Sequence[Any]]]


def entered(node: Node, operands: Sequence[Any], bodies: Bodies) -> list[Any]:
    """A loop with other bodies."""
    if node.name == "scan" and node.params["reverse"]:
        return _backwards(node, operands, bodies)
    if node.name == "cond" and len(bodies) > 2:
        return _chosen(operands[0], operands[1:], bodies)
    return rerun(node, operands, bodies)


def _backwards(node: Node, operands: Sequence[Any], bodies: Bodies) -> list[Any]:
    """From the last to the first: forwards, over what was turned around."""
    consts, _, carry = loop(node)
    turned = lambda x: lax.rev(x, (0,))
    given = [*operands[: consts + carry], *map(turned, operands[consts + carry :])]
    results = rerun(replace(node, params=node.params | {"reverse": False}), given, bodies)
    return [*results[:carry], *map(turned, results[carry:])]


def _chosen(index: Any, operands: Sequence[Any], bodies: Bodies) -> list[Any]:
    """One of several, as a choice between the first and the others."""
    first, *others = bodies
    if not others:
        return list(first(*operands))
    rest = lambda *args: tuple(_chosen(index - 1, args, others))
    return list(lax.cond(index <= 0, lambda *args: tuple(first(*args)), rest, *operands))
