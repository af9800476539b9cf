"""Progress bars on the terminal, for work that takes longer than a moment."""

import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")


@contextmanager
def bar(show: bool, name: str, total: int | None) -> Iterator[Callable[..., None]]:
    """A function to call after each step; the bar appears once it has taken a second.

    It may be given a new name, of what comes next.
    """
    from rich.console import Console  # here alone: who loads a function needs no bars
    from rich.progress import Progress

    progress = Progress(console=Console(stderr=True), auto_refresh=False, transient=True)
    task, start = progress.add_task(name, total=total), time.monotonic()
    visible = show and progress.console.is_terminal

    def tick(name: str | None = None) -> None:
        progress.update(task, advance=1, description=name)
        if visible and time.monotonic() - start > 1:
            progress.start()
            progress.refresh()

    try:
        yield tick
    finally:
        if visible and progress.live.is_started:
            progress.stop()


@dataclass(frozen=True)
class Tracked(Generic[T]):
    """`items`, with a bar for each time that they are read."""

    items: Iterable[T]
    name: str
    show: bool

    def __iter__(self) -> Iterator[T]:
        """Them, one by one."""
        total = len(self.items) if isinstance(self.items, Sized) else None
        with bar(self.show, self.name, total) as tick:
            for item in self.items:
                yield item
                tick()
