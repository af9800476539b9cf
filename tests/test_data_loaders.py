"""Loaders: the same batches from the device and from the host."""

import jax
import jax.monitoring
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxaccel import data

P = PartitionSpec


def numbered(n: int) -> data.Arrays:
    """Row i is an image of i, labelled i."""
    image = np.broadcast_to(np.arange(n, dtype=np.uint8)[:, None, None, None], (n, 3, 2, 1))
    return data.arrays(image, np.arange(n))


class Rows:
    """A source that is read row by row, and counts what is read."""

    def __init__(self, n: int):
        self.both, self.read = numbered(n), 0

    def __len__(self) -> int:
        return len(self.both)

    def __getitem__(self, index: int, /) -> dict[str, np.ndarray]:
        self.read += 1
        return self.both[index]


ARGUMENTS = {
    "n": st.integers(1, 40),
    "batch_size": st.integers(1, 50),
    "seed": st.integers(0, 2**40),
    "shuffle": st.booleans(),
    "drop_last": st.booleans(),
}


@given(**ARGUMENTS)
def test_both_loaders_give_every_row_once_and_the_same(n, batch_size, seed, shuffle, drop_last):
    drop_last = drop_last and batch_size <= n
    options = {"seed": seed, "shuffle": shuffle, "drop_last": drop_last}
    on_device = data.device_loader(numbered(n), batch_size, **options)
    streams = [data.stream_loader(s, batch_size, **options) for s in (numbered(n), Rows(n))]
    steps = n // batch_size if drop_last else -(-n // batch_size)
    for _ in range(2):
        epoch = [list(loader) for loader in (on_device, *streams)]
        assert [len(batches) for batches in epoch] == [steps] * 3
        assert [len(loader) for loader in (on_device, *streams)] == [steps] * 3
        seen = []
        for batches in zip(*epoch, strict=True):
            for batch in batches:
                check_batch(batch, batch_size)
                for name, leaf in batch.items():
                    np.testing.assert_array_equal(leaf, batches[0][name])
            seen += batches[1]["label"][batches[1]["mask"]].tolist()
        assert len(set(seen)) == len(seen) == (steps * batch_size if drop_last else n)
        if not shuffle:
            assert seen == sorted(seen)


def check_batch(batch, batch_size: int) -> None:
    """One shape, images that go with their labels, padding behind the valid rows."""
    image, label, mask = (np.asarray(batch[name]) for name in ("image", "label", "mask"))
    assert (image.shape, image.dtype) == ((batch_size, 3, 2, 1), np.uint8)
    assert (label.shape, label.dtype) == ((batch_size,), np.int32)
    assert (mask.shape, mask.dtype) == ((batch_size,), np.bool_)
    np.testing.assert_array_equal(image, np.broadcast_to(label.reshape(-1, 1, 1, 1), image.shape))
    valid = int(mask.sum())
    assert mask[:valid].all()
    assert set(label[valid:]) <= set(label[:valid])


def labels(loader) -> list[int]:
    return [int(label) for batch in loader for label in batch["label"]]


@pytest.mark.parametrize("make", [data.device_loader, data.stream_loader])
def test_order_follows_seed_and_epoch(make):
    first = make(numbered(32), 8, seed=3)
    epochs = [labels(first) for _ in range(3)]
    assert first.epoch == 3
    assert len({tuple(epoch) for epoch in epochs}) == 3
    resumed = make(numbered(32), 8, seed=3)
    resumed.epoch = 1
    assert labels(resumed) == epochs[1]
    assert labels(make(numbered(32), 8, seed=4)) != epochs[0]
    # An epoch counts when it starts, and two at a time do not disturb each other.
    one, two = iter(resumed), iter(resumed)
    assert resumed.epoch == 4
    pairs = list(zip(one, two, strict=True))
    assert labels(pair[0] for pair in pairs) == epochs[2]


def test_one_compilation_serves_all_epochs():
    compiled = []

    def listen(event: str, duration_secs: float, **_: str | int) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        loader = data.device_loader(numbered(37), 5)
        list(loader)
        first = len(compiled)
        for _ in range(3):
            list(loader)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert first == len(compiled) == 1


