"""What runs on integers, and what does not and why."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from jaxaccel._table import table
from jaxaccel.quantize._arithmetic import Grid
from jaxaccel.quantize._layers import Layer, Left
from jaxaccel.quantize._plan import Plan
from jaxaccel.quantize._program import Product


class Row(NamedTuple):
    """A convolution or dot product on integers: what it reads and in what form it leaves.

    Attributes:
        where: the path of its kernel; without one, the name of the primitive and a number.
        source: the line that made it.
        data: the grid of what it reads; None where it is taken from each batch.
        result: the grid of what leaves, None where that is a real number.
    """

    where: str
    source: str
    data: Grid | None
    result: Grid | None


class Report(NamedTuple):
    """What `int8` did; printed, a table with a row for each convolution and dot product.

    Attributes:
        rows: what runs on integers.
        left: what stays in floating point.
        seconds: of the whole call, where ``mode="fastest"`` timed it.
    """

    rows: tuple[Row, ...]
    left: tuple[Left, ...]
    seconds: Mapping[str, float] = MappingProxyType({})

    def __str__(self) -> str:
        """A table, and the numbers below it."""
        rows = [("int8", r.where, _grid(r.data), _grid(r.result)) for r in self.rows]
        rows += [("float", one.where, _because(one), "") for one in self.left]
        counts = f"{len(self.rows)} on integers, {len(self.left)} left in floating point"
        if self.seconds:
            times = (f"{1e3 * s:.3g} ms {name}" for name, s in self.seconds.items())
            counts += f"; a call takes {', '.join(times)}"
        return f"{table(('', 'where', 'reads', 'gives'), rows)}\n{counts}" if rows else counts

    def to_dict(self) -> dict[str, Any]:
        """For JSON: the grids of what runs on integers, and why the rest does not."""
        grid = lambda one: None if one is None else one._asdict()
        layers = [{"where": r.where, "reads": grid(r.data), "gives": grid(r.result)}
                  for r in self.rows]  # fmt: skip
        left = [{"where": one.where, "reason": one.reason} for one in self.left]
        return {"layers": layers, "left": left}


def report(made: Plan, grids: Sequence[Grid]) -> Report:
    """The report of a plan."""
    rows, left = [], []
    for program in made.program.all:
        of = {value: grids[number] for value, number in program.integers.items()}
        left += program.left
        for step in program.steps.values():
            if isinstance(step, Layer):
                path = "/".join(program.view.leaves[step.kernel.leaf])
                data, end = step.contraction.data, step.tail.end
                rows.append(Row(path, step.contraction.node.source, of.get(data), of.get(end)))
            elif isinstance(step, Product):
                data = of.get(step.operands[0])
                rows.append(Row(step.name, step.node.source, data, None))
    return Report(tuple(rows), tuple(left))


def _because(one: Left) -> str:
    return f"{one.reason} ({one.source})" if one.source else one.reason


def _grid(one: Grid | None) -> str:
    if one is None:
        return "real"
    return f"{one.scale:.3g} * (q {'-' if one.zero_point > 0 else '+'} {abs(one.zero_point)})"
