"""What was tried, what came out, and what was chosen."""

import os
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from jaxtyping import PyTree

from jaxaccel._compress._ladder import Moved
from jaxaccel._compress._recipe import Recipe
from jaxaccel._figure import figure, save
from jaxaccel._table import Style, table

Target: TypeAlias = Literal["latency", "bytes", "flops"]
_COST = {"latency": "ratio", "bytes": "bytes", "flops": "macs"}
_LABEL = {
    "latency": "time per call / time of the autotuned original",
    "bytes": "bytes of the parameters",
    "flops": "multiply-accumulates of the example",
}


@dataclass(frozen=True, eq=False)
class Candidate:
    """One that was measured.

    Attributes:
        name: what was done.
        engine: that runs it.
        score: of `evaluate`, and `drop`, how far below the original's.
        macs: multiply-accumulates of one call at the example's sizes.
        parameters: how many, of the original's kind, and `bytes` of all that is stored.
        ms: median time of a call; None if it was not measured. `ratio`: over the autotuned
            original's in the same round, with quartiles `low` and `high`.
        recipe: that makes it.
        fn, params: it. On another engine than XLA, what `jaxaccel.export.compile` takes.
    """

    name: str
    engine: str
    score: float
    drop: float
    macs: int
    parameters: int
    bytes: int
    ms: float | None
    ratio: float | None
    low: float | None
    high: float | None
    recipe: Recipe
    fn: Callable = field(repr=False)
    params: PyTree = field(repr=False)

    def cost(self, target: Target) -> float:
        """What is to be small."""
        value = getattr(self, _COST[target])
        return float("inf") if value is None else value


@dataclass(frozen=True)
class Report:
    """Every candidate that `jaxaccel.compress` measured; ``print`` shows them as a table.

    Attributes:
        target: what was to be small, and `max_drop`, how much score that may cost.
        original: the score of the function as given.
        candidates: in the order in which they were tried.
        chosen: which of them was returned.
        sensitivity: what removing channels of one group alone does to the outputs.
        left_out: what could not be tried, and networks over the budget, with their drop.
        device, jax_version, date, seconds: where, with what, when, and how long it took.
        interrupted: whether it was stopped before its end.
    """

    target: Target
    max_drop: float
    original: float
    candidates: tuple[Candidate, ...]
    chosen: Candidate
    sensitivity: tuple[Moved, ...]
    left_out: tuple[str, ...]
    device: str
    jax_version: str
    date: str
    seconds: float
    interrupted: bool

    @property
    def recipe(self) -> Recipe:
        """How the chosen one is made: for another machine."""
        return self.chosen.recipe

    @property
    def engine(self) -> str:
        """That runs the chosen one fastest, for `jaxaccel.export.compile`."""
        return self.chosen.engine

    @property
    def pareto(self) -> tuple[Candidate, ...]:
        """Those that no other beats in score and target at once, the costliest first."""
        key = lambda one: (one.cost(self.target), -one.score)
        front: list[Candidate] = []
        for one in sorted(self.candidates, key=key):
            if not front or one.score > front[-1].score:
                front.append(one)
        return tuple(reversed(front))

    def __str__(self) -> str:
        return self.text()

    def text(self) -> str:
        """Returns the table, what was chosen and what was left out, for a terminal."""
        return self._page("text")

    def markdown(self) -> str:
        """Returns the same in Markdown."""
        return self._page("markdown")

    def to_dict(self) -> dict[str, Any]:
        """Returns plain dicts, lists, strings and numbers, for ``json.dump``; recipes in words."""
        numbers = lambda one: {name: getattr(one, name) for name in _NUMBERS}
        rows = [numbers(one) | {"recipe": str(one.recipe)} for one in self.candidates]
        place = self.candidates.index(self.chosen)
        plain = {name: getattr(self, name) for name in _PLAIN}
        moved = [one._asdict() for one in self.sensitivity]
        pareto = [self.candidates.index(one) for one in self.pareto]
        lists = {"candidates": rows, "sensitivity": moved, "left_out": list(self.left_out)}
        return plain | lists | {"chosen": place, "pareto": pareto}

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draws score over the target, with the Pareto front and the budget, into an image file.

        Args:
            path: where to write; the suffix decides the format (``.png``, ``.svg``, ``.pdf``).

        Raises:
            ImportError: where matplotlib is absent.
        """
        drawn = figure(7, 4.5)
        _draw(drawn.add_subplot(), self)
        save(drawn, path)

    def _page(self, style: Style) -> str:
        head = f"{self.device}; jax {self.jax_version}; {self.date}; {self.seconds:.0f} s"
        return "\n\n".join(filter(None, (head, self._table(style), self._caption(), self._left())))

    def _table(self, style: Style) -> str:
        front = self.pareto
        columns = ("candidate", "engine", "score", "drop", "MACs", "parameters", "bytes", "ms",
                   "ratio", "25%", "75%", "")  # fmt: skip
        rows = [
            (one.name, one.engine, one.score, _rounded(one.drop), one.macs, one.parameters,
             one.bytes, one.ms, one.ratio, one.low, one.high, self._mark(one, front))
            for one in self.candidates
        ]  # fmt: skip
        return table(columns, rows, style)

    def _mark(self, one: Candidate, front: Sequence[Candidate]) -> str:
        if one is self.chosen:
            return "chosen"
        return "Pareto" if one in front else ""

    def _caption(self) -> str:
        return (
            f"target: {self.target}, score at most {self.max_drop:g} below {self.original:.4g}; "
            "score, drop: of evaluate; ratio: time per call over the autotuned original's in the "
            "same round, below 1 is faster; 25%, 75%: quartiles."
            + " Interrupted: the best so far."
            * self.interrupted
        )

    def _left(self) -> str:
        return "\n".join(f"left out: {one}" for one in self.left_out)


_NUMBERS = ("name", "engine", "score", "drop", "macs", "parameters", "bytes", "ms", "ratio", "low",
            "high")  # fmt: skip
_PLAIN = ("target", "max_drop", "original", "device", "jax_version", "date", "seconds",
          "interrupted")  # fmt: skip


def _rounded(drop: float) -> float:
    return round(drop, 6) + 0.0  # no -0


def _draw(axes: Any, report: Report) -> None:
    cost = lambda one: one.cost(report.target)
    shown = [one for one in report.candidates if cost(one) < float("inf")]
    for engine in dict.fromkeys(one.engine for one in shown):
        own = [one for one in shown if one.engine == engine]
        axes.scatter([*map(cost, own)], [one.score for one in own], label=engine, zorder=3)
    front = [one for one in report.pareto if one in shown]
    axes.plot([*map(cost, front)], [one.score for one in front], color="0.7", label="Pareto front")
    limit = report.original - report.max_drop
    axes.axhline(limit, color="tab:red", linewidth=1, linestyle="--", label="budget")
    if report.chosen in shown:
        axes.annotate(
            f"chosen: {report.chosen.name}",
            (cost(report.chosen), report.chosen.score),
            xytext=(0, 9),
            textcoords="offset points",
            ha="center",
            fontsize="small",
            parse_math=False,
        )
    axes.margins(0.12)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    axes.set_xlabel(_LABEL[report.target])
    axes.set_ylabel("score on validation")
    head = f"{report.device}; jax {report.jax_version}; {report.date}"
    axes.set_title(textwrap.fill(head, 70), fontsize="small", parse_math=False)
