"""Prefetching: order, bounds, errors, and no thread left behind."""

import gc
import itertools
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from jaxaccel import data

PATIENCE = 20.0  # seconds until a thread that should end counts as left behind


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "prefetch"]


def eventually(condition: Callable[[], bool]) -> bool:
    end = time.monotonic() + PATIENCE
    while not condition() and time.monotonic() < end:
        time.sleep(0.005)
    return condition()


@pytest.fixture(autouse=True)
def _no_thread_is_left():
    yield
    gc.collect()
    assert eventually(lambda: not threads())


class Endless:
    """A generator's wrapper that counts what is drawn and knows whether it was closed."""

    def __init__(self, pause: float = 0.0):
        self.drawn, self.closed, self.pause = 0, threading.Event(), pause

    def items(self) -> Iterator[dict[str, np.ndarray]]:
        try:
            while True:
                time.sleep(self.pause)
                self.drawn += 1
                yield {"label": np.array([self.drawn])}
        finally:
            self.closed.set()


@given(st.lists(st.integers(0, 100), max_size=12), st.integers(1, 15))
def test_gives_all_items_in_order(values, depth):
    items = [{"image": np.full((2, 3), value), "rest": (value, [])} for value in values]
    found = list(data.prefetch(items, depth=depth))
    assert len(found) == len(items)
    for item, placed in zip(items, found, strict=True):
        assert jax.tree.structure(item) == jax.tree.structure(placed)
        assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(placed))
        np.testing.assert_array_equal(placed["image"], item["image"])


def test_gives_what_its_loader_gives():
    both = data.arrays(np.zeros((20, 2, 2), np.uint8), np.arange(20))
    loaders = [data.stream_loader(both, 6, seed=1) for _ in range(2)]
    for plain, placed in zip(loaders[0], data.prefetch(loaders[1]), strict=True):
        assert set(placed) == {"image", "label", "mask"}
        for name, leaf in placed.items():
            np.testing.assert_array_equal(leaf, plain[name])


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_draws_ahead_up_to_its_depth_and_no_further(depth):
    source = Endless()
    with data.prefetch(source.items(), depth=depth) as batches:
        for taken in range(4):
            assert eventually(lambda taken=taken: source.drawn == taken + depth)
            time.sleep(0.02)  # time to overstep
            assert source.drawn == taken + depth
            next(batches)


def test_raises_the_error_of_the_source_where_it_happened():
    class OddError(Exception):
        pass

    def faulty():
        yield np.zeros(1)
        raise OddError("row 17 is broken")

    batches = data.prefetch(faulty())
    next(batches)
    with pytest.raises(OddError, match=r"^row 17 is broken$") as caught:
        next(batches)
    assert "faulty" in [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]
    with pytest.raises(StopIteration):
        next(batches)


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, RuntimeError])
def test_no_error_leaves_the_consumer_waiting(error):
    def faulty():
        raise error("stop")
        yield

    with pytest.raises(error, match="stop"):
        next(data.prefetch(faulty()))


def test_raises_the_error_of_the_transfer_and_closes_the_source():
    source = Endless()

    def words():
        yield from ({**item, "name": "a string"} for item in source.items())

    with pytest.raises(TypeError, match="str"):
        next(data.prefetch(words()))
    assert source.closed.wait(PATIENCE)


def leave_by_close(source: Endless) -> None:
    batches = data.prefetch(source.items())
    next(batches)
    batches.close()
    batches.close()
    with pytest.raises(StopIteration):
        next(batches)


def leave_by_with(source: Endless) -> None:
    with data.prefetch(source.items()) as batches:
        next(batches)


def leave_by_break(source: Endless) -> None:
    for _ in data.prefetch(source.items()):
        break


def leave_when_full(source: Endless) -> None:
    batches = data.prefetch(source.items(), depth=3)
    assert eventually(lambda: source.drawn == 3)
    batches.close()


def leave_unused(source: Endless) -> None:
    data.prefetch(source.items())


def leave_in_a_cycle(source: Endless) -> None:
    batches = data.prefetch(source.items())
    next(batches)
    cycle: list[object] = [batches]
    cycle.append(cycle)
    del batches, cycle
    gc.collect()


@pytest.mark.parametrize(
    "leave",
    [
        leave_by_close,
        leave_by_with,
        leave_by_break,
        leave_when_full,
        leave_unused,
        leave_in_a_cycle,
    ],
)
@pytest.mark.parametrize("pause", [0.0, 0.05])
def test_leaving_ends_the_thread_and_closes_the_source(leave, pause):
    source = Endless(pause)
    leave(source)
    assert source.closed.wait(PATIENCE)
    assert eventually(lambda: not threads())


def test_closing_does_not_wait_for_a_stuck_source(monkeypatch):
    monkeypatch.setattr("jaxaccel.data._prefetch._JOIN_SECONDS", 0.05)
    release = threading.Event()

    def stuck():
        yield np.zeros(1)
        release.wait(PATIENCE)
        yield np.ones(1)

    batches = data.prefetch(stuck())
    next(batches)
    batches.close()
    assert threads(), "the source is not stuck"
    release.set()
    assert eventually(lambda: not threads())


def test_a_source_may_close_what_draws_from_it():
    held: list[data.Prefetch] = []

    def closes():
        for n in itertools.count():
            if n == 2:
                held[0].close()
            yield np.array(n)

    held.append(data.prefetch(closes(), depth=1))
    found = [int(item) for item in held[0]]
    assert found == [0, 1, 2][: len(found)]


def test_one_around_another_ends_both():
    source = Endless()
    outer = data.prefetch(data.prefetch(source.items()))
    assert int(next(outer)["label"][0]) == 1
    assert len(threads()) == 2
    outer.close()
    assert source.closed.wait(PATIENCE)


def test_shards_over_eight_devices():
    sharding = NamedSharding(jax.make_mesh((8,), ("data",)), PartitionSpec("data"))
    items = [{"image": np.arange(16.0).reshape(16, 1), "label": np.arange(16)}]
    (placed,) = data.prefetch(items, sharding)
    for name, leaf in placed.items():
        assert leaf.sharding == sharding
        assert {shard.data.shape[0] for shard in leaf.addressable_shards} == {2}
        np.testing.assert_array_equal(leaf, items[0][name])


def test_uses_the_default_device_of_the_caller():
    with jax.default_device(jax.devices()[5]):
        (placed,) = data.prefetch([np.zeros(2)])
    assert placed.device == jax.devices()[5]


def test_refuses():
    with pytest.raises(ValueError, match=r"^depth is 0; pass at least 1$"):
        data.prefetch([], depth=0)
    with pytest.raises(TypeError, match="not iterable"):
        data.prefetch(3)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("pause", ["0", "3600"])
def test_exit_does_not_hang(pause):
    """A busy source and a stuck one, both alive when the interpreter ends."""
    code = f"""
import itertools, time
import numpy as np
from jaxaccel import data
def source():
    for n in itertools.count():
        yield np.full(1000, n)
        time.sleep({pause})
batches = data.prefetch(source())
print(int(next(batches)[0]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "0\n", "")
