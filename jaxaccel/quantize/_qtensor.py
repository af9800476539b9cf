"""Quantized tensors as pytree leaves: int8 values with a scale for each output channel."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Float, Float32, Int8, PyTree

from jaxaccel._select import Where, flatten, is_kernel, rebuild, select


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("values", "scale"), meta_fields=("dtype",)
)
@dataclasses.dataclass(frozen=True)
class QTensor:
    """A tensor in 8 bits: ``x ≈ values * scale``.

    Invariants, for a tensor `x` quantized along its last axis (output channel c):

    - ``values`` is int8 in [-127, 127] (symmetric: -128 is not used), of the shape of x;
    - ``scale`` is float32 > 0, of shape ``(1, ..., 1, channels)``;
      ``scale[c] = max|x[..., c]| / 127``, or 1 where a channel is all zero;
    - ``|x - values * scale| <= scale / 2``, and a zero stays exactly zero;
    - ``dtype`` is the name of the type of x, to which `dequantize` returns.

    It is a pytree of two leaves: it passes through `jax.jit`, is sharded and is counted in bytes
    like any other.
    """

    values: Int8[Array, "..."]
    scale: Float32[Array, "..."]
    dtype: str

    def dequantize(self) -> Float[Array, "..."]:
        """``values * scale`` in the original type."""
        return (self.values.astype(jnp.float32) * self.scale).astype(self.dtype)


def weights(params: PyTree, bits: int = 8, *, where: Where | None = None) -> PyTree:
    """Quantize the weights: a tree like `params` with `QTensor` leaves.

    Args:
        params: a tree of parameters.
        bits: 8.
        where: which leaves: a glob over paths, a predicate ``(path, leaf) -> bool``, or a mapping
            from globs to True or False; a glob chooses among floating-point leaves with two or
            more axes. By default all of these; biases, scales and statistics stay as they are.

    Returns:
        The tree with a `QTensor` for each selected leaf, scaled per output channel (last axis).

    Raises:
        ValueError: `bits` is not 8, nothing is selected, or a leaf is not floating point, has
            fewer than two axes, or holds a value that is not finite.

    >>> import jax.numpy as jnp
    >>> q = weights({"kernel": jnp.array([[1.0, 0.5], [-2.0, 0.25]])})["kernel"]
    >>> q.values
    Array([[  64,  127],
           [-127,   64]], dtype=int8)
    >>> q.scale.shape
    (1, 2)
    """
    if bits != 8:
        raise ValueError(f"bits={bits!r} must be 8")
    leaves = flatten(params, is_qtensor)
    chosen = select(leaves, where, is_kernel)
    if not chosen:
        raise ValueError("weights: no leaf to quantize; pass where= to choose leaves")
    return rebuild(
        params,
        {path: _quantize(path, x) if path in chosen else x for path, x in leaves.items()},
        is_qtensor,
    )


def is_qtensor(node: Any) -> bool:
    """Whether a node of a tree is a `QTensor`, as an ``is_leaf`` of `jax.tree.map`."""
    return isinstance(node, QTensor)


def _quantize(path: str, x: Any) -> QTensor:
    if is_qtensor(x) or not jnp.issubdtype(x.dtype, jnp.floating) or x.ndim < 2:
        kind = "a QTensor already" if is_qtensor(x) else f"{x.dtype} of shape {x.shape}"
        raise ValueError(f"{path}: is {kind}; leave it out of where=")
    if not isinstance(x, Tracer) and not bool(jnp.isfinite(x).all()):
        raise ValueError(f"{path}: holds NaN or infinity; train it again or restore a checkpoint")
    x32 = jnp.asarray(x, jnp.float32)
    largest = jnp.max(jnp.abs(x32), axis=tuple(range(x.ndim - 1)), keepdims=True)
    scale = jnp.where(largest > 0, largest / 127, jnp.ones_like(largest))
    # Subnormal channels: the division above may round down to zero or lose its precision.
    scale = jnp.maximum(scale, jnp.finfo(jnp.float32).tiny)
    values = jnp.clip(jnp.round(x32 / scale), -127, 127).astype(jnp.int8)
    return QTensor(values, scale, x.dtype.name)


def dequantize(qparams: PyTree) -> PyTree:
    """The tree with arrays again in place of its `QTensor` leaves.

    Inside `jax.jit` the weights are kept in 8 bits and widened where they are used:
    ``jax.jit(lambda q, x: fn(dequantize(q), x))``.

    >>> import jax.numpy as jnp
    >>> dequantize(weights({"kernel": jnp.array([[1.0, 0.5], [-2.0, 0.25]])}))["kernel"].round(2)
    Array([[ 1.01,  0.5 ],
           [-2.  ,  0.25]], dtype=float32)
    """
    return jax.tree.map(
        lambda node: node.dequantize() if is_qtensor(node) else node, qparams, is_leaf=is_qtensor
    )
