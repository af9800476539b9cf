"""Which slices of which parameters go together: `jx.groups`."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from math import prod
from typing import Any, NamedTuple

import numpy as np

from jaxaccel._axes import Axes, Labels
from jaxaccel._dataflow import shuffles
from jaxaccel._labels import Labelling, label
from jaxaccel._table import table
from jaxaccel._trace import Trace, trace

_SHOWN = 3  # slices or axes listed before "and n more"


@dataclass(frozen=True, eq=False)
class Slices:
    """The part of a group in one axis of one parameter.

    Attributes:
        path: of the parameter, like "params/conv1/kernel".
        axis: of the parameter.
        index: ``index[c]`` are the indices on that axis which are channel c; [channel, slice].
    """

    path: str
    axis: int
    index: np.ndarray

    def __str__(self) -> str:
        each = f" ({self.index.shape[1]} each)" if self.index.shape[1] > 1 else ""
        return f"{self.path} axis {self.axis}{each}"


@dataclass(frozen=True, eq=False)
class Group:
    """Channels that consist of the same kind of slices; each channel is kept or goes as one.

    Attributes:
        size: the number of channels.
        slices: what they consist of.
    """

    size: int
    slices: tuple[Slices, ...]

    def __str__(self) -> str:
        return _listed(self.slices)


@dataclass(frozen=True)
class Pinned:
    """Indices of a parameter's axis that cannot go, and why."""

    path: str
    axis: int
    count: int
    reason: str

    def __str__(self) -> str:
        return f"{self.path} axis {self.axis}"


@dataclass(frozen=True)
class Groups(Sequence[Group]):
    """The groups of a function's parameters; a sequence, and a table when printed.

    Attributes:
        groups: in the order of the parameters.
        pinned: what cannot go; axes of size 1 are not listed.
        unmasked: parameters that divide something: where a channel is masked instead of removed,
            they keep their values.
        paths: of all parameters.
        num_parameters: elements of all parameters.
        num_prunable: those that lie in a slice of some group.
    """

    groups: tuple[Group, ...]
    pinned: tuple[Pinned, ...]
    unmasked: tuple[str, ...]
    paths: tuple[str, ...]
    num_parameters: int
    num_prunable: int

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, index: Any) -> Any:
        return self.groups[index]

    def __iter__(self) -> Iterator[Group]:
        return iter(self.groups)

    @property
    def share(self) -> float:
        """The share of the parameters' elements that lie in a slice of some group."""
        return self.num_prunable / max(self.num_parameters, 1)

    def why(self, path: str) -> str:
        """Why the axes of a parameter are pinned, one line per reason; empty if none is.

        Raises:
            KeyError: there is no parameter at `path`.
        """
        if path not in self.paths:
            near = get_close_matches(path, self.paths, cutoff=0)
            raise KeyError(f"{path}: no such parameter; the nearest are {', '.join(near)}")
        return "\n".join(
            f"{p}: {p.count} indices: {p.reason}" for p in self.pinned if p.path == path
        )

    def __str__(self) -> str:
        rows = [(place, group.size, str(group)) for place, group in enumerate(self)]
        reasons: dict[str, list[Pinned]] = defaultdict(list)
        for pin in self.pinned:
            reasons[pin.reason].append(pin)
        parts = [table(("group", "channels", "slices"), rows)] if rows else ["no groups"]
        parts.append(
            f"{self.num_prunable:,} of {self.num_parameters:,} parameters ({self.share:.2%}) "
            "lie in a group"
        )
        if self.unmasked:
            parts.append(f"a mask leaves alone, for they divide: {', '.join(self.unmasked)}")
        parts += [f"pinned: {reason}\n  {_listed(pins)}" for reason, pins in reasons.items()]
        return "\n\n".join(parts)


def _listed(items: Sequence[Any]) -> str:
    shown = ", ".join(map(str, items[:_SHOWN]))
    rest = len(items) - _SHOWN
    return f"{shown} and {rest} more" if rest > 0 else shown


def groups(fn: Callable, params: Any, *example: Any) -> Groups:
    """Finds which slices of the parameters live and die together in ``fn(params, *example)``.

    Every axis of every traced value gets one label per index; each operation ties the labels of
    its operands and results. Labels that end up tied are one channel: removing all its slices
    equals setting them to zero, in value and derivative. Parameters that divide something are not
    set to zero (`Groups.unmasked`). Where a derivative at zero is infinite, as that of a square
    root, only removing gives a finite gradient.

    Whatever an operation without a rule touches is pinned, as is what reaches an output, meets an
    axis of the input, or is reduced while masking would not make it zero.

    Args:
        fn: any JAX function whose first argument is a pytree of parameters.
        params: that pytree: arrays, or `jax.ShapeDtypeStruct`; no values are read.
        example: the other arguments, likewise. Their sizes do not matter to the groups, as long
            as `fn` does the same with them. Close over what is static:
            ``lambda params, x: fn(params, x, train=False)``.

    Returns:
        The groups, a sequence that prints as a table.

    Raises:
        TypeError: an argument or a result is not a pytree of arrays, or `fn` closes over a value
            that is being traced.

    >>> import jax, jax.numpy as jnp
    >>> params = {"w1": jnp.ones((3, 8)), "b1": jnp.ones(8), "w2": jnp.ones((8, 2))}
    >>> fn = lambda p, x: jax.nn.relu(x @ p["w1"] + p["b1"]) @ p["w2"]
    >>> found = groups(fn, params, jnp.ones((5, 3)))
    >>> print(found[0].size, found[0])
    8 b1 axis 0, w1 axis 1, w2 axis 0
    >>> print(found.why("w2"))
    w2 axis 1: 2 indices: reaches the output
    """
    return read(fn, params, *example)[1]


