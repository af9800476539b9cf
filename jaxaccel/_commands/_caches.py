"""What is kept on disk between runs: JAX's compiled programs, and jx.autotune's times."""

import json
import os
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxaccel._commands._layout import first_line

_ENTRY = "-cache"  # how JAX's names end


@dataclass(frozen=True)
class Compiled:
    """JAX's persistent compilation cache.

    Attributes:
        enabled: by jax_enable_compilation_cache.
        folder: None where none is set: nothing is kept.
        remote: it is a URL, which is not looked into.
        writable: whether entries can be added; None where that is not looked into.
        entries, bytes: of what it holds; None where it cannot be read.
        least_seconds: programs that compile faster are not kept.
    """

    enabled: bool
    folder: str | None
    remote: bool
    writable: bool | None
    entries: int | None
    bytes: int | None
    least_seconds: float

    @property
    def on(self) -> bool:
        """Whether anything is kept."""
        return self.enabled and self.folder is not None


@dataclass(frozen=True)
class Tuned:
    """What jx.autotune timed, for this device and these versions.

    Attributes:
        path: of the file; None where it cannot be told, with the error.
        rows, bytes: of the file; None where it is not there, or damaged.
        others, other_bytes: files for other devices, versions or settings.
        writable: whether the file can be written.
        error: why it cannot be read.
    """

    path: str | None
    rows: int | None
    bytes: int | None
    others: int
    other_bytes: int
    writable: bool
    error: str | None


def compiled() -> Compiled:
    """As JAX is set now."""
    import jax

    config: Any = jax.config
    enabled = bool(config.jax_enable_compilation_cache)
    least = float(config.jax_persistent_cache_min_compile_time_secs)
    folder = config.jax_compilation_cache_dir or None
    remote = folder is not None and re.match(r"\w+://", folder) is not None
    if folder is None or remote:
        return Compiled(enabled, folder, remote, None, None, None, least)
    can, held = writable(Path(folder)), _held(Path(folder), "", _ENTRY)
    entries, size = (None, None) if held is None else held
    return Compiled(enabled, folder, remote, can, entries, size, least)


def tuned() -> Tuned:
    """As `jaxaccel.autotune` would find it; reads the file of this environment alone."""
    from jaxaccel._choices import Choices

    try:
        path = Choices().path
    except Exception as error:  # a package without its metadata or its own files
        return Tuned(None, None, None, 0, 0, False, first_line(error))
    rows, size, error = _read(path)
    held = _held(path.parent, "autotune-", ".json") or (0, 0)
    mine = os.path.exists(path)
    others, other_bytes = max(0, held[0] - mine), max(0, held[1] - (size or 0))
    return Tuned(str(path), rows, size, others, other_bytes, writable(path.parent), error)


def _read(path: Path) -> tuple[int | None, int | None, str | None]:
    """Rows, bytes, and what is wrong with them."""
    try:
        content = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None, None, None
    except OSError as error:
        return None, None, first_line(error)
    try:
        return len(dict(json.loads(content)["rows"])), len(content), None
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        return None, len(content), first_line(error)


def writable(folder: Path) -> bool:
    """Whether files can be made there, or it with the folders above it."""
    while not os.path.lexists(folder) and folder != folder.parent:
        folder = folder.parent
    try:
        with tempfile.TemporaryFile(dir=folder):  # what the system allows is not always so
            return True
    except OSError:
        return False


def _held(folder: Path, start: str, end: str) -> tuple[int, int] | None:
    """Files with such names and their bytes; None where the folder cannot be read."""
    try:
        with os.scandir(folder) as entries:
            found = [
                one for one in entries if one.name.startswith(start) and one.name.endswith(end)
            ]
            return len(found), sum(one.stat().st_size for one in found)
    except FileNotFoundError:
        return 0, 0
    except OSError:
        return None
