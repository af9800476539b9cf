"""Interleaved timing of several functions, and the comparison that comes out."""

import gc
import math
import os
import platform
import random
import statistics
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import date
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax

from jaxaccel._figure import figure, save
from jaxaccel._progress import bar
from jaxaccel._table import Style, table
from jaxaccel.measure._cost import parameter_size

# The threads of other engines spin for some milliseconds after a call, and slow down who is next.
_PAUSE = 0.2


@runtime_checkable
class Bound(Protocol):
    """A function that holds its parameters."""

    params: Any

    def bind(self, *args: Any) -> Callable[[], Any]:
        """The call of these arguments, put where it wants them."""
        ...


class Row(NamedTuple):
    """One candidate: milliseconds per call and ratio to the baseline, with their quartiles.

    ``rounds_ms`` holds the time of each round, so that any two rows can be paired by round.
    """

    name: str
    median_ms: float
    low_ms: float
    high_ms: float
    ratio: float
    ratio_low: float
    ratio_high: float
    parameters: int
    parameter_bytes: int
    rounds_ms: tuple[float, ...]


@dataclass(frozen=True)
class Comparison:
    """What `compare` measured, and on what; ``print`` shows it as a table."""

    rows: tuple[Row, ...]
    baseline: str
    rounds: int
    device: str
    jax_version: str
    date: str

    def __str__(self) -> str:
        return self.text()

    def text(self) -> str:
        """Returns the header, the table and how to read it, for a terminal."""
        return f"{self._header()}\n\n{self._table('text')}\n\n{self._caption()}"

    def markdown(self) -> str:
        """Returns the same as a Markdown table."""
        return f"{self._header()}\n\n{self._table('markdown')}\n\n{self._caption()}"

    def to_dict(self) -> dict[str, Any]:
        """Returns plain dicts, lists, strings and numbers, for ``json.dump``."""
        rows = [row._asdict() | {"rounds_ms": list(row.rounds_ms)} for row in self.rows]
        return asdict(self) | {"rows": rows}

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draws each candidate's ratio to the baseline, with its quartiles, into an image file.

        Args:
            path: where to write; the suffix decides the format (``.png``, ``.svg``, ``.pdf``).

        Raises:
            ImportError: where matplotlib is absent.
        """
        lines = max(_wrapped(row.name).count("\n") + 1 for row in self.rows)
        drawn = figure(6, 0.6 + (0.25 + 0.17 * lines) * len(self.rows))
        _draw(drawn.add_subplot(), self)
        save(drawn, path)

    def _header(self) -> str:
        return f"{self.device}; jax {self.jax_version}; {self.date}"

    def _caption(self) -> str:
        return (
            f"ms: median time per call of {self.rounds} interleaved rounds; ratio: that time over "
            f"{self.baseline!r} in the same round, below 1 is faster; 25%, 75%: quartiles."
        )

    def _table(self, style: Style) -> str:
        columns = ("candidate", "ms", "25%", "75%", "ratio", "25%", "75%", "parameters", "bytes")
        return table(columns, [row[:-1] for row in self.rows], style)  # not every round


def compare(
    candidates: Mapping[str, tuple[Callable[..., Any], Any] | Bound],
    *args: Any,
    rounds: int = 30,
    min_time: float = 0.02,
    baseline: str | None = None,
    show: bool = True,
) -> Comparison:
    """Times functions against each other: compiled, warm, interleaved, in one process.

    Each round takes one sample of every candidate, in an order that is shuffled and then
    reversed, so that a machine that slows down or speeds up meets all of them alike; the ratio
    is taken within each round. A sample is as many calls as fill ``min_time``, waited for at
    its end: the time per call of a busy device. Garbage collection is off meanwhile. Where one
    candidate is another engine, each sample begins with a pause of 0.2 s and a call that is not
    timed: the threads of engines spin after a call. Outputs are not compared.

    Args:
        candidates: name -> ``(fn, params)``, which is called as ``fn(params, *args)``; or what
            `jx.export.compile` returned, which is called as ``call(*args)``.
        *args: the other arguments, the same for all, as arrays.
        rounds: samples of each candidate, at least 2.
        min_time: the least length of a sample in seconds, above 0.
        baseline: the candidate that ratios refer to; the first one if None.
        show: print the table, and a progress bar where it takes longer than 2 seconds.

    Returns:
        A `Comparison`: ``.text()``, ``.markdown()``, ``.plot(path)``, ``.to_dict()``.

    Raises:
        TypeError: for a name that is not a string, or a candidate that is not such a pair.
        ValueError: for no candidates, an unknown baseline, or a bad ``rounds`` or ``min_time``.

    >>> import jax.numpy as jnp
    >>> sizes = {str(n): (lambda kernel, x: x @ kernel, jnp.ones((64, n))) for n in (8, 16)}
    >>> found = compare(sizes, jnp.ones((4, 64)), rounds=2, min_time=1e-4, show=False)
    >>> [(row.name, row.parameters) for row in found.rows], found.rows[0].ratio
    ([('8', 512), ('16', 1024)], 1.0)
    """
    baseline = _check(candidates, args, rounds, min_time, baseline)
    args = jax.device_put(args)
    calls = {name: _compiled_call(value, args) for name, value in candidates.items()}
    outputs = [jax.block_until_ready(call()) for call in calls.values()]
    apart = any(isinstance(value, Bound) for value in candidates.values())
    with bar(show, "measuring", rounds) as tick:  # drawn between the rounds alone
        seconds = _interleave(calls, rounds, min_time, tick=tick, pause=_PAUSE if apart else 0)
    found = Comparison(
        rows=tuple(_row(name, seconds, baseline, _params(candidates[name])) for name in candidates),
        baseline=baseline,
        rounds=rounds,
        device=_device(outputs),
        jax_version=jax.__version__,
        date=date.today().isoformat(),
    )
    if show:
        print(found)
    return found


def _check(
    candidates: Mapping[str, Any],
    args: Sequence[Any],
    rounds: int,
    min_time: float,
    baseline: str | None,
) -> str:
    if not candidates:
        raise ValueError("candidates: empty; give at least one name: (fn, params)")
    for name, value in candidates.items():
        _check_candidate(name, value, args)
    baseline = next(iter(candidates)) if baseline is None else baseline
    if baseline not in candidates:
        known = ", ".join(map(repr, candidates))
        raise ValueError(f"baseline: {baseline!r} is not a candidate; take one of {known}")
    if not isinstance(rounds, int) or rounds < 2:
        raise ValueError(f"rounds: {rounds!r}; give a whole number of at least 2")
    if not 0 < min_time < math.inf:
        raise ValueError(f"min_time: {min_time!r}; give seconds above 0")
    return baseline


def _check_candidate(name: Any, value: Any, args: Sequence[Any]) -> None:
    if not isinstance(name, str):
        raise TypeError(f"candidates: the name {name!r} is not a string; name it {str(name)!r}")
    pair = isinstance(value, tuple) and len(value) == 2 and callable(value[0])
    if not pair and not isinstance(value, Bound):
        kind = type(value).__name__
        raise TypeError(f"candidates[{name!r}]: {kind}; give the pair (fn, params)")
    leaves = jax.tree.leaves((_params(value), args))
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves):
        raise TypeError(f"candidates[{name!r}]: a ShapeDtypeStruct cannot be run; give arrays")


def _params(value: Any) -> Any:
    return value[1] if isinstance(value, tuple) else value.params


def _compiled_call(value: Any, args: tuple[Any, ...]) -> Callable[[], Any]:
    if not isinstance(value, tuple):
        return value.bind(*args)
    fn, params = value[0], jax.device_put(value[1])
    compiled = fn if isinstance(fn, jax.stages.Wrapped) else jax.jit(fn)  # once, if it is already
    return lambda: compiled(params, *args)


def _interleave(
    calls: Mapping[str, Callable[[], Any]],
    rounds: int,
    min_time: float,
    clock: Callable[[], float] = time.perf_counter,
    tick: Callable[[], None] = lambda: None,
    pause: float = 0,
) -> dict[str, list[float]]:
    """Seconds per call of each name, one for each round."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    shuffle, order = random.Random(0), list(calls)
    with _garbage_collection_off():
        counts = {name: _count(call, min_time, clock) for name, call in calls.items()}
        for turn in range(rounds):
            order = order[::-1] if turn % 2 else shuffle.sample(order, len(order))
            for name in order:
                if pause:
                    time.sleep(pause)
                    _sample(calls[name], 1, clock)
                seconds[name].append(_sample(calls[name], counts[name], clock))
            tick()
    return seconds


