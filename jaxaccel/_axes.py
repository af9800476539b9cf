"""The axes of a traced value, and the ties between them.

An axis is one of three things. `Labels`: it comes from a parameter, and each index has a label;
an index is dropped when its label is. `Free`: it depends on no parameter's axis (random bits,
iota, a constant, a broadcast); it is computed whole, and cut where it meets labels. `OPAQUE`: it
stays whole (an input's axis, a batch, a pixel); labels that meet it are pinned.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Final, NamedTuple, TypeAlias

import numpy as np

from jaxaccel._disjoint import Disjoint
from jaxaccel._graph import Graph, Node

# A reshape that mixes a labelled axis with others gets one label index per element of the result.
_MAX_MERGED = 1 << 24


@dataclass(eq=False, slots=True, frozen=True)
class Labels:
    """One label per index; `zero`: whether the value is zero there whenever the label is masked."""

    ids: np.ndarray
    zero: np.ndarray

    def __getitem__(self, index: Any) -> "Labels":
        """The labels of some of the indices, as NumPy would index them."""
        return Labels(self.ids[index], self.zero[index])

    def map(self, function: Callable[[np.ndarray], np.ndarray]) -> "Labels":
        return Labels(function(self.ids), function(self.zero))


@dataclass(eq=False, slots=True)
class Free:
    """Computed whole; `ids` are the labels it is cut to where it is used."""

    uniform: bool = False  # the same at every index
    zero: bool = False  # zero at every index
    ids: np.ndarray | None = None


class Opaque:
    """Stays whole."""

    def __repr__(self) -> str:
        return "OPAQUE"


OPAQUE: Final = Opaque()
Axis: TypeAlias = Labels | Free | Opaque


@dataclass(eq=False, slots=True)
class Axes:
    """The axes of one operand of a node; indexed and iterated like a tuple.

    Attributes:
        axes: one `Axis` per dimension.
        shape: its shape as traced.
        constant: the number that every element is, where that is known.
        sources: the parameters it is computed from, None where anything else has a part.
        elements: its integers, where they are few and known (for gather's indices).
    """

    axes: tuple[Axis, ...]
    shape: tuple[Any, ...]
    constant: float | None = None
    sources: frozenset[int] | None = frozenset()
    elements: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.axes)

    def __getitem__(self, k: int) -> Axis:
        return self.axes[k]

    def __iter__(self) -> Iterator[Axis]:
        return iter(self.axes)

    def for_use(self) -> "Axes":
        """A copy whose free axes can be cut for one use."""
        if not any(isinstance(axis, Free) for axis in self.axes):
            return self
        null = self.constant == 0
        axes = tuple(Free(a.uniform, null) if isinstance(a, Free) else a for a in self.axes)
        return Axes(axes, self.shape, self.constant, self.sources, self.elements)


class Merge(NamedTuple):
    """A reshape of which one factor may shrink: `grid` has the labels of the merged axis."""

    grid: np.ndarray
    factors: dict[int, np.ndarray]  # axis of the grid -> its labels
    free: set[int]  # factors that had no labels of their own: the last choice
    reason: str


class Ties(ABC):
    """Labels in a union-find, the pinned classes with their reasons, and open choices.

    A rule's ``tie(ties, node, *operands)`` calls these methods and returns, for each output of
    the node, its axes.
    """

    whole: Final = OPAQUE

    def __init__(self) -> None:
        self._sets = Disjoint()
        self.pinned: dict[int, str] = {}  # root -> reason
        self.unmasked: set[int] = set()  # parameters that must keep their values where masked
        self.node: Node | None = None
        self.in_derivative = False
        self.jvps: dict[Any, Graph] = {}
        self._merges: list[Merge] = []
        self._open: set[int] = set()
        self._singular: list[tuple[frozenset[int], np.ndarray, str]] = []

    @abstractmethod
    def inside(self, body: Graph, operands: Sequence[Axes]) -> list[Axes]:
        """The results of a body of the node, for operands with these axes."""

    def __len__(self) -> int:
        """The number of labels."""
        return len(self._sets)

    def new(self, size: int) -> np.ndarray:
        """Fresh labels."""
        return self._sets.new(size)

    def free(self) -> Free:
        """The axis of a result that none of its operands has."""
        return Free()

    def roots(self, labels: np.ndarray) -> list[int]:
        return self._sets.roots(labels).tolist()

    def tie(self, a: np.ndarray, b: np.ndarray) -> None:
        """Makes labels live and die together, index by index (arrays broadcast)."""
        if a is b:
            return
        lost = self._sets.unite(*np.broadcast_arrays(a, b))
        moved = [label for label in lost.tolist() if label in self.pinned] if self.pinned else []
        for label, root in zip(moved, self.roots(np.array(moved, int)), strict=True):
            self.pinned.setdefault(root, self.pinned.pop(label))

    def pin(self, axis: Axis, why: str, where: Any = slice(None)) -> None:
        """Keeps the labels of an axis (or those `where`) from ever being dropped."""
        if isinstance(axis, Labels):
            roots = self.roots(axis.ids[where])
            if any(root not in self.pinned for root in roots):
                reason = self.reason(why)
                for root in roots:
                    self.pinned.setdefault(root, reason)

    def reason(self, why: str) -> str:
        at = f" at {self.node.source}" if self.node and self.node.source else ""
        return f"{why}{at}"

    def same(self, *axes: Axis, zero: np.ndarray | bool | None = None) -> Axis:
        """The axis of a result whose operands go together index by index.

        Args:
            axes: the operands' axes, all of one size.
            zero: where the result is zero when masked, a bool or one per index; by default where
                every operand is.
        """
        labelled = [axis for axis in axes if isinstance(axis, Labels)]
        if not labelled:
            return _unlabelled(axes)
        if any(axis is OPAQUE for axis in axes):
            for axis in labelled:
                self.pin(axis, "meets an axis of the input or another that stays whole")
            return OPAQUE
        first = labelled[0].ids
        every = np.ones(len(first), bool)
        for axis in axes:
            if isinstance(axis, Labels):
                self.tie(first, axis.ids)
            elif isinstance(axis, Free):
                self._cut(axis, first)
            every &= axis.zero if isinstance(axis, Labels | Free) else True
        return Labels(first, every if zero is None else np.broadcast_to(zero, every.shape))

    def product(self, a: Axis, b: Axis) -> Axis:
        """`same`, for a result that is zero where either operand is."""
        return self.same(a, b, zero=np.logical_or(_zero(a), _zero(b)))

    def _cut(self, axis: Free, ids: np.ndarray) -> None:
        if axis.ids is None:
            axis.ids = ids
        else:
            self.tie(axis.ids, ids)

    def labelled(self, axis: Axis, size: int) -> Labels:
        """The axis with labels whatever it is: fresh ones for a free axis, pinned if opaque."""
        if isinstance(axis, Labels):
            return axis
        labels = Labels(self.new(size), np.full(size, isinstance(axis, Free) and axis.zero))
        if isinstance(axis, Free):
            self._cut(axis, labels.ids)
        else:
            self.pin(labels, "stays whole")
        return labels

    def contract(self, a: Axis, b: Axis) -> None:
        """Two axes multiplied and summed over: legal where one of the factors is zero."""
        both = self.product(a, b)
        if isinstance(both, Labels):
            self.total(both)

    def total(self, axis: Axis) -> None:
        """An axis summed over: labels whose value is not zero where masked are pinned."""
        if isinstance(axis, Labels) and not axis.zero.all():
            self.pin(axis, f"'{self._name()}' sums over values that masking leaves", ~axis.zero)

    def singular(self, operand: Axes, k: int, where: np.ndarray) -> None:
        """Masking would make this zero a divisor: the parameters it comes from stay unmasked.

        Judged at the end: what is pinned is never masked.
        """
        axis = operand[k] if k < len(operand) else None
        if isinstance(axis, Labels) and where.any():
            why = f"'{self._name()}' of a value that masking makes zero; an epsilon would free it"
            why = self.reason(why)
            self._singular.append((operand.sources or frozenset(), axis.ids[where], why))

    def _name(self) -> str:
        return self.node.name if self.node else ""

    def merge(self, axes: Sequence[Axis], sizes: Sequence[int]) -> Axis:
        """The axis that a reshape makes of several."""
        pairs = [(axis, size) for axis, size in zip(axes, sizes, strict=True) if size != 1]
        if len(pairs) == 1:
            return pairs[0][0]
        labelled = {k: a for k, (a, _) in enumerate(pairs) if isinstance(a, Labels)}
        if not labelled:
            return _unlabelled([axis for axis, _ in pairs])
        shape = [size for _, size in pairs]
        if not all(isinstance(size, int) for size in shape) or prod(shape) > _MAX_MERGED:
            for axis in labelled.values():
                self.pin(axis, "a reshape merges it with an axis of unknown or very great size")
            return OPAQUE
        if any(self._is_open(axis) for axis in labelled.values()):
            frees = {k for k, (axis, _) in enumerate(pairs) if isinstance(axis, Free)}
            labelled |= {k: self.labelled(pairs[k][0], shape[k]) for k in frees}
        else:
            frees = set()
        grids = [_along(axis, k, shape) for k, axis in labelled.items()]
        if len(grids) == 1:
            return grids[0].map(np.ravel)
        zero = np.logical_and.reduce([grid.zero for grid in grids]).ravel()
        ids = self.new(prod(shape))
        self._leave_open(ids.reshape(shape), {k: axis.ids for k, axis in labelled.items()}, frees)
        return Labels(ids, zero)

    def _is_open(self, axis: Labels) -> bool:
        """Whether its labels are a factor of a reshape that is not settled yet."""
        return not self._open.isdisjoint(axis.ids.tolist())

    def _leave_open(self, grid: np.ndarray, factors: dict[int, np.ndarray], free: set[int]) -> None:
        self._merges.append(Merge(grid, factors, free, self.reason(_ONE_FACTOR)))
        self._open.update(label for ids in factors.values() for label in ids.tolist())

    def split(self, axis: Axis, sizes: Sequence[int]) -> list[Axis]:
        """The axes that a reshape makes of one."""
        inner = [k for k, size in enumerate(sizes) if size != 1]
        out: list[Axis] = [OPAQUE] * len(sizes)
        if not isinstance(axis, Labels) or len(inner) == 1:
            for k in inner:
                out[k] = Free(axis.uniform) if isinstance(axis, Free) else axis
            return out
        ids, zero = axis.ids.reshape(sizes), axis.zero.reshape(sizes)
        varying = [k for k in inner if (ids != ids.take([0], k)).any()] or inner[-1:]
        factors: dict[int, np.ndarray] = {}
        for k in varying:
            others = tuple(j for j in range(len(sizes)) if j != k)
            single = len(varying) == 1
            factors[k] = ids.min(others) if single else self.new(sizes[k])
            out[k] = Labels(factors[k], np.all(zero, others))
        if len(varying) > 1:
            self._leave_open(ids, factors, set())
        return out

    def decide(self, dropped: np.ndarray | None = None) -> None:
        """Settles the open reshapes, those with a single choice first.

        Where labels are already `dropped`, the factor that they leave whole rows of is chosen.
        """
        if dropped is not None and len(dropped):
            for merge in self._merges:
                self._follow(merge, dropped)
            self._merges.clear()
        later = []
        for merge in self._merges:
            shares = self._shares(merge)
            if sum(share > 0 for share in shares.values()) > 1:
                later.append(merge)
            else:
                self._settle(merge, shares)
        for merge in later:
            self._settle(merge, self._shares(merge))
        self._merges.clear()
        for sources, labels, why in self._singular:
            loose = [root for root in self.roots(labels) if root not in self.pinned]
            if sources and loose:
                self.unmasked |= sources
            else:
                self.pinned.update(dict.fromkeys(loose, why))

    def _shares(self, merge: Merge) -> dict[int, float]:
        """The share of each factor's labels that could still be dropped if it were chosen."""
        pinned = np.array([root in self.pinned for root in self.roots(merge.grid)], bool)
        pinned = pinned.reshape(merge.grid.shape)
        shares = {}
        for k, ids in merge.factors.items():
            own = np.array([root in self.pinned for root in self.roots(ids)], bool)
            others = tuple(j for j in range(merge.grid.ndim) if j != k)
            shares[k] = float(1 - np.mean(own | pinned.any(others)))
        return shares

    def _follow(self, merge: Merge, dropped: np.ndarray) -> None:
        gone = set(self.roots(dropped))
        is_gone = lambda ids: np.array([r in gone for r in self.roots(ids)], bool)
        grid = is_gone(merge.grid).reshape(merge.grid.shape)
        shares = self._shares(merge)
        for k, ids in merge.factors.items():
            others = tuple(j for j in range(grid.ndim) if j != k)
            rows = grid.all(others)
            if is_gone(ids).any() or (rows.any() and (grid.any(others) == rows).all()):
                shares[k] += 2
        self._settle(merge, shares)

    def _settle(self, merge: Merge, shares: dict[int, float]) -> None:
        chosen = max(shares, key=lambda k: (shares[k], k not in merge.free, k))
        for k, ids in merge.factors.items():
            if k == chosen:
                shape = [-1 if j == k else 1 for j in range(merge.grid.ndim)]
                self.tie(merge.grid, ids.reshape(shape))
            else:
                for root in self.roots(ids):
                    self.pinned.setdefault(root, merge.reason)


_ONE_FACTOR = "a reshape splits or merges it with another axis, and only one of them can shrink"


def _unlabelled(axes: Sequence[Axis]) -> Axis:
    if not axes or any(not isinstance(axis, Free) for axis in axes):
        return OPAQUE
    return Free(all(isinstance(axis, Free) and axis.uniform for axis in axes))


def _zero(axis: Axis) -> Any:
    return axis.zero if isinstance(axis, Labels | Free) else np.bool_(True)


def _along(axis: Labels, k: int, shape: Sequence[int]) -> Labels:
    index = tuple(slice(None) if j == k else None for j in range(len(shape)))
    return axis.map(lambda part: np.broadcast_to(part[index], shape))
