"""Plans as JSON: nothing in the file is run, and its numbers must agree with each other."""

from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from jaxaccel import _stored
from jaxaccel.prune._paths import Kept, Shapes, small_shape

_FORMAT, _VERSION = "jaxaccel.prune.Plan", 1


def write(path: Path, fields: Mapping[str, Any]) -> None:
    """Writes the whole file or nothing."""
    _stored.write(path, content(fields))


def content(fields: Mapping[str, Any]) -> dict[str, Any]:
    """What is written, as plain data."""
    kept = {
        path: {str(axis): indices.tolist() for axis, indices in axes.items()}
        for path, axes in fields["kept"].items()
    }
    return {"format": _FORMAT, "version": _VERSION, **fields, "kept": kept}


def read(path: Path) -> dict[str, Any]:
    """The fields of the plan.

    Raises:
        ValueError: the file is no plan, of another version, or damaged.
    """
    return checked(_stored.read(path, "plan"), path)


def checked(found: Any, path: str | Path) -> dict[str, Any]:
    """The fields of what `content` gave, read from somewhere; raises as `read`."""
    _stored.check(found, path, "plan", _FORMAT, _VERSION)
    try:
        return _fields(found)
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
        raise ValueError(f"{path}: damaged: {type(error).__name__}: {error}") from None


def _fields(content: dict[str, Any]) -> dict[str, Any]:
    shapes = {path: tuple(map(_count, shape)) for path, shape in content["shapes"].items()}
    kept = {
        path: {
            _axis(path, axis, shapes): _kept(path, shapes[path][int(axis)], given)
            for axis, given in axes.items()
        }
        for path, axes in content["kept"].items()
    }
    return {
        "shapes": shapes,
        "kept": kept,
        "unmasked": tuple(_known(path, shapes) for path in content["unmasked"]),
        "rows": [_row(*row) for row in content["rows"]],
        "parameters": _sizes(content["parameters"], shapes, kept),
        "macs": _pair(*content["macs"]),
    }


def _known(path: str, shapes: Shapes) -> str:
    shapes[path]
    return path


def _sizes(given: Any, shapes: Shapes, kept: Kept) -> tuple[int, int]:
    before = sum(map(prod, shapes.values()))
    after = sum(prod(small_shape(path, shapes, kept)) for path in shapes)
    if _pair(*given) != (before, after):
        raise ValueError(f"{given} parameters, but the shapes make {before} and {after}")
    return before, after


def _row(kept: Any, channels: Any, parameters: Any, macs: Any, slices: Any) -> tuple[Any, ...]:
    if _count(kept) > _count(channels):
        raise ValueError(f"keeps {kept} of {channels} channels")
    return kept, channels, _count(parameters), _count(macs), str(slices)


def _pair(before: Any, after: Any) -> tuple[int, int]:
    return _count(before), _count(after)


def _axis(path: str, axis: str, shapes: Shapes) -> int:
    if axis not in map(str, range(len(shapes[path]))):
        raise ValueError(f"{path}: has no axis {axis!r}")
    return int(axis)


def _count(number: Any) -> int:
    if type(number) is not int or number < 0:
        raise ValueError(f"{number!r} is not a count")
    return number


def _kept(path: str, size: int, given: Any) -> np.ndarray:
    indices = np.array(list(map(_count, given)), int)
    if not len(indices) or (np.diff(indices) <= 0).any() or indices[-1] >= size:
        raise ValueError(f"{path}: kept indices must be ascending and below {size}")
    return indices
