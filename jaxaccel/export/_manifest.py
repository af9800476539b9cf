"""What an artefact holds, as JSON that is checked as a whole before anything else is read."""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from hashlib import sha256
from typing import Any

import jax
import numpy as np

from jaxaccel.export._tree import Description, check, implementations

FORMAT, VERSION = "jaxaccel.export", 1
FILES = {"function": "stablehlo", "parameters": "safetensors"}
LONGEST = 1 << 24  # bytes of a manifest
_MALFORMED = KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError
_HASH = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True)
class File:
    """One file: its length in bytes, and its SHA-256 as 64 hexadecimal digits."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Aval:
    """An array's dtype by name, and its sizes: numbers, or expressions of the batch size."""

    dtype: str
    shape: tuple[int | str, ...]

    @classmethod
    def of(cls, x: Any) -> "Aval":
        """Of an array, or of a shape that may have symbols."""
        sizes = tuple(size if type(size) is int else str(size) for size in x.shape)
        return cls(np.dtype(x.dtype).name, sizes)

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"

    def fits(self, found: "Aval") -> bool:
        """Whether another one is so; an expression may be of any size."""
        same = len(found.shape) == len(self.shape) and all(
            type(size) is str or size == got
            for got, size in zip(found.shape, self.shape, strict=True)
        )
        return same and found.dtype == self.dtype

    def check(self, name: str, x: Any) -> None:
        """Raises a ValueError where an array is not so."""
        found = Aval.of(jax.typeof(x))
        if not self.fits(found):
            raise ValueError(f"{name}: {found}, expected {self}")


@dataclass(frozen=True)
class Manifest:
    """What an artefact holds, and how it was made.

    Attributes:
        function: the name of the function that was saved.
        made_with: versions, by package.
        calling_convention: of `jax.export`.
        platforms: that it can run on, by JAX's names.
        params, inputs, outputs: how the trees are made of the arrays.
        arrays: of the parameters, by name.
        arguments, results: the flat inputs and outputs.
        recipe: the transforms that made the function.
        forms: by platform, which form each autotuned operation has.
        files: by their part in the artefact.
    """

    function: str
    made_with: dict[str, str]
    calling_convention: int
    platforms: tuple[str, ...]
    params: Description
    inputs: Description
    outputs: Description
    arrays: dict[str, Aval]
    arguments: dict[str, Aval]
    results: dict[str, Aval]
    recipe: list[dict[str, Any]]
    forms: dict[str, list[dict[str, Any]]]
    files: dict[str, File]

    def name(self, part: str) -> str:
        """The name of a file."""
        return file_name(part, self.files[part].sha256)

    @property
    def parameter_bytes(self) -> int:
        """What the arrays take in memory."""
        return sum(map(size_of, self.arrays.values()))

    def text(self) -> str:
        """The manifest with the hash of its text."""
        content = {"format": FORMAT, "version": VERSION, **asdict(self)}
        return _lines(content | {"sha256": _digest(content)})


def file_name(part: str, digest: str) -> str:
    """``parameters-0123456789abcdef.safetensors``: never that of other content."""
    return f"{part}-{digest[:16]}.{FILES[part]}"


def is_file_name(name: str) -> bool:
    """Whether an artefact may have a file of this name."""
    return any(re.fullmatch(rf"{part}-[0-9a-f]{{16}}\.{end}", name) for part, end in FILES.items())


def size_of(aval: Aval) -> int:
    """In bytes."""
    return math.prod(map(int, aval.shape)) * np.dtype(aval.dtype).itemsize


def parse(text: str, where: str) -> Manifest:
    """The manifest, checked.

    Raises:
        ValueError: it is damaged, or of a format that is not known; the message begins with
            `where`.
    """
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not a manifest: {error}") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"{where}: not a manifest: it has no format {FORMAT!r}")
    if content.get("version") != VERSION:
        versions = content.get("made_with")
        maker = versions.get("jaxaccel") if isinstance(versions, dict) else None
        raise ValueError(
            f"{where}: version {content.get('version')!r} of the format, made with jaxaccel "
            f"{maker}; this one reads version {VERSION}: install that version"
        )
    if not _is_whole(content, text):
        raise ValueError(
            f"{where}: damaged: its text is not that of its hash; copy or save it anew"
        )
    try:
        return _manifest(content)
    except _MALFORMED as error:
        raise ValueError(f"{where}: damaged: {type(error).__name__}: {error}") from None


def _is_whole(content: dict[str, Any], text: str) -> bool:
    """Whether it is as it was written; takes the hash out of it."""
    given = content.pop("sha256", None)
    try:
        return given == _digest(content) and text == _lines(content | {"sha256": given})
    except _MALFORMED:
        return False


def _lines(content: Mapping[str, Any]) -> str:
    rows = (f"{json.dumps(key)}: {json.dumps(content[key], allow_nan=False)}" for key in content)
    return "{\n" + ",\n".join(rows) + "\n}\n"


def _digest(content: Mapping[str, Any]) -> str:
    return sha256(_lines(content).encode()).hexdigest()


def _manifest(content: dict[str, Any]) -> Manifest:
    files = {part: _file(**content["files"][part]) for part in FILES}
    tables = {name: {k: _aval(**aval) for k, aval in content[name].items()}
              for name in ("arrays", "arguments", "results")}  # fmt: skip
    trees = {"params": "arrays", "inputs": "arguments", "outputs": "results"}
    for tree, table in trees.items():
        check(content[tree])
        if implementations(content[tree]).keys() != tables[table].keys():
            raise ValueError(f"the names in {tree!r} are not those in {table!r}")
    for name, aval in tables["arrays"].items():
        if not all(isinstance(size, int) for size in aval.shape):
            raise ValueError(f"{name}: a parameter of shape {list(aval.shape)}")
    found = Manifest(
        _text(content["function"]),
        {_text(name): _text(version) for name, version in content["made_with"].items()},
        _count(content["calling_convention"]),
        tuple(map(_text, content["platforms"])),
        content["params"],
        content["inputs"],
        content["outputs"],
        **tables,
        recipe=list(map(dict, content["recipe"])),
        forms={_text(platform): list(rows) for platform, rows in content["forms"].items()},
        files=files,
    )
    if found.parameter_bytes > files["parameters"].bytes:
        raise ValueError(
            f"arrays of {found.parameter_bytes:,} bytes in a file of {files['parameters'].bytes:,}"
        )
    return found


def _file(bytes: Any, sha256: Any) -> File:
    if not _HASH.fullmatch(_text(sha256)):
        raise ValueError(f"{sha256!r} is not a SHA-256")
    return File(_count(bytes), sha256)


def _aval(dtype: Any, shape: Any) -> Aval:
    sizes = [size if type(size) is str else _count(size) for size in shape]
    return Aval(np.dtype(_text(dtype)).name, tuple(sizes))


def _text(value: Any) -> str:
    if type(value) is not str:
        raise ValueError(f"{value!r} is not a text")
    return value


def _count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} is not a count")
    return value
