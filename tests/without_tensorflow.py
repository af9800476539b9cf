"""Hides TensorFlow from a process, installed or not.

A finder that raises would not do: TFDS asks `importlib.util.find_spec` for it.
"""

import sys
from typing import Any


class _Hiding:
    def __init__(self, finder: Any):
        self._finder = finder

    def __getattr__(self, name: str) -> Any:
        return getattr(self._finder, name)

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name.partition(".")[0] == "tensorflow":
            return None
        return self._finder.find_spec(name, path, target)


def hide() -> None:
    """Call it before anything imports TensorFlow."""
    assert "tensorflow" not in sys.modules
    sys.meta_path[:] = [_Hiding(finder) for finder in sys.meta_path]
