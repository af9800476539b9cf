"""Batches of one shape, from arrays on the device or from any source on the host."""

import operator
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding
from jaxtyping import Array, Bool, Int, Shaped

from jaxaccel.data._arrays import Arrays, Source, read

Leaf = TypeVar("Leaf", Array, np.ndarray)


class Loader(Generic[Leaf]):
    """Batches of one shape, epoch after epoch; made by `device_loader` and `stream_loader`.

    Each `iter` starts the next epoch. A batch is ``{"image", "label", "mask"}``; `mask` is False on
    the rows that pad the last one. The order depends on the seed and the epoch alone: NumPy draws
    it on the host, where it takes 4 bytes a row and no compilation, and where both loaders share
    it.

    Attributes:
        epoch: The number of the epoch that the next `iter` starts, from 0; set it to resume.
    """

    def __init__(
        self,
        batch_of: Callable[[Int[np.ndarray, " rows"]], dict[str, Leaf]],
        rows: int,
        batch_size: int,
        seed: int,
        shuffle: bool,
        drop_last: bool,
    ):
        self.epoch = 0
        self._batch_of, self._rows, self._batch_size = batch_of, rows, batch_size
        self._seed, self._shuffle, self._drop_last = seed, shuffle, drop_last

    def __len__(self) -> int:
        """Batches per epoch."""
        whole, ragged = divmod(self._rows, self._batch_size)
        return whole + (ragged > 0 and not self._drop_last)

    def __iter__(self) -> Iterator[dict[str, Leaf]]:
        epoch, self.epoch = self.epoch, self.epoch + 1
        return self._batches(self._order(epoch))

    def _order(self, epoch: int) -> Int[np.ndarray, " rows"]:
        if not self._shuffle:
            return np.arange(self._rows, dtype=np.int32)
        rng = np.random.default_rng((self._seed, epoch))
        return rng.permutation(self._rows).astype(np.int32)

    def _batches(self, order: Int[np.ndarray, " rows"]) -> Iterator[dict[str, Leaf]]:
        for batch in range(len(self)):
            start = batch * self._batch_size
            yield self._batch_of(order[start : start + self._batch_size])


def device_loader(
    source: Arrays,
    batch_size: int,
    *,
    seed: int = 0,
    shuffle: bool = True,
    drop_last: bool = False,
    sharding: Sharding | None = None,
) -> Loader[Array]:
    """Puts the data on the device once, and gathers every batch there.

    One compiled gather serves all batches of all epochs; only the row numbers travel.

    Args:
        source: The data, small enough for the device's memory.
        batch_size: Rows per batch, at least 1; more than the data holds gives one padded batch.
        seed: From 0; with the epoch number it decides the order.
        shuffle: Whether each epoch has an order of its own.
        drop_last: Whether to leave out a ragged last batch instead of padding it.
        sharding: Where batches lie, split along the batch axis alone, such as
            ``NamedSharding(mesh, P("data"))``; every device of its mesh then holds all the data.

    Returns:
        A re-iterable `Loader` of JAX arrays: image as in the source, label int32, mask bool.

    Raises:
        TypeError: The source is not `Arrays`, or a number is not an integer.
        ValueError: The source is empty, a number is out of range, or the sharding does not fit.

    >>> rows = Arrays(np.zeros((5, 8, 8, 1), np.uint8), np.arange(5, dtype=np.int32))
    >>> [batch["label"].tolist() for batch in device_loader(rows, 2, shuffle=False)]
    [[0, 1], [2, 3], [4, 4]]
    >>> [batch["mask"].tolist() for batch in device_loader(rows, 2)]
    [[True, True], [True, True], [True, False]]
    """
    if not isinstance(source, Arrays):
        raise TypeError(
            f"source is {type(source).__name__}; device_loader takes Arrays: call to_arrays(source)"
            " first, or stream_loader"
        )
    _check(source, batch_size, seed, drop_last)
    _check_sharding(sharding, batch_size)
    gather, everywhere = jax.jit(_gather, out_shardings=sharding), _replicated(sharding)
    data = jax.device_put({"image": source.image, "label": source.label}, everywhere)

    def batch_of(index: Int[np.ndarray, " rows"]) -> dict[str, Array]:
        # Put there by name, so that jax.transfer_guard("disallow") permits it.
        sent = jax.device_put((np.resize(index, batch_size), np.int32(len(index))), everywhere)
        return gather(data, *sent)

    return Loader(batch_of, len(source), batch_size, seed, shuffle, drop_last)


