"""Which slices of which parameters go together: `jx.groups`."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from math import prod
from typing import Any

import numpy as np

from jaxaccel._axes import Axes, Labels
from jaxaccel._graph import trace
from jaxaccel._labels import Labelling, label
from jaxaccel._table import table

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
    traced = trace(fn, params, *example)
    labelling, inputs = label(traced, range(traced.num_params))
    paths, axes = traced.paths[: traced.num_params], inputs[: traced.num_params]
    sizes = [prod(leaf.shape) for leaf in axes]
    return Groups(
        tuple(_groups(labelling, paths, axes)),
        tuple(_pins(labelling, paths, axes)),
        tuple(paths[place] for place in sorted(labelling.unmasked)),
        tuple(paths),
        sum(sizes),
        sum(sizes) - sum(_pinned_elements(labelling, leaf) for leaf in axes),
    )


def _groups(labelling: Labelling, paths: list[str], leaves: list[Axes]) -> Iterator[Group]:
    channels: dict[int, dict[tuple[int, int], list[int]]] = defaultdict(lambda: defaultdict(list))
    for place, leaf in enumerate(leaves):
        for k, axis in enumerate(leaf):
            for index, root in enumerate(_roots(labelling, axis)):
                if root not in labelling.pinned:
                    channels[root][place, k].append(index)
    alike: dict[Any, list[dict[tuple[int, int], list[int]]]] = defaultdict(list)
    for slices in channels.values():
        alike[tuple((where, len(found)) for where, found in slices.items())].append(slices)
    for signature, members in alike.items():
        parts = (
            Slices(paths[place], k, np.array([slices[place, k] for slices in members]))
            for (place, k), _ in signature
        )
        yield Group(len(members), tuple(parts))


def _roots(labelling: Labelling, axis: Any) -> list[int]:
    return labelling.roots(axis.ids) if isinstance(axis, Labels) else []


def _pins(labelling: Labelling, paths: list[str], leaves: list[Axes]) -> Iterator[Pinned]:
    for path, leaf in zip(paths, leaves, strict=True):
        for k, axis in enumerate(leaf):
            reasons: dict[str, int] = defaultdict(int)
            for root in _roots(labelling, axis):
                if root in labelling.pinned:
                    reasons[labelling.pinned[root]] += 1
            for reason, count in reasons.items():
                yield Pinned(path, k, count, reason)


def _pinned_elements(labelling: Labelling, leaf: Axes) -> int:
    def pinned(k: int) -> int:
        roots = _roots(labelling, leaf[k])
        return sum(r in labelling.pinned for r in roots) if roots else leaf.shape[k]

    return prod(pinned(k) for k in range(len(leaf)))
