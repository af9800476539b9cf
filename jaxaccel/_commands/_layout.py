"""How the commands write: aligned text, sizes, what a terminal can show. Needs no JAX."""

import argparse
import json
import shutil
import sys
import textwrap
from collections.abc import Sequence
from typing import Any, NoReturn, TextIO

INDENT = 2
_WIDEST = 100
_LEAST = 30  # of the last column, however narrow the terminal


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Exits with status 2."""
        self.exit(2, f"{self.prog}: error: {printable(message)} (--help lists the options)\n")


def printable(text: str) -> str:
    """What a terminal would obey is written out: names come from files that others made."""
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


def show(text: str) -> None:
    """Prints, whatever the terminal's encoding."""
    print(_encodable(text, sys.stdout))


def show_json(content: Any) -> None:
    """Prints plain data."""
    print(json.dumps(content, indent=2, allow_nan=False))


def complain(command: str, message: object) -> None:
    """One line for what went wrong."""
    line = f"python -m jaxaccel {command}: {' '.join(str(message).split())}"
    print(_encodable(line, sys.stderr), file=sys.stderr)


def _encodable(text: str, stream: TextIO) -> str:
    encoding = stream.encoding or "utf-8"
    return printable(text).encode(encoding, "backslashreplace").decode(encoding)


def width() -> int:
    """Columns to write in."""
    return min(_WIDEST, shutil.get_terminal_size((_WIDEST, 24)).columns)


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Columns two spaces apart; the last one goes on below itself.

    >>> print(aligned([("jax", "0.10.2", "tested"), ("optax", "0.2.8", "")]))
    jax    0.10.2  tested
    optax  0.2.8
    """
    widths = [max(map(len, column)) for column in zip(*(row[:-1] for row in rows), strict=True)]
    left = sum(widths) + 2 * len(widths)
    lines = []
    for *head, last in rows:
        start = "".join(f"{cell:<{size}}  " for cell, size in zip(head, widths, strict=True))
        first, *others = wrapped(last, left + INDENT)
        lines += [(start + first).rstrip(), *(" " * left + other for other in others)]
    return "\n".join(lines)


def wrapped(text: str, left: int) -> list[str]:
    """Lines that fit beside `left` columns; words stay whole, to be copied."""
    fill = max(_LEAST, width() - left)
    return textwrap.wrap(text, fill, break_long_words=False, break_on_hyphens=False) or [""]


def section(title: str, *parts: str) -> str:
    """A heading, and what stands below it."""
    return "\n".join([title, textwrap.indent("\n\n".join(filter(None, parts)), " " * INDENT)])


def size(count: float) -> str:
    """Bytes for people.

    >>> size(512), size(7593), size(25_000_000_000)
    ('512 B', '7.4 KiB', '23.3 GiB')
    """
    units = ["TiB", "GiB", "MiB", "KiB"]
    if count < 1024:
        return f"{count:,.0f} B"
    while (count := count / 1024) >= 1024 and len(units) > 1:
        units.pop()
    return f"{count:,.1f} {units[-1]}"


def counted(count: int, noun: str) -> str:
    """With its plural.

    >>> counted(1, "layer"), counted(1200, "array"), counted(2, "entry")
    ('1 layer', '1,200 arrays', '2 entries')
    """
    plural = noun[:-1] + "ies" if noun.endswith("ry") else noun + "s"
    return f"{count:,} {noun if count == 1 else plural}"


def first_line(error: BaseException) -> str:
    """What an exception says, or what it is."""
    text = str(error).strip().partition("\n")[0][:300]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