def read(fn: Callable, params: Any, *example: Any) -> tuple[Trace, Groups, Labelling, list[Axes]]:
    """The groups, and what they were read from: the trace, its labels, the inputs' axes."""
    traced = trace(fn, params, *example)
    traced = traced._replace(graph=shuffles(traced.graph))
    labelling, inputs = label(traced, range(traced.num_params))
    paths, axes = traced.paths[: traced.num_params], inputs[: traced.num_params]
    pinned = np.zeros(len(labelling), bool)
    pinned[list(labelling.pinned)] = True
    slots = [
        _Slot(path, k, np.array(labelling.roots(axis.ids), int))
        for path, leaf in zip(paths, axes, strict=True)
        for k, axis in enumerate(leaf)
        if isinstance(axis, Labels)
    ]
    sizes = {path: prod(leaf.shape) for path, leaf in zip(paths, axes, strict=True)}
    whole = dict(sizes)
    for slot in slots:
        share = int(pinned[slot.roots].sum())
        whole[slot.path] = whole[slot.path] // max(len(slot.roots), 1) * share
    found = Groups(
        tuple(_groups(slots, pinned)),
        tuple(_pins(labelling, slots)),
        tuple(paths[place] for place in sorted(labelling.unmasked)),
        tuple(paths),
        sum(sizes.values()),
        sum(sizes.values()) - sum(whole.values()),
    )
    return traced, found, labelling, inputs


class _Slot(NamedTuple):
    """An axis of a parameter, and the root of the label of each of its indices."""

    path: str
    axis: int
    roots: np.ndarray


def _groups(slots: Sequence[_Slot], pinned: np.ndarray) -> list[Group]:
    """The free roots that have as many indices in each slot, as groups; in order of appearance."""
    alike: dict[bytes, list[_Slot]] = defaultdict(list)  # many axes have the same channels
    for slot in slots:
        alike[slot.roots.tobytes()].append(slot)
    kinds, order = _kinds([same[0].roots for same in alike.values()], pinned)
    _, first, members = np.unique(kinds[order], return_index=True, return_inverse=True)
    place = np.full(len(kinds), -1)  # of the group
    place[order] = np.argsort(np.argsort(first))[members]
    rank = np.zeros(len(kinds), int)  # inside of the group
    sizes = np.bincount(place[order], minlength=len(first)).tolist()
    for group in range(len(first)):
        rank[order[place[order] == group]] = np.arange(sizes[group])
    indices = {
        key: {
            group: index.reshape(sizes[group], -1)
            for group, index in _by_group(same[0].roots, place, rank)
        }
        for key, same in alike.items()
    }
    parts: list[list[Slices]] = [[] for _ in first]
    for slot in slots:
        for group, index in indices[slot.roots.tobytes()].items():
            parts[group].append(Slices(slot.path, slot.axis, index))
    return [Group(size, tuple(slices)) for size, slices in zip(sizes, parts, strict=True)]


def _by_group(
    roots: np.ndarray, place: np.ndarray, rank: np.ndarray
) -> Iterator[tuple[int, np.ndarray]]:
    """The indices of each group in one slot, channel by channel."""
    free = np.flatnonzero(place[roots] >= 0)
    free = free[np.argsort(rank[roots[free]], kind="stable")]
    for group in np.unique(place[roots[free]]).tolist():
        yield group, free[place[roots[free]] == group]


def _kinds(slots: Sequence[np.ndarray], pinned: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of each root a number that those in the same slots share, and the free roots in order."""
    kinds, seen = np.zeros(len(pinned), int), pinned.copy()
    order, count = [np.zeros(0, int)], 1
    for slot in slots:
        free = slot[~pinned[slot]]
        roots, first, times = np.unique(free, return_index=True, return_counts=True)
        new = roots[np.argsort(first)]
        order.append(new[~seen[new]])
        seen[roots] = True
        _, inverse = np.unique(kinds[roots] * (len(slot) + 1) + times, return_inverse=True)
        kinds[roots] = count + inverse
        count += len(roots)
    return kinds, np.concatenate(order)


def _pins(labelling: Labelling, slots: Sequence[_Slot]) -> Iterator[Pinned]:
    for slot in slots:
        roots, counts = np.unique(slot.roots, return_counts=True)
        reasons: dict[str, int] = defaultdict(int)
        for root, count in zip(roots.tolist(), counts.tolist(), strict=True):
            if root in labelling.pinned:
                reasons[labelling.pinned[root]] += count
        for reason, count in reasons.items():
            yield Pinned(slot.path, slot.axis, count, reason)
