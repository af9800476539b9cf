"""Convolutions of few channels with a banded (Toeplitz) matrix of each row of the kernel."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jaxaccel._forms._contracted import dot
from jaxaccel._forms._conv import Conv, ConvForm, out_size, padded
from jaxaccel._forms._integers import for_library


def banded(places: int) -> ConvForm:
    """What so many neighbouring places of a row see, times a band of the kernel.

    These pixels lie beside each other in memory, so that nothing is gathered tap by tap; the
    price is products with the zeros of the band. A pixel that is no number reaches all of them.
    """

    def run(x: Array, kernel: Array, conv: Conv) -> Array:
        rows, columns = out_size(x.shape, kernel.shape, conv)
        together = min(places, columns)
        band = _band(kernel, together, conv)
        step = together * conv.strides[1] * x.shape[3]
        windows = _windows(padded(x, conv), band.shape[1], step, -(-columns // together))
        seen = [_rows(windows, index, rows, conv) for index in range(len(kernel))]
        found = dot(jnp.concatenate(seen, 3), band.reshape(-1, band.shape[2]), conv)
        found = found.reshape(x.shape[0], rows, -1, kernel.shape[3])
        return found[:, :, :columns].astype(conv.dtype)

    return run


def columns(places: int) -> ConvForm:
    """The columns of so many neighbouring places as one, with the channels of all.

    What remains is a convolution of many channels that moves by one along a row; of int8.
    """

    def run(x: Array, kernel: Array, conv: Conv) -> Array:
        rows, columns = out_size(x.shape, kernel.shape, conv)
        (batch, _, width, channels), out = x.shape, kernel.shape[3]
        together = min(places, columns)
        wide, count = together * conv.strides[1], -(-columns // together)
        band = _band(kernel, together, conv)
        taps = -(-band.shape[1] // (wide * channels))
        rest = taps * wide * channels - band.shape[1]
        zero, none = jnp.zeros((), kernel.dtype), (0, 0, 0)
        band = lax.pad(band, zero, [none, (0, rest, 0), none])
        low = conv.pads[1][0]
        sides = low, (count - 1 + taps) * wide - low - width
        images = padded(x, conv._replace(pads=(conv.pads[0], sides)))
        found = for_library(
            images.reshape(batch, -1, count - 1 + taps, wide * channels),
            band.reshape(len(kernel), taps, wide * channels, together * out),
            conv._replace(
                strides=(conv.strides[0], 1),
                pads=((0, 0), (0, 0)),
                rhs_dilation=(conv.rhs_dilation[0], 1),
            ),
        )
        return found.reshape(batch, rows, -1, out)[:, :, :columns]

    return run


def _band(kernel: Array, places: int, conv: Conv) -> Array:
    """[rows, pixels * channels, places * out], zero where a place does not see a pixel."""
    height, width, channels, out = kernel.shape
    step, gap = conv.strides[1], conv.rhs_dilation[1]
    reach = (width - 1) * gap + 1
    last = (places - 1) * step
    zero, none = jnp.zeros((), kernel.dtype), (0, 0, 0)
    columns = [
        lax.pad(kernel, zero, [none, (start, last - start, gap - 1), none, none])
        for start in range(0, last + 1, step)
    ]
    return jnp.stack(columns, 3).reshape(height, (last + reach) * channels, places * out)


def _windows(x: Array, size: int, step: int, count: int) -> Array:
    """[batch, height, count, size]: so many numbers of each row, `step` apart."""
    batch, height, width, channels = x.shape
    pieces = -(-size // step)
    more = (count - 1 + pieces) * step - width * channels
    edges = [(0, 0, 0), (0, 0, 0), (0, more, 0)]
    rows = lax.pad(x.reshape(batch, height, width * channels), jnp.zeros((), x.dtype), edges)
    blocks = rows.reshape(batch, height, count - 1 + pieces, step)
    parts = [blocks[:, :, i : i + count, : size - i * step] for i in range(pieces)]
    return jnp.concatenate(parts, 3)


def _rows(windows: Array, index: int, count: int, conv: Conv) -> Array:
    """Those that a row of the kernel meets."""
    start = index * conv.rhs_dilation[0]
    stop = start + (count - 1) * conv.strides[0] + 1
    return windows[:, start : stop : conv.strides[0]]
