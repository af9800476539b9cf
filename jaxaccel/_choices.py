"""Which form is fastest for which call on this machine: timed once, kept on disk."""

import contextlib
import hashlib
import json
import os
import platform
import tempfile
import warnings
from collections.abc import Mapping
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

_FORMAT = 1
_FORMS = Path(__file__).parent / "_forms"


def default_folder() -> Path:
    """``$JAXACCEL_CACHE``, else ``jaxaccel`` in the user's folder for caches."""
    given = os.environ.get("JAXACCEL_CACHE")
    if given:
        return Path(given)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "jaxaccel"


@lru_cache
def environment() -> dict[str, Any]:
    """What a timing depends on besides the call itself."""
    device = jax.devices()[0]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "format": _FORMAT,
        "jaxaccel": version("jaxaccel"),
        "forms": digest([path.read_text() for path in sorted(_FORMS.glob("*.py"))]),
        "jax": jax.__version__,
        "jaxlib": version("jaxlib"),
        "platform": device.platform,
        "device": device.device_kind,
        "processor": _processor(),
        "cores": cores,
        "settings": {name: os.environ.get(name, "") for name in ("XLA_FLAGS", "GLIBC_TUNABLES")},
    }


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def digest(*parts: Any) -> str:
    """Twelve hexadecimal digits."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]


class Choices:
    """Rows under text keys, in one file for each environment.

    Several processes may write: a file is replaced whole, with what it held and what is new. A
    file that cannot be read counts as empty; one that cannot be written is left, with a warning.
    """

    def __init__(self, folder: str | os.PathLike | None = None) -> None:
        self._folder = None if folder is None else Path(folder)
        self._rows: dict[str, dict[str, Any]] | None = None
        self._saved = True

    @property
    def path(self) -> Path:
        """The file."""
        folder = default_folder() if self._folder is None else self._folder
        return folder / f"autotune-{digest(environment())}.json"

    def get(self, key: str) -> dict[str, Any] | None:
        """The row, if there is one."""
        if self._rows is None:
            self._rows = self._read()
        return self._rows.get(key)

    def set(self, key: str, row: Mapping[str, Any]) -> None:
        """Keeps it in memory; `save` writes."""
        self.get(key)
        assert self._rows is not None
        self._rows[key], self._saved = dict(row), False

    def save(self) -> None:
        """Writes all rows, and those that others wrote meanwhile, if any is new."""
        if self._saved:
            return
        self._saved = True
        rows = self._read() | (self._rows or {})
        text = json.dumps({"environment": environment(), "rows": rows}, indent=1)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=self.path.parent, suffix=".partial")
            try:
                with os.fdopen(handle, "w") as file:
                    file.write(text + "\n")
                Path(name).replace(self.path)
            except OSError:
                Path(name).unlink()
                raise
        except OSError as error:
            warnings.warn(
                f"autotune: {self.path} cannot be written ({error.strerror}); what was timed is "
                "lost with this process. Set JAXACCEL_CACHE to a folder that can be written",
                stacklevel=2,
            )

    def _read(self) -> dict[str, dict[str, Any]]:
        try:
            found = json.loads(self.path.read_text())
            if found["environment"] != environment():
                return {}
            return {k: row for k, row in found["rows"].items() if isinstance(row, dict)}
        except (FileNotFoundError, NotADirectoryError):
            return {}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            warnings.warn(
                f"autotune: {self.path} cannot be read ({error}); it is timed anew", stacklevel=2
            )
            return {}
