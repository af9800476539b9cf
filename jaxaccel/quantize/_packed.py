"""Two 4-bit codes to a byte: where the numbers of a tensor lie, and where its groups begin."""

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int8, Shaped, UInt8

# Not jnp.int4: safetensors has no name for it, and a backend may give each number a byte.
_ZERO = 8  # added to a code, so that a nibble is never negative
_SHIFTS = np.array([[0], [4]], np.uint8)  # the even row lies in the low nibble, the odd in the high


class Packing(NamedTuple):
    """The tensor that packed codes stand for.

    The axes that are summed over, flattened in order, are the rows; those that keep scales of
    their own, flattened, are the channels: ``[rows, channels]`` is the flat form.

    Attributes:
        shape: of the tensor.
        axes: that keep scales of their own, ascending, none negative.
        group: how many consecutive rows share a scale, >= 1; the last group may be shorter.
    """

    shape: tuple[int, ...]
    axes: tuple[int, ...]
    group: int

    @property
    def order(self) -> tuple[int, ...]:
        """The axes as the flat form takes them: those that are summed over come first."""
        return *(a for a in range(len(self.shape)) if a not in self.axes), *self.axes

    @property
    def rows(self) -> int:
        """How many numbers each channel has."""
        return math.prod(size for a, size in enumerate(self.shape) if a not in self.axes)

    @property
    def channels(self) -> int:
        """How many channels there are."""
        return math.prod(self.shape[a] for a in self.axes)

    def groups(self, x: Shaped[Array, "..."]) -> Shaped[Array, "groups group channels"]:
        """The tensor's numbers, a ragged last group filled up with zeros."""
        flat = x.transpose(self.order).reshape(self.rows, self.channels)
        padded = jnp.pad(flat, ((0, -self.rows % self.group), (0, 0)))
        return padded.reshape(-(-self.rows // self.group), self.group, self.channels)

    def spread(self, scale: Shaped[Array, "groups channels"]) -> Shaped[Array, "rows channels"]:
        """The scale of each row."""
        return jnp.repeat(scale, self.group, axis=0)[: self.rows]

    def tensor(self, flat: Shaped[Array, "rows channels"]) -> Shaped[Array, "..."]:
        """The flat form, in the tensor's shape again."""
        ordered = flat.reshape([self.shape[a] for a in self.order])
        return ordered.transpose(np.argsort(self.order))


def pack(codes: Int8[Array, "rows channels"]) -> UInt8[Array, "bytes channels"]:
    """Codes in [-8, 7], two rows to a byte; an odd last row has a zero beside it.

    >>> pack(jnp.array([[-7], [0], [7]], jnp.int8))
    Array([[129],
           [143]], dtype=uint8)
    """
    rows, channels = codes.shape
    even = jnp.pad(codes, ((0, rows % 2), (0, 0)))
    pairs = (even + _ZERO).astype(jnp.uint8).reshape(-(-rows // 2), 2, channels)
    return pairs[:, 0] | pairs[:, 1] << 4


def unpack(packed: UInt8[Array, "bytes channels"], rows: int) -> Int8[Array, "rows channels"]:
    """The codes that `pack` was given.

    >>> unpack(jnp.array([[129], [143]], jnp.uint8), 3)
    Array([[-7],
           [ 0],
           [ 7]], dtype=int8)
    """
    # A broadcast shift, not a concatenation: it stays inside the fusion that reads the weight.
    nibbles = packed[:, None, :] >> _SHIFTS[None] & 15
    codes = nibbles.reshape(2 * packed.shape[0], packed.shape[1])
    return codes[:rows].astype(jnp.int8) - _ZERO
