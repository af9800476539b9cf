"""What was done to a function, step after step, as plain data that JSON can hold."""

from collections.abc import Callable
from typing import Any, TypeAlias

Recipe: TypeAlias = list[dict[str, Any]]


def recipe(fn: Callable) -> Recipe:
    """The transforms that made the function, in their order; none where it is wrapped anew."""
    return list(getattr(fn, "recipe", ()))


def with_step(fn: Callable, transform: str, **what: Any) -> Recipe:
    """The recipe of what `transform` makes of the function."""
    return [*recipe(fn), {"transform": transform, **what}]