def stream_loader(
    source: Source,
    batch_size: int,
    *,
    seed: int = 0,
    shuffle: bool = True,
    drop_last: bool = False,
) -> Loader[np.ndarray]:
    """Reads batches from any source on the host, in the very order of `device_loader`.

    Args:
        source: `Arrays`, or rows ``{"image", "label"}`` by index, read one by one.
        batch_size: Rows per batch, at least 1; more than the data holds gives one padded batch.
        seed: From 0; with the epoch number it decides the order.
        shuffle: Whether each epoch has an order of its own.
        drop_last: Whether to leave out a ragged last batch instead of padding it.

    Returns:
        A re-iterable `Loader` of NumPy arrays, for `prefetch`.

    Raises:
        TypeError: A number is not an integer.
        ValueError: The source is empty, or a number is out of range; while iterating, rows are
            not as `jaxaccel.data.arrays` wants them.

    >>> source = [{"image": np.zeros((8, 8), np.uint8), "label": n} for n in range(3)]
    >>> [batch["label"].tolist() for batch in stream_loader(source, 2, shuffle=False)]
    [[0, 1], [2, 2]]
    """
    _check(source, batch_size, seed, drop_last)

    def batch_of(index: Int[np.ndarray, " rows"]) -> dict[str, np.ndarray]:
        rows = source[index] if isinstance(source, Arrays) else read(source, index.tolist())[:]
        repeated = np.resize(np.arange(len(index)), batch_size)
        padded = len(index) < batch_size
        batch = {name: leaf[repeated] if padded else leaf for name, leaf in rows.items()}
        return {**batch, "mask": np.arange(batch_size) < len(index)}

    return Loader(batch_of, len(source), batch_size, seed, shuffle, drop_last)


def _gather(
    data: dict[str, Shaped[Array, "n ..."]],
    index: Int[Array, " batch"],
    valid: Int[Array, ""],
) -> dict[str, Shaped[Array, "batch ..."] | Bool[Array, " batch"]]:
    batch = {name: leaf.at[index].get(mode="promise_in_bounds") for name, leaf in data.items()}
    return {**batch, "mask": jnp.arange(len(index)) < valid}


def _replicated(sharding: Sharding | None) -> Sharding | None:
    if isinstance(sharding, NamedSharding):
        return NamedSharding(sharding.mesh, PartitionSpec())
    return sharding


def _check(source: Source, batch_size: int, seed: int, drop_last: bool) -> None:
    for name, value, least in (("batch_size", batch_size, 1), ("seed", seed, 0)):
        if isinstance(value, bool) or not hasattr(value, "__index__"):
            raise TypeError(f"{name} is {value!r}; pass an integer")
        if operator.index(value) < least:
            raise ValueError(f"{name} is {value}; pass an integer from {least}")
    if len(source) == 0:
        raise ValueError("source is empty; give it at least one row")
    if drop_last and batch_size > len(source):
        raise ValueError(
            f"drop_last=True leaves no batch: batch_size {batch_size} > {len(source)} rows"
        )


def _check_sharding(sharding: Sharding | None, batch_size: int) -> None:
    if sharding is None:
        return
    if isinstance(sharding, NamedSharding) and len(sharding.spec) > 1:
        raise ValueError(f"sharding has {sharding.spec}; split the batch axis alone, as P('data')")
    # A length that every split of an axis over these devices divides.
    devices = len(sharding.device_set)
    shards = devices // sharding.shard_shape((devices,))[0]
    if batch_size % shards:
        raise ValueError(f"batch_size {batch_size} is not divisible by the {shards} shards")
