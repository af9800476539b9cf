"""What `jx.autotune` chose, and what it gained."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from jaxaccel._forms import XLA, Op
from jaxaccel._table import table


class Row(NamedTuple):
    """One call: its form, and the seconds of every form that was timed."""

    op: Op
    form: str
    seconds: Mapping[str, float]
    dropped: Mapping[str, str]  # forms that failed or differ, and why

    @property
    def gain(self) -> float | None:
        """Time of XLA's own form over the chosen one's; None where nothing was timed."""
        if self.form not in self.seconds or XLA not in self.seconds:
            return None
        return self.seconds[XLA] / self.seconds[self.form]


class Whole(NamedTuple):
    """Seconds of the function as given and tuned; None where it could not be timed."""

    plain: float | None
    tuned: float | None
    dropped: Mapping[str, str]

    @property
    def taken(self) -> bool:
        """Whether the tuned function is what runs."""
        return self.plain is not None and self.tuned is not None and self.tuned < self.plain


@dataclass(frozen=True)
class Report:
    """The calls that were lowered so far. `whole` is None where only single calls were timed."""

    rows: tuple[Row, ...]
    whole: Whole | None

    def __str__(self) -> str:
        lines = [_line(row) for row in sorted(self.rows, key=_saved, reverse=True)]
        columns = ("form", "XLA, ms", "form, ms", "times as fast", "operation", "operands")
        parts = [table(columns, lines)]
        parts += [
            f"{name}: not taken, {why} ({operation(row.op)} of {operands(row.op)})"
            for row in self.rows
            for name, why in row.dropped.items()
        ]
        return "\n".join([*parts, *([_verdict(self.whole)] if self.whole else [])])

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        rows = [
            {"op": row.op.key, "gain": row.gain}
            | {"form": row.form, "seconds": dict(row.seconds), "dropped": dict(row.dropped)}
            for row in self.rows
        ]
        return {"rows": rows, "whole": self.whole and self.whole._asdict()}


def _saved(row: Row) -> float:
    return 0 if row.gain is None else row.seconds[XLA] - row.seconds[row.form]


def _line(row: Row) -> tuple[str, ...]:
    ms = lambda name: f"{1e3 * row.seconds[name]:.3f}" if name in row.seconds else "-"
    gain = "-" if row.gain is None else f"{row.gain:.2f}"
    return row.form, ms(XLA), ms(row.form), gain, operation(row.op), operands(row.op)


def operation(op: Op) -> str:
    if op.name != "conv_general_dilated":
        return op.name
    strides = "x".join(map(str, op.params["window_strides"]))
    more = [f"stride {strides}"]
    for key, word in (("lhs_dilation", "spread"), ("rhs_dilation", "dilated")):
        if any(d > 1 for d in op.params[key]):
            more.append(f"{word} {'x'.join(map(str, op.params[key]))}")
    for key, word in (("feature_group_count", "groups"), ("batch_group_count", "batch groups")):
        if op.params[key] > 1:
            more.append(f"{op.params[key]} {word}")
    return f"convolution, {', '.join(more)}"


def operands(op: Op) -> str:
    dtypes = {str(d) for d in op.dtypes}
    shapes = ", ".join("x".join(map(str, shape)) for shape in op.shapes)
    return f"{shapes} {'/'.join(sorted(dtypes))}"


def _verdict(whole: Whole) -> str:
    if whole.plain is None or whole.tuned is None:
        return f"the whole function is left as it is: {'; '.join(whole.dropped.values())}"
    left = "" if whole.taken else "; it is left as it is"
    ratio = whole.plain / whole.tuned
    return (
        f"the whole function: {1e3 * whole.plain:.3f} ms as given, {1e3 * whole.tuned:.3f} ms "
        f"tuned, {ratio:.2f} times as fast{left}"
    )
