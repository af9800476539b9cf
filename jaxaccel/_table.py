"""Plain-text and Markdown tables."""

import re
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Literal, TypeGuard

import jax
import numpy as np

Style = Literal["text", "markdown"]


def table(columns: Sequence[str], rows: Sequence[Sequence[object]], style: Style = "text") -> str:
    """Renders rows as a table: None reads "not measured", numbers stand on the right.

    Args:
        columns: the heading of each column.
        rows: one cell for each column; a float is shown with 4 significant digits. A column
            is right-aligned where every cell is a number or text that begins with one.
        style: ``"text"`` for a terminal, ``"markdown"`` for a page.

    Raises:
        ValueError: for an unknown style, or a row of another length.

    >>> print(table(("model", "bytes", "ms"), [("float32", 1234567, 1.5), ("int8", 308642, None)]))
    model        bytes            ms
    --------------------------------
    float32  1,234,567           1.5
    int8       308,642  not measured
    """
    if style not in ("text", "markdown"):
        raise ValueError(f"style: {style!r}; give 'text' or 'markdown'")
    for place, row in enumerate(rows):
        if len(row) != len(columns):
            raise ValueError(f"rows[{place}]: {len(row)} cells for {len(columns)} columns")
    values = [[_plain(value) for value in row] for row in rows]
    right = [all(map(_numeric, column)) for column in zip(*values, strict=True)]
    render = _text if style == "text" else _markdown
    return render(
        [[_cell(value) for value in line] for line in (columns, *values)],
        right or [False] * len(columns),
    )


def _plain(value: object) -> object:
    """The Python number of a NumPy or JAX scalar; anything else as it is."""
    return value.item() if isinstance(value, np.generic | np.ndarray | jax.Array) else value


def _is_number(value: object) -> TypeGuard[Real]:
    return isinstance(value, Real) and not isinstance(value, bool)


def _numeric(value: object) -> bool:
    if isinstance(value, str):
        return re.match(r"[-+±]?\.?\d", value) is not None
    return value is None or _is_number(value)


def _cell(value: object) -> str:
    if value is None:
        return "not measured"
    if not _is_number(value):
        return " ".join(str(value).splitlines())
    if isinstance(value, Integral) or 1000 <= abs(float(value)) < 1e15:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def _text(lines: list[list[str]], right: list[bool]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = [
        "  ".join(
            cell.rjust(width) if on_right else cell.ljust(width)
            for cell, width, on_right in zip(line, widths, right, strict=True)
        ).rstrip()
        for line in lines
    ]
    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
    return "\n".join([padded[0], rule, *padded[1:]])


def _markdown(lines: list[list[str]], right: list[bool]) -> str:
    # A backslash of the cell's own would else take the escape off a bar behind it.
    safe = [[re.sub(r"([\\|])", r"\\\1", cell) for cell in line] for line in lines]
    rule = ["---:" if on_right else "---" for on_right in right]
    return "\n".join("| " + " | ".join(line) + " |" for line in [safe[0], rule, *safe[1:]])
