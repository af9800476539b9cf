"""XLA's program text (HLO) as data: computations of instructions.

Only what counting needs is kept: names, types, operands, and which computations an instruction
calls. What cannot be read raises with the line; nothing is passed over.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

_CALLEES = re.compile(
    r"\b(?:calls|to_apply|body|condition|true_computation|false_computation|"
    r"branch_computations|called_computations)=(\{[^}]*\}|%?[\w.-]+)"
)
_NAME = re.compile(r"%?([\w.$-]+)$")
# Attributes behind these hold free text.
_FREE_TEXT = re.compile(r", (?:metadata|backend_config|frontend_attributes)=")


class Instruction(NamedTuple):
    """``name = type opcode(operands), attributes``."""

    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str

    @property
    def bytes(self) -> int:
        """Those of the result, of all of its parts where it is a tuple."""
        return sum(map(_array_bytes, re.findall(r"\b([a-z]\w*)\[([^\]]*)\]", self.type)))

    @property
    def callees(self) -> list[str]:
        """Names of the computations that it calls, in the order written."""
        written = _FREE_TEXT.split(self.attributes, maxsplit=1)[0]
        groups = [found.strip("{}").split(",") for found in _CALLEES.findall(written)]
        return [name.strip().lstrip("%") for group in groups for name in group if name.strip()]

    def attribute(self, pattern: str) -> str:
        """The first match of a pattern's group in the attributes, or an empty text."""
        found = re.search(pattern, self.attributes)
        return found[1] if found else ""


class Computation(NamedTuple):
    """Instructions by name, operands before their uses, and which of them is the result."""

    instructions: Mapping[str, Instruction]
    root: str


class Module(NamedTuple):
    """A program: its computations by name, and the one that runs."""

    computations: Mapping[str, Computation]
    entry: str


def parse(text: str) -> Module:
    """Reads what ``as_text`` of a lowered (``dialect="hlo"``) or compiled function prints.

    Raises:
        ValueError: with the line that cannot be read, or where there is no entry computation.
    """
    computations: dict[str, Computation] = {}
    entry = ""
    for header, lines in _blocks(text):
        is_entry, name = _header(header)
        computations[name] = _computation(name, lines)
        entry = name if is_entry else entry
    if not entry:
        raise ValueError("HLO: no ENTRY computation in the text; give the text of a whole module")
    return Module(computations, entry)


def _blocks(text: str) -> Iterator[tuple[str, list[str]]]:
    """A computation's first line, and those between its braces."""
    header, lines = "", []
    for line in text.splitlines():
        if not header:
            # Lists of files and stack frames stand between computations; none ends in a brace.
            header, lines = (line, []) if line.endswith("{") else ("", [])
        elif line.startswith("}"):
            yield header, lines
            header = ""
        elif line.strip():
            lines.append(line)
    if header:
        raise ValueError(f"HLO: the text ends inside of the computation {header.strip()!r}")


def _header(line: str) -> tuple[bool, str]:
    found = re.match(r"(ENTRY )?%?([\w.$-]+) (?:\(.*)?\{$", line)
    if not found:
        raise ValueError(f"HLO: cannot read the head of a computation: {line.strip()!r}")
    return bool(found[1]), found[2]


def _computation(name: str, lines: Sequence[str]) -> Computation:
    instructions: dict[str, Instruction] = {}
    root = ""
    for line in lines:
        instruction = _instruction(line)
        if not instructions.keys() >= set(instruction.operands):
            raise ValueError(f"HLO: an operand is not defined above of {line.strip()!r}")
        instructions[instruction.name] = instruction
        root = instruction.name if line.lstrip().startswith("ROOT ") else root
    if not root:
        raise ValueError(f"HLO: the computation {name!r} has no ROOT instruction")
    return Computation(instructions, root)


def _instruction(line: str) -> Instruction:
    """One line: ``ROOT %add.1 = f32[8]{0} add(%x, %y), metadata={...}``."""
    name, equals, right = line.removeprefix("  ").partition(" = ")
    found = _NAME.match(name.strip().removeprefix("ROOT "))
    after = _type_end(right)
    opcode = re.compile(r" ([\w-]+)\(").match(right, after)
    if not (equals and found and opcode):
        raise ValueError(f"HLO: cannot read the instruction {line.strip()!r}")
    end = _closing(right, opcode.end() - 1)
    operands = _operands(opcode[1], right[opcode.end() : end])
    return Instruction(found[1], right[:after], opcode[1], operands, right[end + 1 :])


def _type_end(text: str) -> int:
    """Where a type ends: a tuple's has blanks, a single array's none."""
    end = _closing(text, 0) + 1 if text.startswith("(") else text.find(" ")
    return end if end > 0 else len(text)


def _closing(text: str, start: int) -> int:
    """The place of the bracket that closes the one at `start`; quoted text does not count."""
    depth = 0
    for found in re.compile(r'"(?:\\.|[^"\\])*"|[()]').finditer(text, start):
        depth += {"(": 1, ")": -1}.get(found[0], 0)
        if depth == 0:
            return found.start()
    raise ValueError(f"HLO: a bracket is not closed in {text.strip()!r}")


def _operands(opcode: str, text: str) -> tuple[str, ...]:
    """Names; an operand may be written with its type before it."""
    if opcode in ("constant", "parameter"):  # a literal, a number
        return ()
    # Commas of comments, layouts, shapes and tuple types are not between operands.
    text = re.sub(r"/\*.*?\*/|\{[^}]*\}|\[[^\]]*\]", "", text)
    text = re.sub(r"\([^()]*\)", "", text)
    found = [_NAME.search(part.strip()) for part in text.split(",") if part.strip()]
    if None in found:
        raise ValueError(f"HLO: cannot read the operands {text!r} of {opcode!r}")
    return tuple(name[1] for name in found if name)


def _array_bytes(found: tuple[str, str]) -> int:
    """Of an element type and its sizes, as in ``("f32", "8,<=4")``; packed below a byte."""
    kind, sizes = found
    elements = math.prod(int(size) for size in re.findall(r"\d+", sizes))
    return -(-elements * _bits(kind) // 8)


def _bits(kind: str) -> int:
    if kind == "pred":
        return 8
    width = re.match(r"[a-z]+(\d+)", kind)  # token[] and opaque[] hold nothing
    return int(width[1]) if width else 0
