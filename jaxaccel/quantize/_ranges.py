"""From what was seen to a grid: min-max, percentile, mean squared error, entropy."""

from collections.abc import Callable
from math import ceil, floor, log2
from typing import NamedTuple, TypeAlias

import numpy as np
from jaxtyping import Float64

from jaxaccel.quantize._arithmetic import HIGHEST, LOWEST, Grid

_SHARES = np.linspace(0.02, 1.0, 99)  # of a range, that clipping may leave
_LEAST_BINS = 128  # that a threshold of `entropy` keeps
_SMALLEST = 2.0**-100  # a smaller step is lost in float32


class Histogram(NamedTuple):
    """The numbers of a tensor in calibration: `counts` of equal parts of ``[low, high]``."""

    low: float
    high: float
    counts: Float64[np.ndarray, "bins"]

    @property
    def centres(self) -> Float64[np.ndarray, "bins"]:
        """The middle of each part."""
        edges = np.linspace(self.low, self.high, len(self.counts) + 1)
        return (edges[:-1] + edges[1:]) / 2


Calibration: TypeAlias = Callable[[Histogram], tuple[float, float]]


def minmax(seen: Histogram) -> tuple[float, float]:
    """All that was seen."""
    return seen.low, seen.high


def percentile(percent: float = 99.99) -> Calibration:
    """All but the rarest ``100 - percent`` percent of the numbers, at either end.

    Args:
        percent: above 50, at most 100.

    Raises:
        ValueError: it is not.
    """
    if not 50 < percent <= 100:
        raise ValueError(f"percentile({percent}): give a number above 50, up to 100")

    def clip(seen: Histogram) -> tuple[float, float]:
        edges = np.linspace(seen.low, seen.high, len(seen.counts) + 1)
        shares = np.concatenate([[0.0], np.cumsum(seen.counts)]) / seen.counts.sum()
        ends = np.interp([1 - percent / 100, percent / 100], shares, edges)
        return float(ends[0]), float(ends[1])

    return clip


def mse(seen: Histogram) -> tuple[float, float]:
    """The clipping at which 8 bits give the least mean squared error.

    Source: Banner et al. 2019 (https://arxiv.org/abs/1810.05723), by search.
    """
    lows = seen.low * _SHARES if seen.low < 0 else np.array([seen.low])
    highs = seen.high * _SHARES if seen.high > 0 else np.array([seen.high])
    low, high = seen.low, seen.high
    for _ in range(2):  # one end after the other
        high = min(highs, key=lambda end: error(seen, *grid_ends(low, float(end))))
        low = min(lows, key=lambda end: error(seen, *grid_ends(float(end), float(high))))
    return float(low), float(high)


def grid_ends(low: float, high: float) -> tuple[float, float]:
    """Step and lower end of 256 numbers over a range that holds 0."""
    low, high = min(low, 0.0), max(high, 0.0)
    return max(high - low, _SMALLEST) / 255, low


def error(seen: Histogram, step: float, low: float) -> float:
    """The sum of squared differences from the nearest of 256 numbers."""
    zero = np.round(-low / step)
    steps = np.clip(np.round(seen.centres / step), -zero, 255 - zero)
    return float(seen.counts @ (seen.centres - steps * step) ** 2)


def entropy(seen: Histogram) -> tuple[float, float]:
    """The clipping that loses least information, by Kullback-Leibler divergence.

    Source: Migacz 2017, "8-bit inference with TensorRT".
    """
    bins = len(seen.counts)
    largest = max(-seen.low, seen.high)
    one_sided = seen.low >= 0
    edges = np.linspace(0, largest, bins + 1)
    places = np.minimum(np.searchsorted(edges, np.abs(seen.centres), "right") - 1, bins - 1)
    counts = np.bincount(places, seen.counts, bins)
    counts[0] = 0  # a relu's zeros, which every grid holds exactly
    levels = 256 if one_sided else 128
    kept = range(min(_LEAST_BINS, bins), bins + 1, 8)
    best = min(kept, key=lambda n: _divergence(counts, n, levels))
    limit = float(edges[best])
    return max(seen.low, -limit), min(seen.high, limit)


def _divergence(counts: Float64[np.ndarray, "bins"], kept: int, levels: int) -> float:
    """Of the first `kept` bins, the last with all beyond, from these in so many levels."""
    real = counts[:kept].copy()
    real[-1] += counts[kept:].sum()
    level = np.arange(kept) * levels // kept
    present = counts[:kept] > 0
    sums = np.bincount(level, counts[:kept], levels)
    filled = np.bincount(level, present, levels)
    coarse = np.where(present, (sums / np.maximum(filled, 1))[level], 0.0)
    if not coarse.sum():
        return np.inf
    p, q = real / real.sum(), coarse / coarse.sum()
    lost = p > 0
    return float(np.sum(p[lost] * np.log(p[lost] / np.maximum(q[lost], 1e-12))))


CALIBRATIONS: dict[str, Calibration] = {
    "minmax": minmax,
    "percentile": percentile(),
    "mse": mse,
    "entropy": entropy,
}


def dead(low: float, high: float) -> bool:
    """Whether a range has nothing but 0."""
    return max(-low, high) < 127 * _SMALLEST


def grid(
    seen: Histogram, low: float, high: float, *, symmetric: bool = False, power: bool = False
) -> Grid:
    """The grid over a range; a power of two rounds up, or down if that gives the less error.

    Where nothing is negative, 0 is the lowest of the integers; otherwise, with powers of two as
    where it must be `symmetric`, the middle one.
    """
    low, high = min(low, 0.0), max(high, 0.0)
    if symmetric or (power and low < 0):
        step, zero = max(-low, high) / 127, 0
    else:
        step = (high - low) / 255
        zero = int(np.clip(np.round(LOWEST - low / step), LOWEST, HIGHEST)) if step else LOWEST
    if dead(low, high):
        return Grid(1.0, zero)
    if not power:
        return Grid(float(np.float32(step)), zero)
    low_end = LOWEST - zero
    steps = [2.0 ** floor(log2(step)), 2.0 ** ceil(log2(step))]
    best = min(reversed(steps), key=lambda s: error(seen, s, low_end * s))
    return Grid(best, zero)
