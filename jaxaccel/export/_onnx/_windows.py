"""Rules for convolutions, poolings and padding: of ONNX's own kind, with channels first."""

from collections.abc import Callable, Sequence
from functools import partial
from math import prod
from typing import Any

import numpy as np
from jax import lax
from jaxtyping import Array

from jaxaccel._graph import Node
from jaxaccel.export._onnx import _ops
from jaxaccel.export._onnx._converted import at
from jaxaccel.export._onnx._elements import Rule
from jaxaccel.export._onnx._moved import Held, Moved, dtype_of, moved, ordered, plain, shape_of

_LETTERS = "DHW"


def convolution(node: Node, operands: list[Held]) -> Sequence[Held] | None:
    """In any layout, of one to three axes."""
    p, numbers = node.params, node.params["dimension_numbers"]
    x, kernel = operands
    if np.issubdtype(dtype_of(x), np.integer):
        raise NotImplementedError(
            f"{at(node.name, node.source)}: convolves integers; pass the function of "
            "jx.quantize.int8 itself"
        )
    if p["batch_group_count"] != 1 or len(numbers.lhs_spec) > 5:
        return None
    images, taps = ordered(x, numbers.lhs_spec), ordered(kernel, numbers.rhs_spec)
    if set(p["lhs_dilation"]) != {1}:
        return [moved(_transposed(node, images, taps), numbers.out_spec)]
    return [moved(convolved(images, taps, None, p), numbers.out_spec)]


def convolved(images: Array, taps: Array, bias: Array | None, p: dict[str, Any]) -> Array:
    """Channels first; the parameters are those of `lax.conv_general_dilated`."""
    edges = [(int(low), int(high)) for low, high in p["padding"]]
    if any(low < 0 or high < 0 for low, high in edges):
        cut = [(min(low, 0), min(high, 0)) for low, high in edges]
        images = _cut(images, cut)
        edges = [(max(low, 0), max(high, 0)) for low, high in edges]
    run = partial(
        _convolved,
        edges=edges,
        strides=p["window_strides"],
        dilation=p["rhs_dilation"],
        groups=p["feature_group_count"],
    )
    made = _ops.operation(
        "Conv",
        run,
        *(x for x in (images, taps, bias) if x is not None),
        kernel_shape=tuple(taps.shape[2:]),
        strides=tuple(p["window_strides"]),
        dilations=tuple(p["rhs_dilation"]),
        pads=_ends(edges),
        group=p["feature_group_count"],
    )
    wanted = p["preferred_element_type"]
    return made if wanted in (None, made.dtype) else made.astype(wanted)


def _convolved(
    images: Array,
    taps: Array,
    bias: Array | None = None,
    *,
    edges: Any,
    strides: Any,
    dilation: Any,
    groups: int,
) -> Array:
    made = lax.conv_general_dilated(
        images, taps, strides, edges, rhs_dilation=dilation, feature_group_count=groups,
        dimension_numbers=_layout(images.ndim),
    )  # fmt: skip
    return made if bias is None else made + bias.reshape(-1, *[1] * (images.ndim - 2))


def _layout(rank: int) -> tuple[str, str, str]:
    letters = _LETTERS[5 - rank :]
    return f"NC{letters}", f"OI{letters}", f"NC{letters}"


def _transposed(node: Node, images: Array, taps: Array) -> Array:
    """With gaps between the pixels: for jax2onnx, which writes it as ``ConvTranspose``."""
    numbers = lax.conv_dimension_numbers(images.shape, taps.shape, _layout(images.ndim))
    (made,) = node.run([images, taps], dimension_numbers=numbers)
    return made


def _ends(edges: Sequence[tuple[int, int]]) -> tuple[int, ...]:
    return tuple([low for low, _ in edges] + [high for _, high in edges])


def _cut(images: Array, edges: Sequence[tuple[int, int]]) -> Array:
    starts = [0, 0, *(-low for low, _ in edges)]
    ends = [size + high for size, (_, high) in zip(images.shape[2:], edges, strict=True)]
    return lax.slice(images, starts, [*images.shape[:2], *ends])


def pooling(node: Node, operands: list[Held]) -> Sequence[Held] | None:
    """The largest, the smallest or the sum of each window."""
    x, p = operands[0], node.params
    if not np.issubdtype(dtype_of(x), np.floating):
        raise NotImplementedError(
            f"{at(node.name, node.source)}: ONNX has no pooling of {dtype_of(x)}; cast to float32"
        )
    if node.name == "reduce_window_min":
        found = pooled(x, p, "MaxPool", lambda pool, images: -pool(-images))
    elif node.name == "reduce_window_max":
        found = pooled(x, p, "MaxPool")
    else:
        size = np.asarray(np.prod(p["window_dimensions"]), dtype_of(x))
        found = pooled(x, p, "AveragePool", lambda pool, images: pool(images) * size)
    if found is None:
        raise NotImplementedError(
            f"{at(node.name, node.source)}: ONNX has no pooling with gaps between the elements, "
            "of sums in dilated windows, or over more than three axes; write it in terms of other "
            "operations"
        )
    return [found]


