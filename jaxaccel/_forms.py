"""Equivalent forms of an op: the same maths, arranged the way a backend runs it fastest.

XLA:CPU runs a depthwise convolution and the gradient of max pooling as slow loops of its own, but
fuses shifted multiply-adds well. The form is chosen while tracing, by ``jax.default_backend()``:
a function traced for another backend than the default one keeps the default one's form, which is
slower there but equal.
"""

from collections.abc import Sequence
from functools import partial, reduce
from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

_LAYOUT = ("NHWC", "HWIO", "NHWC")
# Every tap is an operation of the compiled program: beyond 7x7 compiling costs more than it saves.
_MAX_TAPS = 49
# Rows summed by unrolled code before XLA's slower reduction: 2 and 4 leave up to 10 times the
# time on large inputs, 16 gains nothing more.
_UNROLLED_ROWS = 8


class Window(NamedTuple):
    """How a kernel moves over the two spatial axes: (height, width) each."""

    strides: tuple[int, int]
    pads: tuple[tuple[int, int], tuple[int, int]]
    dilation: tuple[int, int]


def depthwise_conv(
    lhs: Float[Array, "batch height width channel"],
    rhs: Float[Array, "rows columns 1 out"],
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: Any = None,
    feature_group_count: int = 1,
    batch_group_count: int = 1,
    precision: Any = None,
    preferred_element_type: Any = None,
    out_sharding: Any = None,
) -> Float[Array, "batch out_height out_width out"]:
    """`jax.lax.conv_general_dilated`, with a depthwise convolution as shifted multiply-adds on CPU.

    The form is used where the default backend is the CPU, the layouts are NHWC and HWIO, each
    group has one input channel, the kernel has at most 49 taps, the operands are floating, and
    neither ``lhs_dilation``, ``batch_group_count`` nor ``out_sharding`` is asked for. All else
    goes to `jax.lax.conv_general_dilated` unchanged. Gradients have forms of their own, and every
    JAX transformation composes; forward mode is the slower one.

    Args:
        lhs: The images.
        rhs: The kernel; output channel o reads input channel o // (out / channel).
        window_strides: One stride per spatial axis.
        padding: "SAME", "VALID", "SAME_LOWER", or (low, high) per spatial axis.
        lhs_dilation: Only 1 takes the form.
        rhs_dilation: One dilation of the kernel per spatial axis.
        dimension_numbers: As in `jax.lax.conv_general_dilated`.
        feature_group_count: The number of input channels takes the form.
        batch_group_count: Only 1 takes the form.
        precision: The form computes at full precision, whatever is asked.
        preferred_element_type: The result's dtype; that of the operands by default. The form
            accumulates in float32 (float64 for float64 operands).
        out_sharding: Only None takes the form.

    Returns:
        The convolution.

    Raises:
        TypeError: As `jax.lax.conv_general_dilated` raises.
        ValueError: As `jax.lax.conv_general_dilated` raises.

    Example:
        >>> x, kernel = jnp.ones((1, 4, 4, 2)), jnp.ones((3, 3, 1, 2))
        >>> depthwise_conv(x, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"),
        ...                feature_group_count=2)[0, :, :, 0]
        Array([[9., 9.], [9., 9.]], dtype=float32)
    """
    taken = (
        jax.default_backend() == "cpu"
        and batch_group_count == 1
        and out_sharding is None
        and all(d == 1 for d in lhs_dilation or ())
        and _is_depthwise(lhs, rhs, dimension_numbers, feature_group_count)
    )
    if taken:
        window = _window(lhs, rhs, window_strides, padding, rhs_dilation)
        if all(size > 0 for size in _out_size(lhs.shape, rhs.shape, window)):
            return _depthwise_form(lhs, rhs, window, preferred_element_type)
    return lax.conv_general_dilated(
        lhs,
        rhs,
        window_strides,
        padding,
        lhs_dilation,
        rhs_dilation,
        dimension_numbers,
        feature_group_count,
        batch_group_count,
        precision,
        preferred_element_type,
        out_sharding,
    )


