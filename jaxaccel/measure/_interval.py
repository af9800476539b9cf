"""Confidence intervals for repeated runs."""

import math
import statistics
from collections.abc import Iterable
from typing import NamedTuple


class Interval(NamedTuple):
    """A mean and the half-width of its confidence interval."""

    mean: float
    half_width: float

    def __str__(self) -> str:
        return f"{self.mean:.4g} ± {self.half_width:.2g}"


def interval(values: Iterable[float], confidence: float = 0.95) -> Interval:
    """Returns the mean of independent runs and the half-width of its Student-t interval.

    Args:
        values: at least 2 numbers, one for each run.
        confidence: the share of such intervals that hold the true mean, in (0, 1).

    Raises:
        ValueError: for fewer than 2 values, one that is not finite, or a confidence outside
            (0, 1).

    >>> print(interval([98.1, 98.4, 98.3]))
    98.27 ± 0.38
    """
    from scipy.special import stdtrit

    runs = [float(value) for value in values]
    if len(runs) < 2:
        raise ValueError(f"values: {len(runs)}; an interval needs at least 2 (run more seeds)")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence: {confidence!r}; give a number between 0 and 1, such as 0.95")
    if not all(map(math.isfinite, runs)):
        raise ValueError(f"values: {runs}; a run that diverged has no place in a mean")
    error = statistics.stdev(runs) / math.sqrt(len(runs))
    quantile = float(stdtrit(len(runs) - 1, (1 + confidence) / 2))
    return Interval(statistics.fmean(runs), quantile * error)


def paired(a: Iterable[float], b: Iterable[float], confidence: float = 0.95) -> Interval:
    """Returns the mean of ``a - b`` and its interval, for runs that share their seeds.

    Args:
        a: at least 2 numbers, one for each seed.
        b: as many, in the same order of seeds.
        confidence: the share of such intervals that hold the true difference, in (0, 1).

    Raises:
        ValueError: for different lengths, and as `interval` does.

    >>> print(paired([98.1, 98.4, 98.3], [97.9, 98.3, 98.0]))
    0.2 ± 0.25
    """
    left, right = list(a), list(b)
    if len(left) != len(right):
        raise ValueError(
            f"paired: {len(left)} and {len(right)} values; give one of each for every seed"
        )
    return interval([x - y for x, y in zip(left, right, strict=True)], confidence)
