"""What goes into a compiled step (batches of one shape, on the device) and what comes out of it."""

import time
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from types import TracebackType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn

from jaxaccel import data
from jaxaccel.train._step import Batch

REFRESH_SECONDS = 0.5


def feed(source: Iterable, sharding: NamedSharding | None) -> Iterator[Batch]:
    """The batches of `source` on the device, all of the shape of the first.

    Raises:
        ValueError: there is no batch, or one does not fit.
    """
    batches = _same_shape(map(_as_batch, source))
    first = next(batches, None)
    if first is None:
        raise ValueError("no batches: the iterable is empty or was used up by an earlier pass")
    batches = chain([first], batches)
    if isinstance(first["image"], jax.Array):
        yield from batches if sharding is None else (jax.device_put(b, sharding) for b in batches)
        return
    with data.prefetch(batches, sharding) as ready:
        yield from ready


def _as_batch(item: Any) -> Batch:
    """A dict with image, label and mask; arrays stay where they are."""
    if not isinstance(item, dict):
        if not (isinstance(item, tuple | list) and len(item) == 2):
            raise ValueError(
                f'a batch must be a dict with "image" and "label" or a pair (image, label), '
                f"got {type(item).__name__}"
            )
        item = dict(zip(("image", "label"), item, strict=True))
    for name in ("image", "label"):
        if name not in item:
            raise ValueError(f'a batch has no "{name}"; its entries are: {", ".join(item)}')
    batch = {name: x if isinstance(x, jax.Array) else np.asarray(x) for name, x in item.items()}
    size = len(batch["label"])
    if len(batch["image"]) != size:
        raise ValueError(f"a batch has {len(batch['image'])} images but {size} labels")
    if "mask" not in batch:
        batch["mask"] = np.ones(size, bool)
    return batch


def _same_shape(batches: Iterator[Batch]) -> Iterator[Batch]:
    """Pads a batch shorter than the first with copies of its first sample, masked out."""
    size = None
    for batch in batches:
        rows = len(batch["label"])
        size = size or rows
        if rows > size:
            raise ValueError(
                f"a batch of {rows} samples follows a first one of {size}; "
                "the first must be the largest, so that one compiled step serves all"
            )
        yield batch if rows == size else _pad(batch, size - rows)


def _pad(batch: Batch, missing: int) -> Batch:
    def pad(x: Any) -> Any:
        xp = jnp if isinstance(x, jax.Array) else np
        return xp.concatenate([x, xp.repeat(x[:1], missing, axis=0)])

    padded = {name: pad(x) for name, x in batch.items()}
    padded["mask"] = np.concatenate([batch["mask"], np.zeros(missing, bool)])
    return padded


def grouped(batches: Iterator[Batch], size: int) -> Iterator[list[Batch]]:
    """Lists of `size` batches, the last possibly shorter."""
    while group := list(islice(batches, size)):
        yield group


class Bar:
    """A progress bar over steps; it asks the device for its totals twice a second."""

    def __init__(self, epochs: int, source: Any, show: bool):
        length = len(source) * epochs if hasattr(source, "__len__") else None
        self._epochs = epochs
        self._progress = Progress(*_columns(), disable=not show, auto_refresh=False)
        self._task = self._progress.add_task("", total=length, text="compiling")
        self._due = 0.0

    def __enter__(self) -> "Bar":
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._progress.refresh()
        self._progress.stop()

    def advance(self, steps: int) -> bool:
        """Count steps; True when it is time to `show` the totals."""
        self._progress.advance(self._task, steps)
        now = time.perf_counter()
        if now < self._due:
            return False
        self._due = now + REFRESH_SECONDS
        return True

    def show(self, epoch: int, text: str) -> None:
        """Draw the bar."""
        description = f"epoch {epoch}/{self._epochs}"
        self._progress.update(self._task, description=description, text=text, refresh=True)


def _columns() -> list[ProgressColumn]:
    return [
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TextColumn("{task.completed} steps"),
        TextColumn("{task.fields[text]}"),
        TimeRemainingColumn(),
    ]