def max_pool(
    x: Float[Array, "batch height width channel"], window: int
) -> Float[Array, "batch out_height out_width channel"]:
    """Maximum over non-overlapping ``window`` x ``window`` squares; a remainder is dropped.

    On CPU the maximum of strided slices, whose gradient XLA fuses; elsewhere
    `jax.lax.reduce_window`. The gradient goes to the first maximum of each square in row-major
    order in both, so ties (zeros after a relu) behave alike.

    Args:
        x: The images.
        window: The side of a square in pixels, at least 1.

    Returns:
        The pooled images, height // window by width // window.

    Raises:
        ValueError: If ``window`` is below 1.

    Example:
        >>> max_pool(jnp.arange(12.0).reshape(1, 3, 4, 1), 2)[0, :, :, 0]
        Array([[5., 7.]], dtype=float32)
    """
    if window < 1:
        raise ValueError(f"window: {window} is below 1; give the side of the square in pixels")
    if jax.default_backend() == "cpu" and min(x.shape[1:3]) >= window:
        return _compiled_max_pool(x, window)
    square = (1, window, window, 1)
    return lax.reduce_window(x, -jnp.inf, lax.max, square, square, "VALID")


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def _max_pool(x: Array, window: int) -> Array:
    return reduce(lax.max, _pixels(x, window))


@_max_pool.defjvp
def _max_pool_jvp(
    window: int, primals: tuple[Array], tangents: tuple[Array]
) -> tuple[Array, Array]:
    """Autodiff would pad each slice's gradient and halve it on ties; this is one selection."""
    (x,), (dx,) = primals, tangents
    best = _max_pool(x, window)
    first = jnp.zeros(best.shape, jnp.int32)
    for i, pixel in reversed(list(enumerate(_pixels(x, window)))):
        first = jnp.where(pixel == best, i, first)
    chosen = first[:, :, None, :, None] == jnp.arange(window**2).reshape(window, 1, window, 1)
    batch, rows, columns, channels = best.shape
    dx = dx[:, : rows * window, : columns * window]
    # In two steps: a mesh with explicit axes splits one axis at a time.
    squares = dx.reshape(batch, rows, window, columns * window, channels)
    squares = squares.reshape(batch, rows, window, columns, window, channels)
    return best, jnp.where(chosen, squares, 0).sum((2, 4))


_compiled_max_pool = jax.jit(_max_pool, static_argnums=1, inline=True)


def _pixels(x: Array, window: int) -> list[Array]:
    """The pixels of every square, one array per place in the square, in row-major order."""
    size = (x.shape[1] // window, x.shape[2] // window)
    step = Window((window, window), ((0, 0), (0, 0)), (1, 1))
    return [_tap(x, index, size, step) for index in _indices((window, window))]


def _is_depthwise(lhs: Array, rhs: Array, dimension_numbers: Any, groups: int) -> bool:
    if lhs.ndim != 4 or rhs.ndim != 4 or lhs.dtype != rhs.dtype:
        return False
    layout = lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers)
    return (
        layout == lax.conv_dimension_numbers(lhs.shape, rhs.shape, _LAYOUT)
        and jnp.issubdtype(lhs.dtype, jnp.floating)
        and groups == lhs.shape[3]
        and rhs.shape[2] == 1
        and rhs.shape[3] % groups == 0
        and 0 < rhs.shape[0] * rhs.shape[1] <= _MAX_TAPS
    )


def _window(
    lhs: Array,
    rhs: Array,
    strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    dilation: Sequence[int] | None,
) -> Window:
    dilation = tuple(dilation or (1, 1))
    if isinstance(padding, str):
        reach = [(k - 1) * d + 1 for k, d in zip(rhs.shape[:2], dilation, strict=True)]
        padding = lax.padtype_to_pads(lhs.shape[1:3], reach, tuple(strides), padding)
    (top, bottom), (left, right) = padding
    return Window(
        (strides[0], strides[1]), ((top, bottom), (left, right)), (dilation[0], dilation[1])
    )


def _out_size(lhs_shape: Sequence[int], rhs_shape: Sequence[int], window: Window) -> list[int]:
    return [
        (size + sum(pads) - (k - 1) * d - 1) // s + 1
        for size, k, s, pads, d in zip(lhs_shape[1:3], rhs_shape[:2], *window, strict=True)
    ]


