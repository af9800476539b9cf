"""Which channels go for a given cost: those that move the outputs least."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from jaxaccel import prune
from jaxaccel.prune._choose import Removed, lowest, scored
from jaxaccel.prune._make import Maker

Resource: TypeAlias = Literal["parameters", "macs"]
_RATIOS = (0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875)
_MOST = 256  # rows of the first batch that outputs are compared on


class Moved(NamedTuple):
    """What removing a share of a group's channels does to the outputs, and what it saves.

    Attributes:
        group: the slices that go together.
        ratio: the share of its channels that goes.
        distortion: mean square by which the outputs move, over the variance of the outputs.
        saved: the share of the network's cost that goes with it.
    """

    group: str
    ratio: float
    distortion: float
    saved: float


class Ladder:
    """A network with less and less of its channels.

    Each group is tried alone, at some ratios: the channels of least L1 norm are set to zero, which
    equals removing them, and the outputs on a batch are compared. Step by step the group is then
    cut further that moves the outputs least for what it saves. Where several groups are cut their
    distortions are taken to add up, as in mixed-precision search (Pandey et al. 2023,
    https://arxiv.org/abs/2302.05397).
    """

    def __init__(
        self,
        fn: Callable,
        params: PyTree,
        example: Sequence[Any],
        batch: Sequence[Any],
        resource: Resource,
        round_to: int,
    ) -> None:
        self._fn, self._params, self._batch = fn, params, tuple(batch)
        self._maker = Maker(fn, params, tuple(example))
        self._place = ("parameters", "macs").index(resource)
        self._round_to = round_to

    @property
    def counts(self) -> tuple[int, int]:
        """Parameters and multiply-accumulates of the whole."""
        return self._maker.counter.before

    @property
    def sensitivity(self) -> tuple[Moved, ...]:
        """What each group costs and saves, at each ratio that was tried."""
        whole = max(self.counts[self._place], 1)
        return tuple(
            Moved(
                str(group),
                len(rung.removed) / group.size,
                rung.distortion,
                (whole - self._cost([rung])) / whole,
            )
            for group, rungs in zip(self._maker.groups, self._rungs, strict=True)
            for rung in rungs[1:]
        )

    @property
    def costs(self) -> list[int]:
        """From the whole on, what is left after each step."""
        return [cost for cost, _ in self._path]

    def plan(self, depth: int) -> prune.Plan:
        """After so many steps."""
        return self._maker.plan([rung.removed for rung in self._path[depth][1]])

    @cached_property
    def _rungs(self) -> list[list["_Rung"]]:
        """Of each group, from nothing removed on."""
        groups = self._maker.groups
        if not len(groups):
            return []
        scores = scored(groups, self._params, prune.l1)
        at = [
            lowest(scores, [ratio] * len(groups), 0.0, "local", self._round_to) for ratio in _RATIOS
        ]
        run, expected = self._outputs()
        return [self._of_group(place, at, run, expected) for place in range(len(groups))]

    def _of_group(
        self, place: int, at: Sequence[Removed], run: Callable, expected: Sequence[Array]
    ) -> list["_Rung"]:
        none = np.zeros(0, int)
        rungs = [_Rung(place, none, 0.0)]
        for removed in at:
            if len(removed[place]) == len(rungs[-1].removed):
                continue  # rounded to as many channels
            alone = [removed[k] if k == place else none for k in range(len(self._maker.groups))]
            masks = self._maker.plan(alone).masks(self._params)
            found = run(prune.apply(self._params, masks), *self._batch)
            distortion = max(_distance(found, expected), rungs[-1].distortion)
            rungs.append(_Rung(place, removed[place], distortion))
        return rungs

    def _outputs(self) -> tuple[Callable, list[Array]]:
        run = jax.jit(lambda params, *args: _floats(self._fn(params, *args)))
        return run, run(self._params, *self._batch)

    @cached_property
    def _path(self) -> list[tuple[int, list["_Rung"]]]:
        """Costs, and what is removed, from nothing to all that can go."""
        depths = [0] * len(self._rungs)
        chosen = [rungs[0] for rungs in self._rungs]
        path = [(self._cost(chosen), chosen)]
        while True:
            steps = [
                [rungs[depth + 1] if k == place else rung for k, rung in enumerate(chosen)]
                for place, (rungs, depth) in enumerate(zip(self._rungs, depths, strict=True))
                if depth + 1 < len(rungs)
            ]
            ranked = [(self._price(path[-1], step), k) for k, step in enumerate(steps)]
            if not ranked:
                return path
            chosen = steps[min(ranked)[1]]
            depths = [rungs.index(rung) for rungs, rung in zip(self._rungs, chosen, strict=True)]
            path.append((self._cost(chosen), chosen))

    def _price(self, now: tuple[int, list["_Rung"]], step: list["_Rung"]) -> float:
        """Distortion for what is saved."""
        cost, chosen = now
        moved = sum(rung.distortion for rung in step) - sum(rung.distortion for rung in chosen)
        saved = cost - self._cost(step)
        return moved / saved if saved > 0 else np.inf

    def _cost(self, chosen: Sequence["_Rung"]) -> int:
        groups = self._maker.groups
        gone = [(groups[rung.place], rung.removed) for rung in chosen if len(rung.removed)]
        return self._maker.counts(gone)[self._place]


@dataclass(frozen=True, eq=False)
class _Rung:
    """Channels of a group that go, and by how much that moves the outputs."""

    place: int
    removed: np.ndarray
    distortion: float


def _floats(outputs: Any) -> list[Array]:
    """The real results, of some rows each."""
    leaves = [jnp.asarray(leaf) for leaf in jax.tree.leaves(outputs)]
    real = [leaf for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.floating)]
    return [leaf[:_MOST] if leaf.ndim else leaf for leaf in real]


def _distance(found: Sequence[Array], expected: Sequence[Array]) -> float:
    """Mean over the results of mean square difference over variance."""
    shares = []
    for one, other in zip(found, expected, strict=True):
        a, b = np.asarray(one, np.float64), np.asarray(other, np.float64)
        shares.append(float(((a - b) ** 2).mean() / max(b.var(), 1e-12)))
    return float(np.mean(shares)) if shares else 0.0
