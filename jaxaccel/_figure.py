"""Pictures, for which matplotlib is loaded when one is drawn."""

import os
from typing import Any


def figure(width: float, height: float) -> Any:
    """An empty figure, in inches.

    Raises:
        ImportError: where matplotlib is absent.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        fix = "plot: matplotlib is not installed; pip install 'jaxaccel[experiments]'"
        raise ImportError(fix) from error
    return Figure(figsize=(width, height))


def save(drawn: Any, path: str | os.PathLike[str]) -> None:
    """Writes it; it grows by what its labels need, so that a long name is not cut."""
    drawn.savefig(path, dpi=150, bbox_inches="tight", pad_inches=0.15)