def pooled(
    x: Held,
    p: dict[str, Any],
    name: str,
    run: Callable[[Callable[[Array], Array], Array], Array] = lambda pool, images: pool(images),
) -> Held | None:
    """``run`` of a pooling and the images, channels first; None where ONNX has no such pooling."""
    order = _channels_first(x, p)
    if set(p["base_dilation"]) != {1}:
        return None
    if order is None:
        return _as_images(x, p, name, run)
    window, strides, dilation, edges = (
        [p[name][axis] for axis in order[2:]]
        for name in ("window_dimensions", "window_strides", "window_dilation", "padding")
    )
    if name == "AveragePool" and set(dilation) != {1}:
        return None
    pool = lambda images: _pooled(images, window, strides, dilation, edges, name)
    return moved(run(pool, ordered(x, order)), order)


_SIZES = ("window_dimensions", "window_strides", "window_dilation")


def _is_pooled(p: dict[str, Any], axis: int) -> bool:
    return any(p[name][axis] != 1 for name in _SIZES) or p["padding"][axis] != (0, 0)


def _as_images(x: Held, p: dict[str, Any], name: str, run: Any) -> Held | None:
    """As images of one channel: of fewer axes that are not pooled, or of more."""
    rank = len(shape_of(x))
    axes = [axis for axis in range(rank) if _is_pooled(p, axis)]
    apart = [axis for axis in range(rank) if axis not in axes]
    if not 1 <= len(axes) <= 3:
        return None
    array = ordered(x, (*apart, *axes))
    sizes, rest = array.shape[: len(apart)], array.shape[len(apart) :]
    lead = {**dict.fromkeys((*_SIZES, "base_dilation"), (1, 1)), "padding": ((0, 0),) * 2}
    inner = {key: (*first, *(p[key][axis] for axis in axes)) for key, first in lead.items()}
    made = pooled(_ops.reshape(array, (prod(sizes), 1, *rest)), inner, name, run)
    if made is None:
        return None
    return moved(_ops.reshape(made, (*sizes, *made.shape[2:])), (*apart, *axes))


def _channels_first(x: Held, p: dict[str, Any]) -> tuple[int, ...] | None:
    """An order of axes of which the first two are not pooled, and one to three follow."""
    pooled = [_is_pooled(p, axis) for axis in range(len(shape_of(x)))]
    order = x.order if isinstance(x, Moved) else tuple(range(len(pooled)))
    apart = [axis for axis in order if not pooled[axis]][:2]
    if len(apart) < 2 or not 3 <= len(order) <= 5:
        return None
    return (*apart, *(axis for axis in order if axis not in apart))


def _pooled(
    images: Array,
    window: Sequence[int],
    strides: Sequence[int],
    dilation: Sequence[int],
    edges: Sequence[tuple[int, int]],
    name: str,
) -> Array:
    edges = [(int(low), int(high)) for low, high in edges]
    outside = 0 if name == "AveragePool" else -np.inf
    if any(not 0 <= end < size for ends, size in zip(edges, window, strict=True) for end in ends):
        # onnxruntime takes no padding as wide as the window.
        images = _ops.pad(images, np.asarray(outside, images.dtype), ((0, 0), (0, 0), *edges))
        edges = [(0, 0)] * len(edges)
    options = {"count_include_pad": 1} if name == "AveragePool" else {"dilations": tuple(dilation)}
    run = partial(
        _windows, window=window, strides=strides, dilation=dilation, edges=edges, name=name
    )
    return _ops.operation(
        name, run, images, kernel_shape=tuple(window), strides=tuple(strides), pads=_ends(edges),
        **options,
    )  # fmt: skip


def _windows(
    images: Array, *, window: Any, strides: Any, dilation: Any, edges: Any, name: str
) -> Array:
    largest = name == "MaxPool"
    start = -np.inf if largest else 0
    found = lax.reduce_window(
        images, np.asarray(start, images.dtype), lax.max if largest else lax.add,
        (1, 1, *window), (1, 1, *strides), ((0, 0), (0, 0), *edges),
        window_dilation=(1, 1, *dilation),
    )  # fmt: skip
    return found if largest else found / np.asarray(np.prod(window), images.dtype)


def padding(node: Node, operands: list[Held]) -> Sequence[Held] | None:
    """Also between the elements."""
    x, value = operands
    return [padded(x, plain(value), node.params["padding_config"])]


def padded(x: Held, fill: Any, padding: Sequence[Any]) -> Held:
    """In whatever order of axes; the padding is that of `lax.pad`."""
    config = [tuple(map(int, one)) for one in padding]
    order = x.order if isinstance(x, Moved) else tuple(range(len(config)))
    array = ordered(x, order)
    for place, axis in enumerate(order):
        if config[axis][2]:
            array = _spread(array, fill, place, config[axis][2])
    edges = tuple((config[axis][0], config[axis][1]) for axis in order)
    return moved(_ops.pad(array, fill, edges) if any(map(any, edges)) else array, order)


def _spread(array: Array, fill: Array, axis: int, gap: int) -> Array:
    """With `gap` elements of padding between any two along an axis."""
    size = array.shape[axis]
    whole = (*array.shape[: axis + 1], 1, *array.shape[axis + 1 :])
    edges = [(0, 0)] * len(whole)
    edges[axis + 1] = (0, gap)
    wide = _ops.pad(_ops.reshape(array, whole), fill, tuple(edges))
    merged = (*array.shape[:axis], size * (gap + 1), *array.shape[axis + 1 :])
    return lax.slice_in_dim(_ops.reshape(wide, merged), 0, size * (gap + 1) - gap, axis=axis)


RULES: dict[str, Rule] = {
    "conv_general_dilated": convolution,
    "pad": padding,
    **dict.fromkeys(("reduce_window_max", "reduce_window_min", "reduce_window_sum"), pooling),
}
