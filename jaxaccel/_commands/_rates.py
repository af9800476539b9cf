"""What the default device reaches: matrix products and copies, measured through XLA."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, NamedTuple

from jaxaccel._commands._layout import first_line

DTYPES = ("float32", "bfloat16", "int8")


class Sizes(NamedTuple):
    """How much to measure.

    Attributes:
        sides: of the square matrices to try, from the smallest on.
        copied: bytes.
        seconds: that one product may take; a larger size is not tried.
        rounds: samples of each.
        least: seconds that one sample fills.
    """

    sides: tuple[int, ...]
    copied: int
    seconds: float
    rounds: int
    least: float


CPU = Sizes((256, 512, 1024, 2048, 4096), 1 << 27, 0.1, 9, 0.02)
# Few, since each takes a second to compile; the first keeps all of a GPU busy.
GPU = Sizes((4096, 16384), 1 << 30, 0.1, 9, 0.02)


@dataclass(frozen=True)
class Rate:
    """A rate with its quartiles, or the error that came instead.

    Attributes:
        what: "float32 product", for example.
        unit: of the rates, in thousand millions a second.
        operands: what it was measured with.
        rounds: how often.
    """

    what: str
    unit: str
    operands: str
    rounds: int
    median: float | None = None
    low: float | None = None
    high: float | None = None
    error: str | None = None


def rates(sizes: Sizes, show: bool) -> tuple[Rate, ...]:
    """All of them, with a progress bar where it takes longer than a moment."""
    import jax

    jobs = [lambda dtype=dtype: product(dtype, sizes) for dtype in DTYPES]
    found = []
    with _bar(show, len(jobs) + 1) as tick, jax.transfer_guard("allow"):
        for job in (*jobs, lambda: copy(sizes)):
            found.append(job())
            tick()
    return tuple(found)


@contextmanager
def _bar(show: bool, total: int) -> Iterator[Callable[[], None]]:
    if not show or find_spec("rich") is None:  # that it is missing is said elsewhere
        yield lambda: None
        return
    from jaxaccel._progress import bar

    with bar(show, "measuring", total) as tick:
        yield tick


def sizes_for(platform: str, free: int | None) -> Sizes:
    """Those of the platform that fit into an eighth of so many bytes."""
    whole = CPU if platform == "cpu" else GPU
    if free is None:
        return whole
    fitting = [side for side in whole.sides if 32 * side**2 <= free // 8]
    copied = min(whole.copied, 1 << max(20, (free // 8).bit_length() - 1))
    return whole._replace(sides=tuple(fitting) or (256,), copied=copied)


def product(dtype: str, sizes: Sizes) -> Rate:
    """The largest square product that is quick enough."""
    side, unit = sizes.sides[0], "GOP/s" if dtype == "int8" else "GFLOP/s"
    what = "int8 product, int32 sums" if dtype == "int8" else f"{dtype} product"
    try:
        side, operand = _largest(dtype, sizes)
        seconds = _samples(_multiply, operand, sizes)
    except Exception as error:  # of memory, of a backend without such a product, of settings
        return Rate(what, unit, _shape(side), sizes.rounds, error=first_line(error))
    return _rate(Rate(what, unit, _shape(side), sizes.rounds), 2 * side**3, seconds)


def _largest(dtype: str, sizes: Sizes) -> tuple[int, Any]:
    """The next size is tried where this one's time says that it is quick enough."""
    side = sizes.sides[0]
    operand = _square(side, dtype)
    for larger in sizes.sides[1:]:
        seconds = min(_samples(_multiply, operand, sizes._replace(rounds=2, least=1e-3)))
        if seconds * (larger / side) ** 3 > sizes.seconds:
            break
        side, operand = larger, _square(larger, dtype)
    return side, operand


def copy(sizes: Sizes) -> Rate:
    """Into new memory, as results are written: what is read and what is written count."""
    rate = Rate("copy", "GB/s", f"{sizes.copied >> 20:,} MiB", sizes.rounds)
    try:
        import jax.numpy as jnp

        seconds = _samples(jnp.copy, jnp.ones(sizes.copied // 4, jnp.float32), sizes)
    except Exception as error:  # of memory, or of settings
        return Rate(rate.what, rate.unit, rate.operands, rate.rounds, error=first_line(error))
    return _rate(rate, 2 * sizes.copied, seconds)


def _shape(side: int) -> str:
    return f"{side:,} x {side:,}"


def _square(side: int, dtype: str) -> Any:
    """Numbers as they come: a processor may be quicker, or cooler, on zeros."""
    import jax

    whole = 40 * jax.random.normal(jax.random.key(0), (side, side), "float32")
    return jax.block_until_ready(whole.astype(dtype))


def _multiply(a: Any) -> Any:
    import jax
    import jax.numpy as jnp

    integers = jnp.issubdtype(a.dtype, jnp.integer)
    return jax.lax.dot(a, a, preferred_element_type=jnp.int32 if integers else None)


def _samples(call: Callable, operand: Any, sizes: Sizes) -> tuple[float, ...]:
    """Seconds of a call in each round, by the clock that `jaxaccel.measure` has."""
    from jaxaccel.measure import compare

    candidates = {"it": (call, operand)}
    row = compare(candidates, rounds=sizes.rounds, min_time=sizes.least, show=False).rows[0]
    return tuple(ms / 1000 for ms in row.rounds_ms)


def _rate(rate: Rate, work: float, seconds: tuple[float, ...]) -> Rate:
    from statistics import quantiles

    low, median, high = quantiles((1e-9 * work / s for s in seconds), n=4, method="inclusive")
    return Rate(rate.what, rate.unit, rate.operands, rate.rounds, median, low, high)