def _count(call: Callable[[], Any], min_time: float, clock: Callable[[], float]) -> int:
    """How many calls fill ``min_time``; finding out warms up."""
    count = 1
    while (elapsed := count * _sample(call, count, clock)) < min_time:
        count = math.ceil(1.2 * count * min_time / max(elapsed, min_time / 10))
    return count


def _sample(call: Callable[[], Any], count: int, clock: Callable[[], float]) -> float:
    out, start = None, clock()
    for _ in range(count):
        out = call()
    jax.block_until_ready(out)
    return (clock() - start) / count


@contextmanager
def _garbage_collection_off() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _row(name: str, seconds: Mapping[str, list[float]], baseline: str, params: Any) -> Row:
    own = seconds[name]
    rounds_ms = tuple(1000 * value for value in own)
    low, median, high = _quartiles(rounds_ms)
    ratios = [value / base for value, base in zip(own, seconds[baseline], strict=True)]
    ratio_low, ratio, ratio_high = _quartiles(ratios)
    size = parameter_size(params)
    return Row(name, median, low, high, ratio, ratio_low, ratio_high, *size, rounds_ms)


def _quartiles(values: Sequence[float]) -> list[float]:
    return statistics.quantiles(values, n=4, method="inclusive")


def _device(outputs: Any) -> str:
    """The devices that hold the results, as in '8 x cpu (x86_64, 16 cores)'."""
    leaves = [leaf for leaf in jax.tree.leaves(outputs) if isinstance(leaf, jax.Array)]
    found = list({device for leaf in leaves for device in leaf.devices()} or jax.devices()[:1])
    kind = found[0].device_kind
    if found[0].platform == "cpu":
        kind = f"{kind} ({platform.processor() or platform.machine()}, {os.cpu_count()} cores)"
    return f"{len(found)} x {kind}"


