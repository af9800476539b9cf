"""The numbers of a layer: its kernel in 8 bits, and what is done to its accumulator."""

from collections.abc import Sequence
from functools import partial
from math import log2

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxaccel.quantize._arithmetic import Grid, coarse_enough
from jaxaccel.quantize._execute import Constants, per_output
from jaxaccel.quantize._layers import Kernel, Layer
from jaxaccel.quantize._program import Joined, Mean, Program, Sum, end_of, operands_of
from jaxaccel.quantize._qtensor import QTensor, quantized

_MOST_BITS = 24  # of a shift: what more would lose is below half a step anyway
_MOST_BIAS_BITS = 29
_LEAST_UNIT = 2.0**-60  # of a bias: 2^31 of it are below half a step of float32
_UNIT = -20  # the exponent of the bias' own unit, relative to it, where a channel has no weights


def _largest(x: Array, axes: tuple[int, ...]) -> Array:
    rest = tuple(i for i in range(x.ndim) if i not in axes)
    return jnp.max(jnp.abs(x.astype(jnp.float32)), axis=rest, keepdims=True)


@jax.jit
def _rounded(x: Array, scale: Array) -> Array:
    return jnp.clip(jnp.round(x.astype(jnp.float32) / scale), -127, 127).astype(jnp.int8)


@partial(jax.jit, static_argnames="axes")
def _error(x: Array, scale: Array, axes: tuple[int, ...]) -> Array:
    rest = tuple(i for i in range(x.ndim) if i not in axes)
    return ((x - _rounded(x, scale) * scale) ** 2).sum(axis=rest, keepdims=True)


def exponents(x: Float[Array, "..."], axes: Sequence[int]) -> Int[np.ndarray, "..."]:
    """Of the power of two, for each output channel, with the least squared error.

    Where all weights are zero: the exponent of 1.
    """
    axes = tuple(axes)
    largest = np.asarray(jax.jit(_largest, static_argnames="axes")(x, axes=axes), np.float64)
    high = np.ceil(np.log2(np.where(largest > 0, largest, 127) / 127)).astype(int)
    errors = [
        np.asarray(_error(x, jnp.asarray(2.0**e, jnp.float32), axes)) for e in (high, high - 1)
    ]
    return np.where(errors[1] < errors[0], high - 1, high)


def kernel(x: Float[Array, "..."], axes: Sequence[int], power: bool) -> QTensor:
    """In 8 bits, with float scales or powers of two."""
    if not power:
        return quantized(x, tuple(axes))
    return with_scale(x, jnp.asarray(2.0 ** exponents(x, axes), jnp.float32))


def top(q: QTensor) -> float:
    """The largest scale of a channel that has weights, 0 where none has."""
    shared = tuple(i for i, size in enumerate(q.scale.shape) if size == 1)
    alive = jnp.any(q.values != 0, axis=shared, keepdims=True)
    return float(jnp.max(jnp.where(alive, q.scale, 0)))


def with_scale(x: Float[Array, "..."], scale: Float[Array, "..."]) -> QTensor:
    """In 8 bits, with this scale."""
    return QTensor(_rounded(x, scale), scale, jnp.asarray(x).dtype.name)


def float_layer(
    layer: Layer, q: QTensor, bias: np.ndarray | None, data: Grid, result: Grid | None
) -> Constants:
    """The numbers of a layer: its bias as it was, `result` None where it gives a real number."""
    wide = np.asarray(q.scale, np.float64)
    unit = per_output(layer.contraction, layer.kernel, wide) * data.scale
    if bias is not None:  # beside which a smaller unit would add nothing
        unit = np.maximum(unit, np.abs(bias) * _LEAST_UNIT)
    multiplier = unit if result is None else unit / result.scale
    whole = None if bias is None else jnp.asarray(bias / unit, jnp.float32)
    return Constants(jnp.asarray(multiplier, jnp.float32), whole)


def shift_layer(
    layer: Layer, q: QTensor, bias: np.ndarray | None, data: Grid, result: Grid | None
) -> Constants:
    """The same where all scales are powers of two, those of `q` as `fitting` leaves them."""
    reads = int(log2(data.scale))
    power = per_output(layer.contraction, layer.kernel, _exponents_of(q))
    unit = 2.0 ** (power + reads)
    steps = None if bias is None else jnp.asarray(np.round(bias / unit), jnp.int32)
    if result is None:
        return Constants(jnp.asarray(unit, jnp.float32), steps)
    bits = jnp.asarray(int(log2(result.scale)) - power - reads, jnp.int32)
    return Constants(None, steps, bits)


def _exponents_of(q: QTensor) -> Int[np.ndarray, "..."]:
    return np.round(np.log2(np.asarray(q.scale, np.float64))).astype(int)


def fitting(
    layer: Layer, x: Array, q: QTensor, bias: np.ndarray | None, data: Grid, result: Grid | None
) -> QTensor:
    """The kernel with powers of two that grow where the shift would be too long, or the bias too
    large; where a channel has no weights they are those of its bias.
    """
    own = np.zeros(()) if bias is None else _to_leaf(layer.kernel, np.abs(bias), x.ndim)
    reads, old = int(log2(data.scale)), _exponents_of(q)
    size = np.ceil(np.log2(np.where(own == 0, 1, own))).astype(int) - reads
    empty = np.asarray(_largest(x, layer.kernel.axes)) == 0
    power = np.where(empty, size + _UNIT, old)
    if result is not None:
        longest = int(log2(result.scale)) - reads
        power = np.clip(power, longest - _MOST_BITS, np.where(empty, longest, power.max()))
    power = np.where(own == 0, power, np.maximum(power, size - _MOST_BIAS_BITS))
    scale = jnp.asarray(2.0**power, jnp.float32)
    values = jnp.where(power == old, q.values, with_scale(x, scale).values)
    return QTensor(values, scale, q.dtype)


def _to_leaf(kernel: Kernel, x: np.ndarray, rank: int) -> np.ndarray:
    """A number for each output channel, along the axes of the leaf."""
    kept = [axis for axis in kernel.outs if axis is not None]
    x = x.reshape([n for n, axis in zip(x.shape, kernel.outs, strict=True) if axis is not None])
    x = x.transpose(np.argsort(kept))
    sizes = dict(zip(sorted(kept), x.shape, strict=True))
    return x.reshape([sizes.get(axis, 1) for axis in range(rank)])


def coarsened(program: Program, grids: Sequence[Grid], tops: dict[Layer, float]) -> list[Grid]:
    """The grids, none of them so fine that a rescaling to it would not fit its integers.

    `tops` has the largest scale of each kernel where these are powers of two: no shift may be to
    the left.
    """
    found = list(grids)

    def widen(place: int, scale: float) -> None:
        found[place] = Grid(max(found[place].scale, scale), found[place].zero_point)

    for _ in grids:  # a grid may be read before the place where it is widened, if it is shared
        before = list(found)
        for step in program.steps.values():
            end = program.integers.get(end_of(step))
            if end is None:
                continue
            reads = [found[program.integers[x]].scale for x in operands_of(step)]
            if isinstance(step, Sum | Joined):
                widen(end, coarse_enough(0.0, reads))
            elif isinstance(step, Mean):
                widen(end, coarse_enough(0.0, [reads[0] * step.factor]))
            elif isinstance(step, Layer) and step in tops:
                widen(end, reads[0] * tops[step])
        if found == before:
            break
    return found
