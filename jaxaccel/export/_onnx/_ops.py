"""Operations of ONNX as a primitive of JAX: each carries its name, and what it computes in JAX.

So a function can be traced to them, run as it will be written, and written.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import mlir
from jaxtyping import Array

OPERATION = "jaxaccel_onnx"
NAMED = "jaxaccel_named"


class Sizes(tuple[int, ...]):
    """An operand of fixed integers: in ONNX of int64, which JAX may not have."""


def operation(name: str, run: Callable[..., Array], *inputs: Any, **attributes: Any) -> Array:
    """The operation `name` of ONNX, which computes ``run`` of those inputs that are arrays."""
    arrays = [x for x in inputs if not isinstance(x, Sizes)]
    places = tuple(x if isinstance(x, Sizes) else None for x in inputs)
    given = tuple(sorted(attributes.items()))
    return operation_p.bind(*arrays, name=name, run=run, inputs=places, attributes=given)


def named(array: Array, name: str) -> Array:
    """An array that is to have this name in the file."""
    return named_p.bind(array, name=name)


def _operation(*arrays: Array, run: Callable[..., Array], **_: Any) -> Array:
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        return run(*arrays)


def primitive(name: str, run: Callable[..., Array]) -> Primitive:
    """One that computes ``run(*arrays, **params)``."""

    def abstract(*avals: Any, **params: Any) -> Any:
        shapes = [jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in avals]
        found = jax.eval_shape(lambda *arrays: run(*arrays, **params), *shapes)
        return jax.core.ShapedArray(found.shape, found.dtype)

    made = Primitive(name)
    made.def_impl(run)
    made.def_abstract_eval(abstract)
    mlir.register_lowering(made, mlir.lower_fun(run, multiple_results=False))
    return made


operation_p = primitive(OPERATION, _operation)
named_p = primitive(NAMED, lambda array, name: array)


def reshape(x: Array, shape: tuple[Any, ...]) -> Array:
    """With at most one size that is not known, and none of 0, as ``-1`` says it."""
    sizes = Sizes(size if type(size) is int else -1 for size in shape)
    if sizes.count(-1) > 1 or 0 in sizes:
        return lax.reshape(x, shape)
    return operation("Reshape", lambda x: lax.reshape(x, shape), x, sizes)


def expanded(x: Array, sizes: tuple[int, ...], shape: tuple[Any, ...]) -> Array:
    """With the given sizes where it has 1, and its own where these are 1."""
    return operation("Expand", lambda x: jnp.broadcast_to(x, shape), x, Sizes(sizes))


def tiled(x: Array, repeats: tuple[int, ...]) -> Array:
    """Repeated along each axis."""
    return operation("Tile", lambda x: jnp.tile(x, repeats), x, Sizes(repeats))


def sliced(x: Array, cut: Mapping[int, tuple[int, int, int]]) -> Array:
    """By axis, from where to where, and which of them."""
    if not cut:
        return x
    places = tuple(slice(*cut[axis]) if axis in cut else slice(None) for axis in range(x.ndim))
    starts, ends, steps = map(Sizes, zip(*cut.values(), strict=True))
    return operation("Slice", lambda x: x[places], x, starts, ends, Sizes(cut), steps)


def relu(x: Array) -> Array:
    """Not ``Max`` with 0, which is not fused with what is before it."""
    return operation("Relu", lambda x: jnp.maximum(x, 0), x)


def clip(x: Array, low: Any, high: Any) -> Array:
    """Between two scalars."""
    return operation("Clip", lambda x, low, high: jnp.clip(x, low, high), x, low, high)


def scattered(x: Array, places: Array, updates: Array, reduction: str | None) -> Array:
    """With updates along the first axis at these places, in their place or combined with them."""

    def run(x: Array, places: Array, updates: Array) -> Array:
        rest = jnp.meshgrid(*map(jnp.arange, places.shape), indexing="ij", sparse=True)[1:]
        method = {"add": "add", "mul": "multiply", "max": "max", "min": "min"}
        change = getattr(x.at[places, *rest], method.get(reduction or "", "set"))
        return change(updates, mode="promise_in_bounds")

    how = {} if reduction is None else {"reduction": reduction}
    return operation("ScatterElements", run, x, places, updates, axis=0, **how)


def remainder(x: Array, y: Array) -> Array:
    """With the sign of `x`, as of `lax.rem`."""
    return operation("Mod", lax.rem, x, y, fmod=1)


def product(x: Array, y: Array) -> Array:
    """The matrix product of the last two axes; those before are the same, or missing in one."""
    return operation("MatMul", jnp.matmul, x, y)


def dense(x: Array, kernel: Array, bias: Array | None = None) -> Array:
    """A matrix product with a bias."""
    if bias is None:
        return operation("Gemm", jnp.matmul, x, kernel)
    return operation("Gemm", lambda x, kernel, bias: x @ kernel + bias, x, kernel, bias)


def pad(x: Array, value: Any, edges: tuple[tuple[int, int], ...]) -> Array:
    """With `value` before and after each axis; without these elements where that is negative."""
    sizes = Sizes([low for low, _ in edges] + [high for _, high in edges])
    run = lambda x, value: lax.pad(x, value, [(low, high, 0) for low, high in edges])
    return operation("Pad", run, x, sizes, value, mode="constant")


def quantized(x: Array, scale: Any, zero_point: Any) -> Array:
    """``clip(round(x / scale) + zero_point)``, of the zero point's type; halves to even."""
    return operation("QuantizeLinear", _quantized, x, scale, zero_point)


def _quantized(x: Array, scale: Array, zero_point: Array) -> Array:
    limits = jnp.iinfo(zero_point.dtype)
    steps = jnp.round(x / scale) + zero_point.astype(x.dtype)
    return jnp.clip(steps, limits.min, limits.max).astype(zero_point.dtype)


def dequantized(q: Array, scale: Any, zero_point: Any, axis: int | None = None) -> Array:
    """``(q - zero_point) * scale``; where these are vectors, along `axis`."""

    def run(q: Array, scale: Array, zero_point: Array) -> Array:
        sizes = [-1 if k == axis else 1 for k in range(q.ndim)]
        wide = lambda x: x if axis is None else x.reshape(sizes)
        return (q.astype(jnp.int32) - wide(zero_point).astype(jnp.int32)) * wide(scale)

    attributes = {} if axis is None else {"axis": axis}
    return operation("DequantizeLinear", run, q, scale, zero_point, **attributes)
