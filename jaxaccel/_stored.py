"""What users save as JSON: written whole or not at all, read with a look at its kind."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def write(path: Path, content: Mapping[str, Any]) -> None:
    """Writes the whole file or nothing."""
    part = path.with_name(f"{path.name}.part")
    try:
        part.write_text(json.dumps(content))
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def read(path: Path, what: str) -> Any:
    """What the file holds; raises a ValueError where that is no JSON."""
    try:
        return json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not a saved {what}: {error}") from None


def check(found: Any, where: str | os.PathLike[str], what: str, kind: str, version: int) -> None:
    """Raises a ValueError where it is of another format, or version, than this."""
    if not isinstance(found, dict) or found.get("format") != kind:
        raise ValueError(f"{where}: not a saved {what}: it has no format {kind!r}")
    if found.get("version") != version:
        raise ValueError(
            f"{where}: version {found.get('version')!r} of the format; this jaxaccel reads "
            f"version {version}"
        )
