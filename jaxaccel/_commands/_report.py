"""``python -m jaxaccel report``: what is in an artefact. Runs nothing of it, unless it is timed."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import jax
import numpy as np

from jaxaccel._commands import _leaves, _steps
from jaxaccel._commands._layout import (
    aligned,
    complain,
    counted,
    first_line,
    section,
    show,
    show_json,
    size,
    wrapped,
)
from jaxaccel._table import table
from jaxaccel._timing import synthetic
from jaxaccel.export._files import MANIFEST, Stored, opened
from jaxaccel.export._load import load
from jaxaccel.export._manifest import FILES, FORMAT, VERSION, Aval, Manifest
from jaxaccel.export._tree import build
from jaxaccel.measure import compare


@dataclass(frozen=True)
class Part:
    """One of its files, and why it is not what the manifest says, if it is not.

    The manifest itself has its hash inside, and was checked when it was read.
    """

    name: str
    bytes: int
    sha256: str | None = None
    error: str | None = None


@dataclass(frozen=True)
class Artefact:
    """What was read of it; the date is that of its files."""

    path: str
    kind: str
    date: str
    bytes: int
    manifest: Manifest
    parts: tuple[Part, ...]

    @property
    def damage(self) -> str | None:
        """What is wrong with it."""
        return next((part.error for part in self.parts if part.error), None)


@dataclass(frozen=True)
class Latency:
    """Milliseconds of a call: median and quartiles of so many rounds."""

    batch: int | None
    median_ms: float
    low_ms: float
    high_ms: float
    rounds: int
    device: str


def report(path: str, *, as_json: bool, every: bool, batches: Sequence[int]) -> int:
    """Prints it; returns the status of the process.

    Args:
        path: the folder or the zip.
        as_json: as JSON instead of text.
        every: a row for each parameter, however many.
        batches: sizes to time it at; none: nothing of it is run.
    """
    try:
        found = read(Path(path))
    except OSError as error:
        complain("report", f"{path}: {error.strerror}" if error.strerror else error)
        return 2
    except ValueError as error:
        complain("report", error)
        return 1
    failed, latencies = found.damage, []
    if failed is None and batches:
        try:
            latencies = timed(found, batches)
        except Exception as error:  # whatever the program does when it runs
            failed = f"{path}: cannot be timed: {first_line(error)}"
    if as_json:
        show_json(content(found, latencies))
    else:
        show(page(found, every, latencies))
    if failed is not None:
        complain("report", failed)
    return int(failed is not None)


def read(path: Path) -> Artefact:
    """The manifest, and whether the other files are what it says.

    Raises:
        OSError: there is nothing at `path`, or nothing that can be read.
        ValueError: it is no artefact, or its manifest or its zip is damaged.
    """
    with opened(path) as stored:
        parts = (Part(MANIFEST, _manifest_bytes(path)), *(_part(stored, part) for part in FILES))
        folder = path.is_dir()
        about = (path / MANIFEST if folder else path).stat()
        whole = sum(part.bytes for part in parts) if folder else about.st_size
        day = date.fromtimestamp(about.st_mtime).isoformat()
        kind = "folder" if folder else "zip"
        return Artefact(str(path), kind, day, whole, stored.manifest, parts)


def _manifest_bytes(path: Path) -> int:
    if path.is_dir():
        return (path / MANIFEST).stat().st_size
    with ZipFile(path) as archive:
        return archive.getinfo(MANIFEST).file_size


def _part(stored: Stored, part: str) -> Part:
    file, error = stored.manifest.files[part], None
    try:
        stored.read(part)
    except (OSError, ValueError) as found:
        error = str(found)
    return Part(stored.manifest.name(part), file.bytes, file.sha256, error)


def timed(found: Artefact, batches: Sequence[int]) -> list[Latency]:
    """Loads it, and times it on numbers of the right shapes.

    Raises:
        ValueError: it takes other sizes than a batch, or what `load` raises.
    """
    fn, params = load(found.path)
    sizes = batches if symbols(found.manifest) else batches[:1]
    return [_latency(fn, params, found.manifest, batch) for batch in dict.fromkeys(sizes)]


def _latency(fn: Any, params: Any, manifest: Manifest, batch: int) -> Latency:
    args = arguments(manifest, batch)
    comparison = compare({"it": (fn, params)}, *args, show=False)
    row = comparison.rows[0]
    known = batch if symbols(manifest) else None
    times = row.median_ms, row.low_ms, row.high_ms
    return Latency(known, *times, comparison.rounds, comparison.device)


def symbols(manifest: Manifest) -> list[str]:
    """The sizes of its arguments that are left open."""
    sizes = [size for aval in manifest.arguments.values() for size in aval.shape]
    return sorted({size for size in sizes if isinstance(size, str)})


def arguments(manifest: Manifest, batch: int) -> tuple[Any, ...]:
    """Random floats, and zeros where integers are asked for.

    Raises:
        ValueError: more is left open than one size.
    """
    open_sizes = symbols(manifest)
    if len(open_sizes) > 1 or not all(name.isidentifier() for name in open_sizes):
        raise ValueError(f"the sizes {', '.join(open_sizes)} are open, not a batch alone")
    shapes = [_sized(aval, batch) for aval in manifest.arguments.values()]
    return build(manifest.inputs, dict(zip(manifest.arguments, synthetic(shapes), strict=True)))


def _sized(aval: Aval, batch: int) -> jax.ShapeDtypeStruct:
    dtype = np.dtype(aval.dtype)
    if jax.dtypes.canonicalize_dtype(dtype) != dtype:
        raise ValueError(f"it takes {dtype}: set JAX_ENABLE_X64=1")
    shape = tuple(batch if isinstance(size, str) else size for size in aval.shape)
    return jax.ShapeDtypeStruct(shape, dtype)


def content(found: Artefact, latencies: Sequence[Latency]) -> dict[str, Any]:
    """For JSON."""
    manifest, arrays = found.manifest, _leaves.leaves(found.manifest)
    return {
        "path": found.path,
        "kind": found.kind,
        "date": found.date,
        "bytes": found.bytes,
        "whole": found.damage is None,
        "format": FORMAT,
        "version": VERSION,
        "function": manifest.function,
        "made_with": manifest.made_with,
        "calling_convention": manifest.calling_convention,
        "platforms": list(manifest.platforms),
        "batch": symbols(manifest),
        "arguments": {name: asdict(aval) for name, aval in manifest.arguments.items()},
        "results": {name: asdict(aval) for name, aval in manifest.results.items()},
        "parameters": {
            "numbers": sum(leaf.numbers for leaf in arrays),
            "bytes": manifest.parameter_bytes,
            "dtypes": {
                name: {"numbers": numbers, "bytes": size}
                for name, (numbers, size) in _leaves.dtypes(arrays).items()
            },
            "arrays": [asdict(leaf) for leaf in arrays],
        },
        "recipe": [asdict(step) for step in _steps.steps(manifest.recipe)],
        "forms": {name: _steps.forms(rows) for name, rows in manifest.forms.items()},
        "files": [asdict(part) for part in found.parts],
        "latencies": [asdict(latency) for latency in latencies],
    }


def page(found: Artefact, every: bool, latencies: Sequence[Latency]) -> str:
    """For a terminal."""
    arrays = _leaves.leaves(found.manifest)
    sections = [
        section("Artefact", aligned(list(_about(found)))),
        section("Signature", _signature(found.manifest)),
        section("Parameters", *_parameters(arrays, every)),
        section("Made by", *_made_by(found.manifest)),
        section("Files", _files(found)),
        section("Latency", "\n".join(_times(latencies))) if latencies else "",
    ]
    return "\n\n".join(filter(None, sections))


def _about(found: Artefact) -> Iterator[tuple[str, str]]:
    manifest = found.manifest
    made_with = ", ".join(f"{name} {version}" for name, version in manifest.made_with.items())
    yield "path", f"{found.path} ({found.kind}, {size(found.bytes)})"
    yield "function", manifest.function
    yield "format", f"{FORMAT}, version {VERSION}"
    yield "made with", made_with
    yield "dated", found.date
    yield "runs on", ", ".join(manifest.platforms)


def _signature(manifest: Manifest) -> str:
    rows = [(name, "argument", str(aval)) for name, aval in manifest.arguments.items()]
    rows += [(name, "result", str(aval)) for name, aval in manifest.results.items()]
    open_sizes = symbols(manifest)
    note = f"for every size of {', '.join(open_sizes)}" if open_sizes else "for these sizes alone"
    return f"{aligned([(kind, name, aval) for name, kind, aval in rows])}\n{note}"


def _parameters(arrays: Sequence[_leaves.Leaf], every: bool) -> Iterator[str]:
    whole = sum(leaf.bytes for leaf in arrays)
    numbers = sum(leaf.numbers for leaf in arrays)
    yield f"{numbers:,} numbers in {counted(len(arrays), 'array')}, {whole:,} bytes ({size(whole)})"
    rows = [
        (name, count, held, f"{held / (whole or 1):.1%}")
        for name, (count, held) in _leaves.dtypes(arrays).items()
    ]
    if rows:
        yield table(("dtype", "numbers", "bytes", "share"), rows)
        yield _leaves.parameters_table(arrays, every)


def _made_by(manifest: Manifest) -> Iterator[str]:
    rows = [
        (f"{place}.", step.transform, step.words)
        for place, step in enumerate(_steps.steps(manifest.recipe), 1)
    ]
    yield aligned(rows) if rows else "no transform of the function is recorded"
    chosen = [(f"forms on {name}", _forms(rows)) for name, rows in manifest.forms.items() if rows]
    if chosen:
        yield aligned(chosen)


def _forms(rows: Sequence[Any]) -> str:
    return ", ".join(f"{count} x {form}" for form, count in _steps.forms(rows).items())


def _files(found: Artefact) -> str:
    rows = [(part.name, part.bytes, _state(part)) for part in found.parts]
    return "\n".join([table(("file", "bytes", ""), rows), *_whole(found)])


def _state(part: Part) -> str:
    if part.error is not None:
        return "DAMAGED"
    return "its own hash holds" if part.sha256 is None else "hash holds"


def _whole(found: Artefact) -> list[str]:
    if found.damage is not None:
        return wrapped(found.damage, 2)
    held = "all hashes hold; they tell of damage, not of who wrote it"
    return [f"{os.path.basename(found.path)}: {held}"]


def _times(latencies: Sequence[Latency]) -> Iterator[str]:
    rows = [(_batch(one), one.median_ms, one.low_ms, one.high_ms) for one in latencies]
    yield table(("batch", "ms", "25%", "75%"), rows)
    yield f"{latencies[0].device}; median of {latencies[0].rounds} rounds, random arguments"


def _batch(one: Latency) -> str:
    return "as saved" if one.batch is None else f"{one.batch:,}"