def _draw(axes: Any, comparison: Comparison) -> None:
    rows, places = comparison.rows, range(len(comparison.rows))
    ratios = [row.ratio for row in rows]
    below = [row.ratio - row.ratio_low for row in rows]
    above = [row.ratio_high - row.ratio for row in rows]
    axes.errorbar(ratios, places, xerr=(below, above), fmt="o", capsize=3, color="tab:blue")
    axes.axvline(1, color="0.6", linewidth=1, zorder=0)
    axes.grid(axis="x", alpha=0.3)
    _scale(axes, max(ratios) / min(ratios))
    axes.set_ylim(len(rows) - 0.5, -0.5)
    # Names are the caller's: a dollar sign in one does not start a formula.
    axes.set_yticks(places, [_wrapped(row.name) for row in rows], parse_math=False)
    label = f"time per call / time of {comparison.baseline!r} (median and quartiles)"
    axes.set_xlabel(textwrap.fill(label, 70), parse_math=False)
    axes.set_title(textwrap.fill(comparison._header(), 70), fontsize="small", parse_math=False)
    for place, row in enumerate(rows):
        _beside(axes, place, f"{row.ratio:.3g} x, {row.median_ms:.3g} ms")


def _wrapped(name: str) -> str:
    return textwrap.fill(name, 40)


def _scale(axes: Any, span: float) -> None:
    """A logarithmic axis with plain numbers, where the ratios span more than a factor of 4."""
    if span <= 4:
        return
    axes.set_xscale("log", subs=())
    axes.xaxis.get_major_locator().set_params(subs=(1.0,) if span > 100 else (1.0, 2.0, 5.0))
    axes.xaxis.set_major_formatter("{x:g}")


def _beside(axes: Any, place: float, text: str) -> None:
    """Writes to the right of the plot, level with a row."""
    where = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
    axes.annotate(text, xy=(1, place), xytext=(8, 0), va="center", **where)
