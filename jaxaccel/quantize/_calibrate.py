"""Batches in, grids out: two passes over real data, a few numbers of each kept."""

from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from jaxaccel.quantize._arithmetic import Grid
from jaxaccel.quantize._observe import BINS, histograms, ranges
from jaxaccel.quantize._program import Program, end_of, operands_of
from jaxaccel.quantize._ranges import CALIBRATIONS, Calibration, Histogram, dead, grid, minmax
from jaxaccel.quantize._traced import Traced


def method(name: str | Calibration) -> Calibration:
    """The calibration of this name.

    Raises:
        ValueError: there is none.
    """
    if callable(name):
        return name
    if name not in CALIBRATIONS:
        known = ", ".join(map(repr, CALIBRATIONS))
        raise ValueError(f"calibration={name!r} must be one of {known}, or a function")
    return CALIBRATIONS[name]


def arguments(batch: Any) -> tuple[Any, ...]:
    """A batch as the arguments of a function: a tuple is several."""
    return batch if isinstance(batch, tuple) else (batch,)


def first(batches: Iterable[Any]) -> tuple[Any, ...]:
    """The arguments of the first batch.

    Raises:
        TypeError: `batches` is no iterable, or gives its batches once only.
        ValueError: there is no batch.
    """
    if not isinstance(batches, Iterable) or hasattr(batches, "shape"):
        raise TypeError(f"batches: {type(batches).__name__} is no iterable of batches; pass a list")
    if isinstance(batches, Iterator):
        raise TypeError(
            f"batches: a {type(batches).__name__} gives its batches once only, and calibration "
            "reads them again; pass a list, or an object whose __iter__ starts anew"
        )
    for batch in batches:
        return arguments(batch)
    raise ValueError("batches: is empty; pass at least one batch of real data")


def grids(
    traced: Traced, params: PyTree, batches: Iterable[Any], calibrate: Calibration, power: bool
) -> list[Grid]:
    """The grids of a function, in the order of their numbers."""
    seen = _ranges(traced, params, batches)
    counts = {} if calibrate is minmax else _counts(traced, params, batches, seen)
    program = traced.plan(params, first(batches))[0].program
    symmetric = {number for one in program.all for number in one.symmetric}
    found: list[Grid] = []
    zeros: set[int] = set()
    for number in sorted(seen):
        histogram = Histogram(*seen[number], counts.get(number, np.zeros(BINS)))
        low, high = _ends(calibrate(histogram))
        found.append(grid(histogram, low, high, symmetric=number in symmetric, power=power))
        zeros |= {number} if dead(low, high) else set()
    return _lent(program, found, zeros)


def _lent(program: Program, grids: Sequence[Grid], zeros: Set[int]) -> list[Grid]:
    """The grids; what was always 0 has the step of what it goes into, which then is not coarser."""
    found, known = list(grids), {*range(len(grids))} - zeros
    for one in program.all:
        for step in reversed(list(one.steps.values())):
            end = one.integers.get(end_of(step))
            if end not in known:
                continue
            for number in {one.integers[x] for x in operands_of(step)} & zeros:
                scale = found[end].scale
                scale = min(scale, found[number].scale) if number in known else scale
                found[number] = Grid(scale, found[number].zero_point)
                known.add(number)
    return found


def _ends(found: Any) -> tuple[float, float]:
    try:
        low, high = map(float, found)
    except (TypeError, ValueError):
        low = high = np.nan
    if not -np.inf < low <= high < np.inf:
        raise ValueError(
            f"calibration: the function returned {found!r}; it must return the ends of the range, "
            "two finite numbers, the lower one first"
        )
    return low, high


def _ranges(
    traced: Traced, params: PyTree, batches: Iterable[Any]
) -> dict[int, tuple[float, float]]:
    look = jax.jit(lambda params, args: ranges(*_run(traced, params, args))[1])
    found: dict[int, tuple[float, float]] = {}
    for place, batch in enumerate(batches):
        args = arguments(batch)
        for number, one in jax.device_get(look(params, args)).items():
            if not one.finite:
                where = _name(traced.plan(params, args)[0].program, number)
                raise ValueError(
                    f"batches[{place}]: {where} holds NaN or infinity; leave such inputs out"
                )
            low, high = found.get(number, (np.inf, -np.inf))
            found[number] = min(low, float(one.low)), max(high, float(one.high))
    for number, (low, high) in found.items():
        if low > high:
            program = traced.plan(params, first(batches))[0].program
            where, own = _name(program, number), number in program.watched.values()
            fix = "pass batches that are not empty"
            fix = fix if own else f"{fix}, and that enter the loop or the branch in which it stands"
            raise ValueError(f"batches: {where} had no numbers; {fix}")
    return found


def _counts(
    traced: Traced, params: PyTree, batches: Iterable[Any], limits: Mapping[int, Any]
) -> dict[int, np.ndarray]:
    look = jax.jit(lambda params, args: histograms(*_run(traced, params, args), limits)[1])
    found: dict[int, np.ndarray] = {}
    for batch in batches:
        for number, one in jax.device_get(look(params, arguments(batch))).items():
            found[number] = found.get(number, 0) + one.counts.astype(np.float64)
    return found


def _run(traced: Traced, params: PyTree, args: tuple[Any, ...]) -> tuple[Program, list[Any]]:
    program = traced.plan(params, args)[0].program
    return program, [*jax.tree.leaves(params), *jax.tree.leaves(args)]


def _name(program: Program, number: int) -> str:
    """A value with this grid, in words."""
    for one in program.all:
        for value, place in one.watched.items():
            node = one.view.makers.get(value)
            if place == number:
                line = f" at {node.source}" if node and node.source else ""
                return f"the result of {node.name}{line}" if node else "an argument"
    raise AssertionError(number)
