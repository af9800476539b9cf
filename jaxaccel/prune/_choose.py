"""Which channels go: so many of each group, or the lowest of all."""

from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, Literal, TypeAlias

import numpy as np
from jaxtyping import Float, PyTree

from jaxaccel._groups import Group, Groups
from jaxaccel.prune._criteria import Criterion

Scope: TypeAlias = Literal["local", "global"]
# Which groups: patterns over paths, of which the first that matches says whether, or how much.
Share: TypeAlias = bool | float
Where: TypeAlias = str | Callable[[Group], Share] | Mapping[str, Share]
# The indices of the channels of each group that go.
Removed: TypeAlias = list[np.ndarray]

_CRITERION = (
    "it must give one number per channel of every group, as jx.prune.l1 or jx.prune.taylor(loss) do"
)
_LEAST = 0.1  # the share of every group that a global ranking leaves


def shares(groups: Groups, where: Where | None) -> list[Share]:
    """Of each group: whether it is pruned, or its own ratio.

    Raises:
        ValueError: a pattern matches nothing, a ratio is outside [0, 1), no group is left.
    """
    if not len(groups):
        reasons = "; ".join(f"{pin}: {pin.reason}" for pin in groups.pinned[:3])
        raise ValueError(
            f"no channel of these parameters can go: {reasons or 'there are none'} (all of it: "
            "print(jx.groups(fn, params, ...)))"
        )
    if not (where is None or callable(where) or isinstance(where, str | Mapping)):
        raise ValueError(f"where={where!r} must be a glob, a mapping from globs, or a function")
    if isinstance(where, Mapping) and not all(isinstance(pattern, str) for pattern in where):
        raise ValueError(f"where={where!r}: its keys must be globs")
    found = [_share(group, where) for group in groups]
    if isinstance(where, str | Mapping):
        for pattern in [where] if isinstance(where, str) else where:
            if not any(_matches(group, pattern) for group in groups):
                raise ValueError(
                    f"where={pattern!r} matches no slice of a group; they are: "
                    + ", ".join(str(part) for group in groups for part in group.slices)
                )
    for group, share in zip(groups, found, strict=True):
        number = isinstance(share, bool | int | float | np.number)
        if not number or not (isinstance(share, bool) or 0 <= share < 1):
            raise ValueError(
                f"where: {share!r} for {group}; it must be True, False or a ratio in [0, 1)"
            )
    if not any(share is True or share > 0 for share in found):
        raise ValueError(
            f"where={where!r} leaves every group out; the first pattern that matches wins, and "
            'what no pattern matches is left out: add "*": True'
        )
    return found


def _share(group: Group, where: Where | None) -> Share:
    if where is None:
        return True
    if callable(where):
        share = where(group)
        return bool(share) if isinstance(share, np.bool) else share
    rules = {where: True} if isinstance(where, str) else where
    return next((share for pattern, share in rules.items() if _matches(group, pattern)), False)


def _matches(group: Group, pattern: str) -> bool:
    """Whether it is the pattern of a path, or of "path axis 0", that the group would cut."""
    return any(
        fnmatchcase(name, pattern)
        for part in group.slices
        for name in (part.path, f"{part.path} axis {part.axis}")
    )


def scored(groups: Groups, params: PyTree, criterion: Criterion) -> list[Float[np.ndarray, " c"]]:
    """The scores of every group's channels.

    Raises:
        TypeError: `criterion` cannot be called with groups and parameters, or gives no numbers.
        ValueError: they are not one finite number per channel.
    """
    if not callable(criterion):
        raise ValueError(f"criterion={criterion!r} must be a function like jx.prune.l1")
    try:
        given = [_numbers(scores) for scores in criterion(groups, params)]
    except TypeError as error:
        raise TypeError(f"criterion: {error}; {_CRITERION}") from error
    if [scores.shape for scores in given] != [(group.size,) for group in groups]:
        raise ValueError(
            f"criterion: scores of shapes {[scores.shape for scores in given]} for groups of "
            f"{[group.size for group in groups]} channels; {_CRITERION}"
        )
    for group, scores in zip(groups, given, strict=True):
        if not np.isfinite(scores).all():
            raise ValueError(f"criterion: scores that are not finite for the group of {group}")
    return given


def _numbers(scores: Any) -> Float[np.ndarray, "..."]:
    try:
        return np.asarray(scores, np.float64)
    except ValueError as error:
        raise TypeError(error) from None


def lowest(
    scores: Sequence[np.ndarray],
    shares: Sequence[Share],
    ratio: float,
    scope: Scope,
    round_to: int,
) -> Removed:
    """The channels of each group that go: the lowest scores; equal ones in order."""
    own = [ratio if share is True else float(share) for share in shares]
    counts = [int(part * len(s) + 1e-9) for part, s in zip(own, scores, strict=True)]
    ranked = [place for place, share in enumerate(shares) if share is True]
    if scope == "global" and ranked:
        for place, count in zip(ranked, _ranked([scores[p] for p in ranked], ratio), strict=True):
            counts[place] = count
    return [
        np.sort(np.argsort(s, kind="stable")[: len(s) - _kept(len(s), count, round_to)])
        for s, count in zip(scores, counts, strict=True)
    ]


def _kept(size: int, removed: int, round_to: int) -> int:
    """At least one stays, and a multiple of `round_to` where that is not more than there are."""
    kept = max(size - removed, 1)
    return min(-(-kept // round_to) * round_to, size)


def _ranked(scores: Sequence[np.ndarray], ratio: float) -> list[int]:
    """How many of each group are among the lowest of all; scores count relative to their mean."""
    lowest = []
    for place, s in enumerate(scores):
        most = len(s) - int(np.ceil(_LEAST * len(s)))
        relative = np.sort(s)[:most] / (np.abs(s).mean() or 1.0)
        rank = np.arange(most) / len(s)  # of equal scores all groups lose alike
        lowest.append(np.stack([relative, rank, np.full(most, place)]))
    values, ranks, places = np.concatenate(lowest, 1)
    wanted = int(ratio * sum(map(len, scores)) + 1e-9)
    chosen = places[np.lexsort((ranks, values))[:wanted]].astype(int)
    return np.bincount(chosen, minlength=len(scores)).tolist()
