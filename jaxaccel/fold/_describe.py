"""Matches in words: the report, and what is wrong with their numbers."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np
from jaxtyping import Array

from jaxaccel._dataflow import evaluate
from jaxaccel._graph import Atom, Literal, Node, Value
from jaxaccel.fold._chains import Steps
from jaxaccel.fold._match import Matches
from jaxaccel.fold._report import Folded, Merged, Report
from jaxaccel.fold._rewrite import ends
from jaxaccel.fold._view import Keys, View

# Of these functions a negative argument gives no number.
_ROOTS = ("rsqrt", "sqrt", "log", "pow")


def report(v: View, matches: Matches) -> Report:
    """The report of what was matched."""
    places = ends(v, matches)
    folds, merges = places[: len(matches.folds)], places[len(matches.folds) :]
    folded = [
        Folded(joined(v.leaves[f.leaf]), _leaves(v, f.steps), _optional(end.bias))
        for f, end in zip(matches.folds, folds, strict=True)
    ]
    merged = [
        Merged(_optional(end.scale), _optional(end.bias), _leaves(v, m.steps))
        for m, end in zip(matches.merges, merges, strict=True)
    ]
    return Report(tuple(folded), tuple(merged), tuple(matches.refused))


def joined(keys: Keys) -> str:
    return "/".join(keys)


def _optional(keys: Keys | None) -> str | None:
    return None if keys is None else joined(keys)


def _leaves(v: View, steps: Steps) -> tuple[str, ...]:
    return tuple(joined(v.leaves[leaf]) for leaf in v.sources(s.other for s in steps))


def check_finite(
    v: View, matches: Matches, values: Mapping[Value, Any], scales: Sequence[Sequence[Array]]
) -> None:
    """Raises a ValueError that names the chain, and its parameter that is no statistic."""
    chains = [(joined(v.leaves[f.leaf]), f.steps) for f in matches.folds]
    chains += [
        (joined(v.leaves[leaf]), m.steps) for m in matches.merges if (leaf := m.scale or m.bias)
    ]
    for (where, steps), numbers in zip(chains, scales, strict=True):
        if not all(np.isfinite(np.asarray(x)).all() for x in numbers):
            culprits = chain(_culprits(v, steps, values), _zero_divisors(v, steps, values))
            culprit = next(culprits, "a coefficient is not finite")
            raise ValueError(f"{culprit}; it cannot be folded into {where}")


def _culprits(v: View, steps: Steps, values: Mapping[Value, Any]) -> Iterator[str]:
    """The leaves with elements that are not finite, or negative under a root."""
    rooted = _rooted(v, steps)
    for leaf in v.sources(s.other for s in steps):
        x = np.asarray(values[leaf], np.float64)
        bad = ~np.isfinite(x) | ((x < 0) if leaf in rooted else False)
        if bad.any():
            what = "negative or not finite" if leaf in rooted else "not finite"
            yield f"{joined(v.leaves[leaf])}: {bad.sum()} of {x.size} values are {what}"


def _zero_divisors(v: View, steps: Steps, values: Mapping[Value, Any]) -> Iterator[str]:
    """The leaves from which a divisor that is zero somewhere is computed."""
    divisors = [s.other for s in steps if s.node.name == "div"]
    divisors += [x for node in _makers(v, steps) for x in _divides(node)]
    wanted = [x for x in divisors if isinstance(x, Value)]
    for divisor, x in zip(wanted, evaluate(v.graph, values, wanted), strict=True):
        for leaf in v.sources([divisor]) if not np.asarray(x).all() else ():
            zeros = np.asarray(values[leaf]) == 0
            if zeros.any():
                count = f"{zeros.sum()} of {zeros.size} values are zero"
                yield f"{joined(v.leaves[leaf])}: {count}, and it divides"
            else:
                yield f"{joined(v.leaves[leaf])}: a divisor computed from it is zero"


def _divides(node: Node) -> Sequence[Atom]:
    """The operands of which the node takes a reciprocal."""
    if node.name == "div":
        return node.inputs[1:]
    power = node.params.get("y", 0) if node.name == "integer_pow" else 0
    if node.name == "pow" and isinstance(node.inputs[1], Literal):
        power = node.inputs[1].val
    return node.inputs[:1] if node.name == "rsqrt" or power < 0 else ()


def _rooted(v: View, steps: Steps) -> set[Value]:
    roots = [x for node in _makers(v, steps) if node.name in _ROOTS for x in node.inputs[:1]]
    return set(v.sources(roots))


def _makers(v: View, steps: Steps) -> list[Node]:
    """The nodes that compute the coefficients."""
    found: dict[Node, None] = {}
    todo = [s.other for s in steps]
    while todo:
        value = todo.pop()
        maker = v.makers.get(value) if isinstance(value, Value) else None
        if maker is not None and maker not in found:
            found[maker] = None
            todo += maker.inputs
    return list(found)
