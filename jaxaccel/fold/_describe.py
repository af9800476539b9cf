"""Matches in words: the report, what identifies them, and what is wrong with their numbers."""

from collections.abc import Iterator, Mapping, Sequence
from hashlib import sha256
from typing import Any

import numpy as np
from jaxtyping import Array

from jaxaccel._graph import Atom, Literal, Value
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


def signature(v: View, matches: Matches) -> str:
    """Equal for two traces whose chains go to the same places and have the same constants."""
    known: dict[Atom, str] = {}
    chains = [f.steps for f in matches.folds] + [m.steps for m in matches.merges]
    parts = [
        (end.scale, end.bias, [(s.node.name, s.left, _digest(v, s.other, known)) for s in steps])
        for end, steps in zip(ends(v, matches), chains, strict=True)
    ]
    kernels = [v.leaves[f.leaf] for f in matches.folds]
    return sha256(repr((kernels, parts)).encode()).hexdigest()


def _digest(v: View, atom: Atom | None, known: dict[Atom, str]) -> str:
    """Of how a coefficient is computed, down to its constants."""
    if not isinstance(atom, Value):
        return repr(np.asarray(atom.val).tolist()) if isinstance(atom, Literal) else ""
    if atom not in known:
        if atom in v.leaves:
            parts: Any = v.leaves[atom]
        elif atom in v.graph.constants:
            parts = np.asarray(v.graph.constants[atom]).tobytes()
        else:
            node = v.makers[atom]
            operands = [_digest(v, x, known) for x in node.inputs]
            # A batch of one is not broadcast to.
            if node.name in ("broadcast_in_dim", "reshape", "squeeze"):
                return operands[0]
            parts = (node.name, node.outputs.index(atom), operands)
        known[atom] = sha256(repr(parts).encode()).hexdigest()
    return known[atom]


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
            culprit = next(_culprits(v, steps, values), "a coefficient is not finite")
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


def _rooted(v: View, steps: Steps) -> set[Value]:
    seen: set[Value] = set()
    todo = [s.other for s in steps]
    roots: list[Atom] = []
    while todo:
        value = todo.pop()
        maker = v.makers.get(value) if isinstance(value, Value) else None
        if maker is not None and value not in seen:
            seen.update(maker.outputs)
            todo += maker.inputs
            roots += maker.inputs[:1] if maker.name in _ROOTS else []
    return set(v.sources(roots))
