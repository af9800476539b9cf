"""Moves batches to the device while the one before is at work."""

import atexit
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from queue import SimpleQueue
from typing import Any, Generic, NamedTuple, TypeVar

import jax
from jax.sharding import Sharding

Item = TypeVar("Item")

_JOIN_SECONDS = 1.0


class _Failure(NamedTuple):
    error: BaseException


class _Channel(NamedTuple):
    """What the thread and its iterator share.

    SimpleQueue alone is safe to use from a finalizer, which may run inside either thread.
    """

    slots: SimpleQueue[None]  # one token for each item that may be drawn ahead
    ready: SimpleQueue[Any]  # items, then one _Failure or _END
    stop: threading.Event


_END = object()


class Prefetch(Generic[Item]):
    """An iterator whose items a thread draws and places ahead; made by `prefetch`."""

    def __init__(self, iterator: Iterator[Item], place: Callable[[Item], Item], depth: int):
        self._channel = _Channel(SimpleQueue(), SimpleQueue(), threading.Event())
        for _ in range(depth):
            self._channel.slots.put(None)
        self._done = False
        # The thread must not know this object: an abandoned one is then collected, which ends it.
        self._thread = threading.Thread(
            target=_pull, args=(iterator, place, self._channel), name="prefetch", daemon=True
        )
        self._stop = weakref.finalize(self, _stop, self._channel)
        self._stop.atexit = False
        self._thread.start()
        _open.add(self)

    def __iter__(self) -> "Prefetch[Item]":
        return self

    def __next__(self) -> Item:
        if self._done:
            raise StopIteration
        item = self._channel.ready.get()
        if item is _END or isinstance(item, _Failure):
            self.close()
            raise StopIteration if item is _END else item.error
        self._channel.slots.put(None)
        return item

    def close(self) -> None:
        """Ends the thread and closes the source; later calls do nothing.

        It waits a second at most: a source that is slower ends after the item it is at.
        """
        self._done = True
        self._stop()
        if threading.current_thread() is not self._thread:
            self._thread.join(_JOIN_SECONDS)

    def __enter__(self) -> "Prefetch[Item]":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def prefetch(
    iterable: Iterable[Item], sharding: Sharding | None = None, depth: int = 2
) -> Prefetch[Item]:
    """Draws items in a thread and puts them on the device, while the caller works on earlier ones.

    The thread ends, and a source with a `close` method such as a generator is closed, when the
    iterator is closed, left (``with``), exhausted or garbage-collected. An exception of the source
    is raised at the item where it happened; once closed, it is dropped. Contexts such as
    `jax.set_mesh` do not reach a source, since it runs in the thread.

    Args:
        iterable: Gives pytrees of arrays, for instance a loader; it must not change an array after
            giving it.
        sharding: Where the leaves go; None means the default device.
        depth: Items drawn ahead at most, at least 1.

    Returns:
        An iterator over one pass of `iterable`, in its order, with the leaves as JAX arrays.

    Raises:
        TypeError: `iterable` cannot be iterated.
        ValueError: The depth is below 1.

    >>> with prefetch([{"label": [1, 2]}, {"label": [3, 4]}]) as batches:
    ...     for batch in batches:
    ...         print(batch["label"][0] + batch["label"][1])
    3
    7
    """
    if depth < 1:
        raise ValueError(f"depth is {depth}; pass at least 1")
    # The caller's: a thread starts without it.
    default = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]

    def place(item: Item) -> Item:
        with jax.default_device(default):
            return jax.device_put(item, sharding)

    return Prefetch(iter(iterable), place, depth)


_open: weakref.WeakSet[Prefetch[Any]] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """Runs before JAX's own exit, since JAX was imported first: no thread uses it any more."""
    for iterator in list(_open):
        iterator.close()


def _stop(channel: _Channel) -> None:
    channel.stop.set()
    channel.slots.put(None)  # wakes a thread that waits for a slot


def _pull(iterator: Iterator[Item], place: Callable[[Item], Item], channel: _Channel) -> None:
    last: object = _END
    try:
        _fill(iterator, place, channel)
    except BaseException as error:  # even SystemExit: else the consumer waits for ever
        last = _Failure(error)
    channel.ready.put(last)


def _fill(iterator: Iterator[Item], place: Callable[[Item], Item], channel: _Channel) -> None:
    try:
        while not _stopped(channel):
            channel.ready.put(place(next(iterator)))
    except StopIteration:
        return
    finally:
        close = getattr(iterator, "close", None)
        if close is not None:
            close()


def _stopped(channel: _Channel) -> bool:
    """Waits for a slot, or for the end."""
    channel.slots.get()
    return channel.stop.is_set()
