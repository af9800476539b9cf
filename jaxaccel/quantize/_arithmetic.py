"""The integers: grids, and how an accumulator returns to 8 bits. Every result is exact.

XLA may contract ``a * b + c`` into one rounding and computes ``a / b`` otherwise than NumPy does.
So no expression here has a product before a sum, or a quotient: each rounds once, the same on
every backend and in `tests/int8_reference.py`.
"""

from collections.abc import Sequence
from math import frexp
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int8, Int32

LOWEST, HIGHEST = -128, 127
_SUM_BITS = 30  # of a sum of rescaled operands, which leaves one for half a step and one for a sign
_MOST_BITS = 30  # of a shift
_FINEST = 256  # steps of a sum's grid in one of an operand's: finer ones would hold noise


class Grid(NamedTuple):
    """What the integers of a tensor stand for: ``x = scale * (q - zero_point)``.

    Attributes:
        scale: the step, > 0; a float32, or a power of two.
        zero_point: the integer in [-128, 127] that stands for 0, exactly.
    """

    scale: float
    zero_point: int


class Clip(NamedTuple):
    """Bounds on the integers, both included; a relu's lower one is the zero point."""

    low: int = LOWEST
    high: int = HIGHEST


def clip_of(grid: Grid, low: float, high: float) -> Clip:
    """The bounds on the integers where the numbers are clipped to ``[low, high]``."""

    def index(bound: float) -> int:
        steps = np.clip(np.float64(bound) / grid.scale, -1e6, 1e6)
        return int(np.clip(np.round(steps) + grid.zero_point, LOWEST, HIGHEST))

    return Clip(index(low), index(high))


def quantize(x: Float[Array, "..."], grid: Grid) -> Int8[Array, "..."]:
    """``clip(round(x * (1 / scale)) + zero_point)``, halves to even."""
    steps = jnp.round(x.astype(jnp.float32) * np.float32(1 / grid.scale))
    return _narrow(steps, grid.zero_point, Clip())


def dequantize(q: Int8[Array, "..."], grid: Grid) -> Float32[Array, "..."]:
    """``(q - zero_point) * scale``."""
    return (q.astype(jnp.int32) - grid.zero_point).astype(jnp.float32) * np.float32(grid.scale)


def requantize(
    acc: Int32[Array, "..."],
    bias: Float32[Array, "..."] | None,
    multiplier: Float32[Array, "..."],
    zero_point: int,
    clip: Clip,
) -> Int8[Array, "..."]:
    """``clip(round((acc + bias) * multiplier) + zero_point)``, halves to even."""
    return _narrow(jnp.round(_real(acc, bias, multiplier)), zero_point, clip)


def _real(acc: Array, bias: Array | None, multiplier: Array) -> Array:
    wide = acc.astype(jnp.float32)
    return (wide if bias is None else wide + bias) * multiplier


def accumulated(
    acc: Int32[Array, "..."], bias: Array | None, multiplier: Float32[Array, "..."]
) -> Float32[Array, "..."]:
    """``(acc + bias) * multiplier``: an accumulator that leaves the integers."""
    if bias is not None and jnp.issubdtype(bias.dtype, jnp.integer):
        return _real(acc + bias, None, multiplier)
    return _real(acc, bias, multiplier)


def _narrow(steps: Array, zero_point: int, clip: Clip) -> Array:
    # Clipped first: beyond int32 a conversion is not defined.
    steps = jnp.clip(steps, clip.low - zero_point, clip.high - zero_point)
    return (steps.astype(jnp.int32) + zero_point).astype(jnp.int8)


def shift(
    acc: Int32[Array, "..."],
    bias: Int32[Array, "..."] | None,
    bits: Int32[Array, "..."],
    zero_point: int,
    clip: Clip,
) -> Int8[Array, "..."]:
    """``clip(((acc + bias + 2^(bits - 1)) >> bits) + zero_point)``: halves up."""
    total = acc if bias is None else acc + bias
    half = (1 << bits) >> 1
    steps = ((total + half) >> bits) + zero_point
    return jnp.clip(steps, clip.low, clip.high).astype(jnp.int8)


class Fixed(NamedTuple):
    """Factors as integers: ``ratio = factor / 2^bits``."""

    factors: tuple[int, ...]
    bits: int


def fixed(ratios: Sequence[float], largest: int) -> Fixed:
    """The ratios as integers, so large that sums of ``largest`` (of each) stay within int32.

    Powers of two are exact, with as few bits as they need.
    """
    mantissas, exponents = zip(*map(frexp, ratios), strict=True)
    powers = all(mantissa == 0.5 for mantissa in mantissas)
    bits = min(max(0, 1 - min(exponents)), _MOST_BITS) if powers else _MOST_BITS
    while bits and sum(largest * round(ratio * 2**bits) for ratio in ratios) >= 1 << _SUM_BITS:
        bits -= 1
    return Fixed(tuple(round(ratio * 2**bits) for ratio in ratios), bits)


def rescaled(
    terms: Sequence[Int32[Array, "..."]], factors: Fixed, zero_point: int, clip: Clip
) -> Int8[Array, "..."]:
    """``clip(((sum(term * factor) + 2^(bits - 1)) >> bits) + zero_point)``, in int32."""
    total = sum((t * f for t, f in zip(terms[1:], factors.factors[1:], strict=True)),
                start=terms[0] * factors.factors[0])  # fmt: skip
    return shift(total, None, jnp.int32(factors.bits), zero_point, clip)


def coarse_enough(scale: float, operands: Sequence[float]) -> float:
    """The step of a sum's grid: not so fine that an operand's factor would not fit."""
    return max([scale, *(step / _FINEST for step in operands)])
