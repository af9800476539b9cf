"""Which layers cost accuracy in 8 bits, and which to leave in floating point for it."""

from collections.abc import Callable, Iterable
from math import isnan
from typing import Any, NamedTuple

from jaxtyping import PyTree

from jaxaccel._table import table
from jaxaccel.quantize._calibrate import first
from jaxaccel.quantize._plan import Activations, Choice
from jaxaccel.quantize._traced import Quantized, Traced, check_params, folded
from jaxaccel.quantize._transform import int8

Evaluate = Callable[[Callable, PyTree], float]


class OverBudgetError(ValueError):
    """No layer can be in 8 bits within the budget."""


class Cost(NamedTuple):
    """What one kernel in 8 bits costs: `score` with it alone, and the `drop` from the original."""

    kernel: str
    score: float
    drop: float


class Sensitivity(NamedTuple):
    """Of each layer, the most sensitive first; printed, a table."""

    original: float
    layers: tuple[Cost, ...]

    def __str__(self) -> str:
        """A table."""
        return table(("kernel in 8 bits", "score", "drop"), self.layers)


def sensitivity(
    fn: Callable, params: PyTree, batches: Iterable[Any], evaluate: Evaluate, **options: Any
) -> Sensitivity:
    """What each layer alone costs in 8 bits.

    Args:
        fn: ``fn(params, *args)``; inference.
        params: a pytree of arrays.
        batches: for calibration, as of `int8`.
        evaluate: ``evaluate(fn, params) -> score``, higher is better: an accuracy on validation
            data, say. Called once for each layer and once for the original.
        **options: of `int8`, except `where`.

    Returns:
        A score for each kernel.

    Raises:
        TypeError, ValueError: as `int8`.
    """
    if "where" in options:
        raise ValueError("where: is not for sensitivity or mixed, which try each layer")
    check_params(fn, params)
    fn, params = folded(fn, params, first(batches))
    original = score_of(evaluate, fn, params)
    found = []
    for path in kernels(fn, params, batches, options.get("activations", "static")):
        one = int8(fn, params, batches, where=lambda p, leaf, path=path: p == path, **options)
        score = score_of(evaluate, *one)
        found.append(Cost(path, score, original - score))
    return Sensitivity(original, tuple(sorted(found, key=lambda row: -row.drop)))


def score_of(evaluate: Evaluate, fn: Callable, params: PyTree) -> float:
    score = float(evaluate(fn, params))
    if isnan(score):
        raise ValueError(f"evaluate: gave NaN for {fn!r}; give a number, higher where it is better")
    return score


def kernels(
    fn: Callable, params: PyTree, batches: Iterable[Any], activations: Activations
) -> list[str]:
    """The paths of the kernels, and the names of the products, that `int8` would take."""
    traced = Traced(fn, params, Choice(activations, lambda keys: True))
    made = traced.checked(params, first(batches))
    return ["/".join(keys) for keys in (*made.axes, *made.products)]


def mixed(
    fn: Callable,
    params: PyTree,
    batches: Iterable[Any],
    evaluate: Evaluate,
    *,
    max_drop: float,
    **options: Any,
) -> tuple[Quantized, PyTree]:
    """In 8 bits as far as an accuracy budget goes: the most sensitive layers stay as they were.

    Layers are added to those that stay in the order of `sensitivity`, by bisection, until the
    score is at most `max_drop` below the original.

    Args:
        fn: as of `sensitivity`.
        params: as of `sensitivity`.
        batches: as of `sensitivity`.
        evaluate: as of `sensitivity`; called once for each layer, and some times more.
        max_drop: >= 0, in units of the score.
        **options: of `int8`, except `where`.

    Returns:
        As `int8`; what stays is in ``fn.report``.

    Raises:
        TypeError, ValueError: as `int8`; also a ValueError where even a single layer costs more.
    """
    if max_drop < 0:
        raise ValueError(f"max_drop={max_drop} must be >= 0, in units of the score")
    found = sensitivity(fn, params, batches, evaluate, **options)
    order = [row.kernel for row in found.layers]

    def without(count: int) -> tuple[Quantized, PyTree]:
        left = frozenset(order[:count])
        return int8(
            fn, params, batches, where=lambda p, leaf: p in order and p not in left, **options
        )

    fits = lambda one: found.original - score_of(evaluate, *one) <= max_drop
    best = without(0)
    if fits(best):
        return best
    low, high, best = 0, len(order), None  # `low` is too few; `high` none in 8 bits
    while high - low > 1:
        middle = (low + high) // 2
        one = without(middle)
        if fits(one):
            high, best = middle, one
        else:
            low = middle
    if best is None:
        raise OverBudgetError(
            f"max_drop={max_drop}: even {order[-1]} alone in 8 bits costs more; allow more, or "
            "train with jx.quantize.fake"
        )
    return best
