"""Quantized tensors as pytree leaves: 8-bit or packed 4-bit values and their scales."""

import dataclasses
import functools
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int8, PyTree, UInt8

from jaxaccel.quantize._packed import Packing, pack, unpack

Kind: TypeAlias = Literal["int", "float8_e4m3fn", "float8_e5m2"]
Calibration: TypeAlias = Literal["max", "mse"]

# Shares of max|x| / largest that "mse" tries: 1, 0.95, ... 0.3. A group of 32 normal numbers
# likes 0.8 to 1; a channel of thousands, with long tails, as little as 0.3.
_TRIED, _APART = 15, 0.05


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("values", "scale"),
    meta_fields=("dtype", "packing"),
)
@dataclasses.dataclass(frozen=True)
class QTensor:
    """A tensor in 8 or 4 bits: ``x ≈ values * scale``.

    Invariants, for a tensor `x`; the axes in `axes` (the last one: the output channel c) keep
    scales of their own, all others share them:

    - ``scale > 0``, and a zero stays exactly zero; where all that share a scale are zero it is 1;
    - ``dtype`` is the name of the type of x, to which `dequantize` returns; ``shape`` is that of x;
    - of int8: ``values`` is int8 in [-127, 127] (symmetric: -128 is not used), of the shape of x;
      ``scale`` is float32 with the rank of x, of size 1 on every axis that shares it;
      ``scale[c] = max|x[..., c]| / 127`` and ``|x - values * scale| <= scale / 2``;
    - of float8: the same with ``values`` in that type and its largest number L (448 for e4m3fn,
      57344 for e5m2) for 127; ``|x - values * scale| <= max(|x| * u, scale * v)``, where u is
      2^-4 (e5m2: 2^-3) and v is 2^-10 (e5m2: 2^-17), half the spacing of the smallest numbers;
    - of 4 bits: ``packing`` is set; with x as ``[rows, channels]`` (`axes` last, flattened) and g
      its group, ``values`` is uint8 of shape ``[ceil(rows / 2), channels]`` and holds the codes
      q in [-7, 7]: ``values[i] = (q[2i] + 8) + 16 (q[2i + 1] + 8)``, an odd last row has q = 0
      beside it; ``scale`` is bfloat16 of shape ``[ceil(rows / g), channels]``;
      ``x[i] ≈ q[i] * scale[i // g]``, a product that float32 holds exactly;
      ``scale = max|x| / 7`` of the group, rounded, and ``|x - q * scale| <= scale / 2``;
    - calibrated by "mse", ``scale`` is the one of ``r * max|x| / 7`` (int8: 127), r = 1, 0.95,
      ... 0.3, with the least ``sum (x - values * scale)^2`` of those that share it: never more
      than with r = 1, while ``|x - values * scale| <= max(scale / 2, |x| - 7 scale)``.

    The scales of 4 bits are bfloat16: 4.5 bits a number in groups of 32, where float32 would take
    5. The codes are chosen for the rounded scale, which leaves the error as it was (9.73% of
    normal numbers' norm with either); float16 would overflow or lose its precision below 6e-5.

    It is a pytree of two leaves: it passes through `jax.jit`, is sharded, is saved and is counted
    in bytes like any other.
    """

    values: Int8[Array, "..."] | UInt8[Array, "bytes channels"] | Float[Array, "..."]
    scale: Float[Array, "..."]
    dtype: str
    packing: Packing | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the tensor that it stands for."""
        return self.values.shape if self.packing is None else self.packing.shape

    @property
    def ndim(self) -> int:
        """The number of axes of the tensor that it stands for."""
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        """The bytes that it stores: values and scales."""
        return sum(part.size * part.dtype.itemsize for part in (self.values, self.scale))

    def dequantize(self) -> Float[Array, "..."]:
        """``values * scale`` in the original shape and type."""
        return _dequantized(self)


# Inlined where it is traced, so that transforms see the product and not a call.
@functools.partial(jax.jit, inline=True)
def _dequantized(q: QTensor) -> Float[Array, "..."]:
    scale = q.scale.astype(jnp.float32)
    if q.packing is None:
        return (q.values.astype(jnp.float32) * scale).astype(q.dtype)
    codes = unpack(q.values, q.packing.rows).astype(jnp.float32)
    return q.packing.tensor(codes * q.packing.spread(scale)).astype(q.dtype)


def is_qtensor(node: Any) -> bool:
    """Whether a node of a tree is a `QTensor`, as an ``is_leaf`` of `jax.tree.map`."""
    return isinstance(node, QTensor)


def all_finite(x: Any) -> bool:
    """Whether no number is NaN or infinite in float32, while nothing as large as `x` is made."""
    with jax.ensure_compile_time_eval(), np.errstate(over="ignore"):
        return bool(_largest_is_finite(x))


@jax.jit
def _largest_is_finite(x):
    return jnp.isfinite(jnp.max(jnp.abs(_widened(x)), initial=0))


def dequantize(qparams: PyTree) -> PyTree:
    """The tree with arrays again in place of its `QTensor` leaves.

    Inside `jax.jit` the weights are kept in 8 or 4 bits and widened where they are used:
    ``jax.jit(lambda q, x: fn(dequantize(q), x))``.

    >>> import jax.numpy as jnp
    >>> from jaxaccel.quantize import weights
    >>> dequantize(weights({"kernel": jnp.array([[1.0, 0.5], [-2.0, 0.25]])}))["kernel"].round(2)
    Array([[ 1.01,  0.5 ],
           [-2.  ,  0.25]], dtype=float32)
    """
    return jax.tree.map(
        lambda node: node.dequantize() if is_qtensor(node) else node, qparams, is_leaf=is_qtensor
    )


def quantized(
    x: Float[Array, "..."],
    axes: tuple[int, ...] = (-1,),
    *,
    bits: int = 8,
    kind: Kind = "int",
    group: int | None = None,
    calibration: Calibration = "max",
) -> QTensor:
    """One tensor quantized, as `weights` does; `x` is taken to be finite.

    Args:
        x: of any shape and floating-point type.
        axes: that keep scales of their own.
        bits: 8, or 4 where `kind` is "int".
        kind: of the values.
        group: at 4 bits, how many numbers share a scale; None: all along the other axes.
        calibration: "max", or where `kind` is "int" also "mse".

    >>> quantized(jnp.array([[2.0, 1.0], [0.0, -127.0]]), axes=(0,)).scale.shape
    (2, 1)
    """
    kept = tuple(sorted({axis % x.ndim for axis in axes}))
    if bits == 4:
        rows = Packing(x.shape, kept, 1).rows
        return _in_4_bits(x, Packing(x.shape, kept, group or max(rows, 1)), calibration)
    return _in_8_bits(x, kept, kind, calibration)


# Compiled as one, so that the steps' results are not held beside the tensor, each as large.
@functools.partial(jax.jit, static_argnames=("kept", "kind", "calibration"))
def _in_8_bits(x, kept: tuple[int, ...], kind: Kind, calibration: Calibration) -> QTensor:
    summed = tuple(axis for axis in range(x.ndim) if axis not in kept)
    if kind == "int":
        scale = _scale(x, summed, 127, calibration, "float32")
        return QTensor(_codes(x, scale, 127).astype(jnp.int8), scale, x.dtype.name)
    largest = float(jnp.finfo(kind).max)
    scale = _scale(x, summed, largest, calibration, "float32")
    # e4m3fn has no infinity: a quotient rounded past its largest number would become NaN.
    values = jnp.clip(_widened(x) / scale, -largest, largest).astype(kind)
    return QTensor(values, scale, x.dtype.name)


@functools.partial(jax.jit, static_argnames=("packing", "calibration"))
def _in_4_bits(x, packing: Packing, calibration: Calibration) -> QTensor:
    groups = packing.groups(x)
    scale = _scale(groups, (1,), 7, calibration, "bfloat16")
    codes = _codes(groups, scale, 7).astype(jnp.int8)
    flat = codes.reshape(codes.shape[0] * packing.group, packing.channels)[: packing.rows]
    return QTensor(pack(flat), scale[:, 0], x.dtype.name, packing)


def _widened(x: Float[Array, "..."]) -> Float[Array, "..."]:
    return x.astype(jnp.float32)


def _codes(x: Float[Array, "..."], scale: Float[Array, "..."], largest: float):
    return jnp.clip(jnp.round(_widened(x) / _widened(scale)), -largest, largest)


def _scale(x, summed: tuple[int, ...], largest: float, calibration: Calibration, dtype: str):
    """In `dtype`, with the rank of `x`: 1 where all is zero."""
    peak = _widened(jnp.max(jnp.abs(x), axis=summed, keepdims=True, initial=0))
    full = jnp.where(peak > 0, peak / largest, jnp.ones_like(peak))
    if calibration == "max":
        return _stored(full, largest, dtype)
    return _least_error(x, full, summed, largest, dtype)


def _stored(scale: Float[Array, "..."], largest: float, dtype: str) -> Float[Array, "..."]:
    """In the type that is kept, within what ``largest * scale`` in float32 allows."""
    # Subnormal: the division before may have rounded down to zero or lost its precision.
    low = jnp.finfo(jnp.float32).tiny
    high = float(jnp.finfo(jnp.float32).max) / largest * (1 - float(jnp.finfo(dtype).eps))
    return jnp.clip(scale, low, high).astype(dtype)


def _least_error(x, full, summed: tuple[int, ...], largest: float, dtype: str):
    """Of ``ratio * full`` the scale with the least squared error, the larger one where equal."""
    # In units of `full`: squares of the numbers themselves would overflow or vanish.
    unit = _widened(x) / full

    def error(scale):
        ratio = _widened(scale) / full
        off = unit - _codes(unit, ratio, largest) * ratio
        return jnp.sum(jnp.square(off), axis=summed, keepdims=True)

    def step(i, best):
        scale = _stored(full * (1 - _APART * i.astype(jnp.float32)), largest, dtype)
        found = error(scale)
        better = found < best[0]
        return jnp.where(better, found, best[0]), jnp.where(better, scale, best[1])

    unknown = jnp.full_like(full, jnp.inf)
    start = unknown, _stored(full, largest, dtype)
    return jax.lax.fori_loop(0, _TRIED, step, start)[1]