def test_device_loader_sends_only_row_numbers_after_its_start(monkeypatch):
    loader, sent = data.device_loader(numbered(20), 6), []
    device_put = jax.device_put

    def spy(values, *rest):
        sent.append(sum(leaf.nbytes for leaf in jax.tree.leaves(values)))
        return device_put(values, *rest)

    monkeypatch.setattr(jax, "device_put", spy)
    with jax.transfer_guard("disallow"):  # what the spy does not see
        batches = list(loader)
    assert len(batches) == len(sent) == 4
    assert set(sent) == {6 * 4 + 4}


def test_stream_loader_reads_padding_only_once():
    rows = Rows(5)
    batches = list(data.stream_loader(rows, 4))
    assert rows.read == 5
    assert int(batches[-1]["mask"].sum()) == 1


def test_stream_loader_brings_rows_to_the_form_of_arrays():
    rows = [{"image": np.full((2, 2), 1 / 3), "label": np.uint8(7)}] * 3
    batch = next(iter(data.stream_loader(rows, 2)))
    assert (batch["image"].shape, batch["image"].dtype) == ((2, 2, 2, 1), np.float32)
    assert batch["label"].dtype == np.int32


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("axes", ["data", ("data", "model")])
def test_sharded_batches_equal_those_of_one_device(axis_type, axes):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(axis_type,) * 2)
    sharding = NamedSharding(mesh, P(axes))
    plain = data.device_loader(numbered(19), 8)
    for one, many in zip(
        plain, data.device_loader(numbered(19), 8, sharding=sharding), strict=True
    ):
        for name, leaf in many.items():
            assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
            np.testing.assert_array_equal(leaf, one[name])


def test_batches_go_to_the_one_device_asked_for():
    device = jax.devices()[3]
    sharding = jax.sharding.SingleDeviceSharding(device)
    batch = next(iter(data.device_loader(numbered(4), 2, sharding=sharding)))
    assert {leaf.device for leaf in batch.values()} == {device}


def sharded(*spec: str | None) -> NamedSharding:
    return NamedSharding(jax.make_mesh((8,), ("data",)), P(*spec))


@pytest.mark.parametrize("make", [data.device_loader, data.stream_loader])
@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"batch_size": 0}, ValueError, r"^batch_size is 0; pass an integer from 1$"),
        ({"batch_size": 2.0}, TypeError, r"^batch_size is 2\.0; pass an integer$"),
        ({"batch_size": True}, TypeError, r"^batch_size is True; pass an integer$"),
        ({"seed": -1}, ValueError, r"^seed is -1; pass an integer from 0$"),
        (
            {"batch_size": 7, "drop_last": True},
            ValueError,
            r"^drop_last=True leaves no batch: batch_size 7 > 6 rows$",
        ),
        (
            {"source": data.Arrays(np.zeros((0, 2, 2, 1), np.uint8), np.zeros(0, np.int32))},
            ValueError,
            r"^source is empty; give it at least one row$",
        ),
    ],
)
def test_loaders_refuse(make, changes, error, message):
    with pytest.raises(error, match=message):
        make(**{"source": numbered(6), "batch_size": 4, **changes})


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"sharding": ("data",)}, ValueError, r"^batch_size 4 is not divisible by the 8 shards$"),
        (
            {"sharding": ("data", None)},
            ValueError,
            r"^sharding has P.*'data', None\).*; split the batch axis alone, as P\('data'\)$",
        ),
        (
            {"source": [{"image": np.zeros((2, 2)), "label": 0}]},
            TypeError,
            r"^source is list; device_loader takes Arrays: call to_arrays\(source\) first, or str",
        ),
    ],
)
def test_device_loader_refuses(changes, error, message):
    if "sharding" in changes:
        changes = {"sharding": sharded(*changes["sharding"])}
    with pytest.raises(error, match=message):
        data.device_loader(**{"source": numbered(6), "batch_size": 4, **changes})