# Inlined into any outer trace; called outside of one, it compiles once, not once per tap.
@partial(jax.jit, static_argnums=(2, 3), inline=True)
def _depthwise_form(lhs: Array, rhs: Array, window: Window, dtype: Any) -> Array:
    wide = jnp.promote_types(lhs.dtype, jnp.float32)
    # A channel with several outputs is that many equal channels.
    x = jnp.repeat(lhs.astype(wide), rhs.shape[3] // lhs.shape[3], axis=3)
    return _depthwise(x, rhs.astype(wide), window).astype(dtype or lhs.dtype)


@partial(jax.custom_jvp, nondiff_argnums=(2,))
def _depthwise(x: Array, kernel: Array, window: Window) -> Array:
    return _multiply_add(_pad(x, window.pads), kernel, window)


@_depthwise.defjvp
def _depthwise_jvp(
    window: Window, primals: tuple[Array, Array], tangents: tuple[Array, Array]
) -> tuple[Array, Array]:
    """The tangents are written for their transposes, which are what reverse mode runs.

    Autodiff of the multiply-adds is right as well, but its kernel gradient is one slow reduction
    per tap. A ``custom_vjp`` would forbid forward mode.
    """
    (x, kernel), (dx, dkernel) = primals, tangents
    out = _depthwise(x, kernel, window)
    (from_x,) = jax.linear_transpose(lambda g: _x_gradient(g, kernel, x.shape, window), out)(dx)
    return out, from_x + _kernel_tangent(dkernel, x, out.shape, window)


def _x_gradient(g: Array, kernel: Array, shape: Sequence[int], window: Window) -> Array:
    """The multiply-adds of the flipped kernel over ``g``, spread out by the strides."""
    edges = []
    for axis, (k, s, (low, _), d) in enumerate(zip(kernel.shape[:2], *window, strict=True), 1):
        before = (k - 1) * d - low
        spread = (g.shape[axis] - 1) * s + 1
        edges.append((before, shape[axis] + (k - 1) * d - before - spread))
    spread_g = _pad(g, edges, [s - 1 for s in window.strides])
    return _multiply_add(spread_g, kernel[::-1, ::-1], window._replace(strides=(1, 1)))


def _kernel_tangent(dkernel: Array, x: Array, shape: Sequence[int], window: Window) -> Array:
    """The multiply-adds, arranged so that the transpose first adds up rows tap by tap.

    The transpose of the split is one concatenation of every tap's row sums; the barrier keeps XLA
    from fusing those sums into the reduction behind it, which would lose the vector code.
    """
    batch, rows, columns, channels = shape
    unrolled = min(rows, _UNROLLED_ROWS)
    blocks = -(-rows // unrolled)
    stride, (top, bottom) = window.strides[0], window.pads[0]
    x = _pad(x, ((top, bottom + stride * (blocks * unrolled - rows)), window.pads[1]))
    indices = _indices(dkernel.shape[:2])
    flat = dkernel.reshape(len(indices), channels)
    spread = lax.broadcast_in_dim(flat, (len(indices), batch, blocks, columns, channels), (0, 4))
    taps = lax.split(lax.optimization_barrier(spread), [1] * len(indices))
    every = window._replace(strides=(stride * unrolled, window.strides[1]))
    by_row = []
    for r in range(unrolled):
        seen = lax.slice_in_dim(x, stride * r, None, axis=1)
        slices = (_tap(seen, index, (blocks, columns), every) for index in indices)
        by_row.append(sum(a * tap[0] for a, tap in zip(slices, taps, strict=True)))
    return jnp.stack(by_row, axis=2).reshape(batch, blocks * unrolled, columns, channels)[:, :rows]


def _multiply_add(x: Array, kernel: Array, window: Window) -> Array:
    """Sum over the taps of the slice of ``x`` a tap sees times the tap, per channel."""
    unpadded = window._replace(pads=((0, 0), (0, 0)))
    size = _out_size(x.shape, kernel.shape, unpadded)
    products = [
        _tap(x, index, size, window) * kernel[index][0] for index in _indices(kernel.shape[:2])
    ]
    return sum(products[1:], start=products[0])


def _tap(x: Array, index: tuple[int, int], size: Sequence[int], window: Window) -> Array:
    """The ``size`` pixels of ``x`` that the tap at ``index`` meets as the window moves."""
    start = [i * d for i, d in zip(index, window.dilation, strict=True)]
    stop = [a + (n - 1) * s + 1 for a, n, s in zip(start, size, window.strides, strict=True)]
    return lax.slice(x, (0, *start, 0), (x.shape[0], *stop, x.shape[3]), (1, *window.strides, 1))


def _pad(x: Array, edges: Sequence[tuple[int, int]], interior: Sequence[int] = (0, 0)) -> Array:
    spatial = [(low, high, gap) for (low, high), gap in zip(edges, interior, strict=True)]
    return lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *spatial, (0, 0, 0)])


def _indices(shape: Sequence[int]) -> list[tuple[int, int]]:
    return [divmod(i, shape[1]) for i in range(prod(shape))]
