"""The forms of convolutions and products of int8, when each applies; the rules for int8.

XLA:CPU has a library for them that is several times as fast as float32. What does not stand as
that takes it goes to a loop of XLA's own, up to 200 times as slow. XLA:GPU has no convolution of
int8 with an int32 result at all.
"""

from math import prod

from jaxaccel._forms._banded import banded, columns
from jaxaccel._forms._conditions import (
    Condition,
    both,
    close,
    dense,
    depthwise,
    each_channel,
    few_groups,
    few_taps,
    gaps,
    one_tap,
    taps,
)
from jaxaccel._forms._contracted import im2col
from jaxaccel._forms._conv import ConvForm, alone, edged, phases, space_to_depth, split
from jaxaccel._forms._depthwise import shifted
from jaxaccel._forms._integers import (
    EXACT,
    FOUR,
    SIXTEEN,
    block_diagonal,
    float32_results,
    for_library,
)
from jaxaccel._forms._op import Op

_MANY_CHANNELS = 512
_FEW_PRODUCTS = 10_000
_MANY_PRODUCTS = 10**9  # more than a second in XLA:CPU's loop
_LAST = ((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))  # NHWC and HWIO


def in_library(op: Op) -> bool:
    """Whether XLA:CPU's library takes the convolution as it stands, and is fast."""
    channels = max(op.images[3], op.kernel[3]) > SIXTEEN and op.images[3] % FOUR == 0
    sizes = zip(op.places, op.kernel, op.images[1:3], strict=False)
    fits = all(max(n, k) <= pixels for n, k, pixels in sizes)
    return _last(op) and close(op) and channels and fits and op.conv.batch_groups == 1


def _last(op: Op) -> bool:
    layout = op.params["dimension_numbers"]
    return (layout.lhs_spec, layout.rhs_spec, layout.out_spec) == _LAST


def _grouped(op: Op) -> bool:
    several = op.conv.groups > 1 == op.conv.batch_groups
    return several and not each_channel(op) and op.images[3] <= 2 * _MANY_CHANNELS


def _few_channels(op: Op) -> bool:
    return dense(op) and close(op) and op.kernel[1] > 1 and op.kernel[2] <= SIXTEEN


def _patches(op: Op) -> bool:
    """Places that share no column."""
    return op.kernel[1] <= op.conv.strides[1]


def _strided(op: Op) -> bool:
    plain = op.conv.rhs_dilation == (1, 1) and not _patches(op)
    return _few_channels(op) and plain and prod(op.conv.strides) > 1


def _exact(op: Op) -> bool:
    """Not a kernel so large that even one channel exceeds what float32 holds."""
    return prod(op.kernel[:2]) <= EXACT


def one_sided(op: Op) -> bool:
    """A product that XLA:CPU's library does not take: of one row or column, or summed elsewhere."""
    ((left, right), (batch, _)), (a, b) = op.params["dimension_numbers"], map(len, op.shapes)
    last = lambda axes, rank: tuple(axes) == tuple(range(rank - len(axes), rank))
    first = tuple(right) == tuple(range(len(right)))
    taken = last(left, a) and (first or last(right, b)) and min(op.free) > 1
    return not batch and bool(left) and not taken


CPU, BOTH, CUDA = ("cpu",), ("cpu", "cuda"), ("cuda",)
CONVS: dict[str, tuple[ConvForm, Condition, tuple[str, ...]]] = {
    "shifted": (edged(alone(shifted)), depthwise, BOTH),
    "phases, shifted": (alone(phases(shifted)), both(depthwise, gaps), BOTH),
    "product": (im2col, one_tap, BOTH),
    "im2col": (im2col, taps, BOTH),
    "split, im2col": (split(im2col), both(few_groups, few_taps), BOTH),
    "banded 1": (banded(1), both(_few_channels, _patches), CPU),
    "banded 4": (banded(4), _few_channels, CPU),
    "banded 8": (banded(8), _few_channels, CPU),
    "columns 4": (columns(4), _few_channels, CPU),
    "space to depth": (space_to_depth(for_library), _strided, CPU),
    "library": (for_library, both(dense, lambda op: not in_library(op)), CPU),
    "phases, library": (phases(for_library), both(dense, gaps), CPU),
    "block diagonal": (block_diagonal(for_library), _grouped, CPU),
    "float32 results": (float32_results, both(dense, close, _exact), CUDA),
    "phases, float32 results": (phases(float32_results), both(dense, gaps, _exact), CUDA),
    "split, float32 results": (split(float32_results), both(few_groups, close, _exact), CUDA),
    "block diagonal, float32 results": (
        block_diagonal(float32_results), both(_grouped, close, _exact), CUDA,
    ),
}  # fmt: skip


def lacking(op: Op, platform: str) -> bool:
    """Whether XLA's own form is not worth a try."""
    if op.name != "conv_general_dilated":
        return False
    products = op.images[0] * prod(op.places) * op.terms * op.kernel[3]
    slow = not in_library(op) or (op.conv.groups > 1 and each_channel(op))
    return platform == "cuda" or (slow and products > _MANY_PRODUCTS)


def preferred(op: Op, platform: str) -> tuple[str, ...]:
    """Of what a 2-core CPU with AMX shows (`experiments.forms`)."""
    if op.name == "reduce_window_max":
        return ("maxima",) if platform == "cpu" else ()
    if op.name == "dot_general":
        products = prod(op.free) * prod(op.shapes[0]) // op.free[0]
        return ("by rows",) if products > _FEW_PRODUCTS else ()
    if one_tap(op):
        few = op.conv.strides > (1, 1) and op.images[0] == 1 and in_library(op)
        return () if few and platform == "cpu" else ("product",)
    if op.conv.groups > 1 and each_channel(op):
        return "phases, shifted", "shifted"
    return _on_cuda(op) if platform == "cuda" else _on_cpu(op)


def _on_cpu(op: Op) -> tuple[str, ...]:
    if not dense(op):
        many = op.images[3] > _MANY_CHANNELS and in_library(op)
        return () if many else ("block diagonal",)
    if not close(op):
        return "phases, library", "library"
    return (*_of_few_channels(op), "library")


def _of_few_channels(op: Op) -> tuple[str, ...]:
    """A band of the kernel, where that costs no more than filling the channels up."""
    (_, width, channels, out), step = op.kernel, op.conv.strides[1]
    few = channels <= FOUR or (channels % FOUR > 0 and channels < 3 * FOUR)
    if few and _patches(op):
        return "banded 1", "im2col"
    overlapping = width >= 2 * step
    if overlapping and step > 1 and FOUR - 1 <= channels <= FOUR:
        return ("columns 4",)
    if (few and overlapping) or (channels < SIXTEEN and out <= SIXTEEN):
        return "banded 8" if out < SIXTEEN else "banded 4", "im2col"
    return ()


def _on_cuda(op: Op) -> tuple[str, ...]:
    """By what XLA's library there has: no groups, no dilation."""
    plain = close(op) and op.conv.rhs_dilation == (1, 1)
    if not dense(op):
        first = "split, float32 results" if plain else "split, im2col"
        return first, "block diagonal, float32 results"
    if not close(op):
        return "phases, float32 results", "im2col"
    return ("float32 results", "im2col") if plain else ("im2col", "float32 results")
