"""Equivalent forms of an op: the same sum, arranged the way a backend runs it fastest.

`FORMS` is the table: name of a primitive -> name of a form -> the form, and when it applies.
`rule` chooses without timing; `jaxaccel.autotune` times what `candidates` names.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array

from jaxaccel._forms import _contracted, _conv, _depthwise, _pooling
from jaxaccel._forms._conv import (
    Conv,
    alone,
    canonical,
    conv_of,
    edged,
    out_size,
    phases,
    shapes_of,
    split,
)

XLA = "xla"  # the op itself
# Every tap or place is an operation of the compiled program: beyond 7x7 compiling costs more than
# it saves.
_MAX_TAPS = 49
_MAX_GROUPS = 16  # of channels, with a convolution each
_MAX_PHASES = 9
_FEW = 8  # numbers summed in a matrix product
_MANY = 100_000  # numbers in its result
_THIN = 32  # channels
_NARROW = 4
_WIDE = 20
_DTYPES = ("float16", "bfloat16", "float32", "float64")


@dataclass(frozen=True, eq=False)
class Op:
    """One call of a primitive: its operands' shapes and dtypes, and its static parameters."""

    name: str
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[Any, ...]
    params: Mapping[str, Any]

    @cached_property
    def conv(self) -> Conv:
        return conv_of(self.params, self.dtypes[0])

    @cached_property
    def images(self) -> tuple[int, ...]:
        """NHWC."""
        return shapes_of(self.params, *self.shapes)[0]

    @cached_property
    def kernel(self) -> tuple[int, ...]:
        """HWIO."""
        return shapes_of(self.params, *self.shapes)[1]

    @cached_property
    def places(self) -> tuple[int, ...]:
        """Height and width of a convolution's result."""
        return out_size(self.images, self.kernel, self.conv)

    @cached_property
    def terms(self) -> int:
        """How many products are summed for one number of the result."""
        return prod(self.kernel[:3]) if self.name == "conv_general_dilated" else 1

    @cached_property
    def summed(self) -> int:
        """Over how many numbers a matrix product without a batch sums; 0 for another one."""
        (left, _), (batch, _) = self.params["dimension_numbers"]
        return self.shapes[0][left[0]] if len(left) == 1 and not batch else 0

    @cached_property
    def key(self) -> str:
        """Equal for equal calls: what a timing is kept under."""
        operands = zip(self.dtypes, self.shapes, strict=True)
        written = (f"{np.dtype(d).name}[{','.join(map(str, s))}]" for d, s in operands)
        static = (f"{k}={_plain(v)}" for k, v in sorted(self.params.items()) if v is not None)
        return " ".join((self.name, *written, *static))


def _plain(value: Any) -> str:
    """Static parameters as text; NumPy's integers like Python's."""
    if isinstance(value, tuple | list):
        return "(" + ",".join(map(_plain, value)) + ")"
    return getattr(value, "name", None) or str(value)


class Form(NamedTuple):
    """`run(*operands, **params)` equals the primitive wherever ``applies(op)``."""

    run: Callable[..., Array]
    applies: Callable[[Op], bool]


def candidates(op: Op) -> dict[str, Form]:
    """The forms that this call can take, besides the op itself."""
    if not _holds(_VALID[op.name], op):
        return {}
    return {name: form for name, form in FORMS[op.name].items() if _holds(form.applies, op)}


def rule(op: Op, platform: str) -> str:
    """The name of the form to take where nothing is timed."""
    possible = candidates(op) if platform == "cpu" else {}
    if not possible:
        return XLA
    try:
        return next((name for name in _PREFERRED[op.name](op) if name in possible), XLA)
    except jax.errors.InconclusiveDimensionOperation:  # of a symbolic size
        return XLA


def _holds(condition: Callable[[Op], bool], op: Op) -> bool:
    """Not where it depends on a symbolic size."""
    try:
        return condition(op)
    except jax.errors.InconclusiveDimensionOperation:
        return False


def _floats(op: Op) -> bool:
    return all(np.dtype(d).name in _DTYPES for d in op.dtypes)


def _sized(op: Op) -> bool:
    return _floats(op) and all(map(prod, op.shapes))


def _valid_conv(op: Op) -> bool:
    return _flat(op) and _sized(op) and op.dtypes[0] == op.dtypes[1] and min(op.places) > 0


def _flat(op: Op) -> bool:
    return len(op.params["window_strides"]) in (1, 2)


def _valid_pool(op: Op) -> bool:
    """Windows of whole pixels, each with at least one that is no edge."""
    p = op.params
    dilations = (*p.get("base_dilation", ()), *p.get("window_dilation", ()))
    select = p.get("select_prim")
    edges = zip(p["padding"], p["window_dimensions"], strict=True)
    return (
        _sized(op)
        and all(d == 1 for d in dilations)
        and (select is None or select.name == "ge")
        and 1 < prod(p["window_dimensions"]) <= _MAX_TAPS
        and prod(p["window_strides"]) <= _MAX_TAPS
        and all(0 <= low < w and 0 <= high < w for (low, high), w in edges)
        and all(
            n + low + high >= w
            for n, (low, high), w in zip(
                op.shapes[-1], p["padding"], p["window_dimensions"], strict=True
            )
        )
    )


def concerns(op: Op) -> bool:
    """Whether it, or a derivative of it, may have forms."""
    possible = {"conv_general_dilated": _flat, "dot_general": _small}.get(op.name)
    return _floats(op) and (possible is None or _holds(possible, op))


def _small(op: Op) -> bool:
    """A product without a batch, where what it, or a derivative, sums over is short."""
    summed, (batch, _) = op.params["dimension_numbers"]
    free = [prod(n for i, n in enumerate(shape) if i not in axes)
            for shape, axes in zip(op.shapes, summed, strict=True)]  # fmt: skip
    return not batch and min(op.summed or _FEW + 1, *free) <= _FEW


def _valid_dot(op: Op) -> bool:
    return _sized(op) and op.dtypes[0] == op.dtypes[1] and 1 < op.summed <= _FEW


def _dense(op: Op) -> bool:
    return op.conv.groups == op.conv.batch_groups == 1


def _few_taps(op: Op) -> bool:
    return prod(op.kernel[:2]) <= _MAX_TAPS


def _few_places(op: Op) -> bool:
    """What the gradient of a kernel is: a large window at few places."""
    return prod(op.places) <= _MAX_TAPS and prod(op.kernel[:2]) >= prod(op.places)


def _several_taps(op: Op) -> bool:
    return 1 < prod(op.kernel[:2]) <= _MAX_TAPS


def _thin(place: int) -> Callable[[Op], bool]:
    """Few channels into the kernel (2) or out of it (3); with more, XLA's own is no slower."""
    return lambda op: op.kernel[place] <= _THIN


def _thin_images(op: Op) -> bool:
    """The same for a kernel's gradient, whose images have the channels first."""
    return op.images[0] <= 2 * _THIN


def _each_channel(op: Op) -> bool:
    return op.conv.groups == op.images[3] and op.kernel[2] == op.conv.batch_groups == 1


def _each_image(op: Op) -> bool:
    return op.conv.batch_groups == op.images[0] > 1 == op.conv.groups


def _few_groups(op: Op) -> bool:
    return 1 < op.conv.groups * op.conv.batch_groups <= _MAX_GROUPS


def _gaps(op: Op) -> bool:
    """Images spread by their dilation, under a kernel that is not, which moves by one."""
    gaps, ones = op.conv.lhs_dilation, op.conv.strides + op.conv.rhs_dilation
    return 1 < prod(gaps) <= _MAX_PHASES and set(ones) == {1}


def _by_one(op: Op) -> bool:
    return op.conv.strides == (1, 1)


def _single(op: Op) -> bool:
    """A dtype that XLA:CPU gives to one of two libraries."""
    return op.dtypes[0] == np.float32 and op.conv.dtype == np.float32


def _no_more_groups(op: Op) -> bool:
    """Not a convolution of each channel alone, which both libraries do badly."""
    return op.conv.groups * op.conv.batch_groups <= _MAX_GROUPS


def _both(*conditions: Callable[[Op], bool]) -> Callable[[Op], bool]:
    return lambda op: all(condition(op) for condition in conditions)


def _always(op: Op) -> bool:
    return True


def _itself(x: Array, kernel: Array, conv: Conv) -> Array:
    return conv(x, kernel)


_ONE_TAP = _both(_dense, lambda op: op.kernel[:2] == (1, 1))
_ONE_PLACE = _both(_dense, lambda op: op.places == (1, 1))  # where all forms are one product
_PLACES = _both(_dense, _few_places, _thin_images, lambda op: op.places > (1, 1))
_TAPS = _both(_dense, _several_taps, _thin(2), lambda op: op.places > (1, 1))
_CHANNELS = _both(_each_channel, _few_taps)
_CONVS = {
    "shifted": (edged(alone(_depthwise.shifted)), _CHANNELS),
    "phases, shifted": (alone(phases(_depthwise.shifted)), _both(_CHANNELS, _gaps)),
    "summed": (_depthwise.summed, _both(_each_image, _few_places)),
    "spread": (_conv.spread, _both(_single, _no_more_groups)),
    "phases": (phases(_itself), _both(_dense, _gaps)),
    "phases, spread": (phases(_conv.spread), _both(_dense, _single, _gaps)),
    "split": (split(_itself), _few_groups),
    "split, spread": (split(_conv.spread), _both(_few_groups, _single)),
    "product": (_contracted.im2col, _ONE_TAP),
    "im2col": (_contracted.im2col, _TAPS),
    "row im2col": (_contracted.row_im2col, _both(_TAPS, lambda op: min(op.kernel[:2]) > 1)),
    "summed dots": (_contracted.summed_dots, _TAPS),
    "scattered dots": (_contracted.scattered_dots, _both(_dense, _several_taps, _thin(3), _by_one)),
    "window product": (_contracted.gathered, _ONE_PLACE),
    "gathered": (_contracted.gathered, _PLACES),
    "gathered rows": (_contracted.gathered_rows, _both(_PLACES, lambda op: min(op.places) > 1)),
    "by place": (_contracted.by_place, _PLACES),
}
FORMS: dict[str, dict[str, Form]] = {
    "conv_general_dilated": {
        name: Form(canonical(run), applies) for name, (run, applies) in _CONVS.items()
    },
    "dot_general": {"outer products": Form(_contracted.outer_products, _always)},
    "reduce_window_sum": {"sums": Form(_pooling.sums, _always)},
    "reduce_window_max": {"maxima": Form(_pooling.maxima, _always)},
    "select_and_scatter_add": {"scattered": Form(_pooling.scattered, _always)},
    # Its transpose is the above. Where values tie, XLA's choice here is not the first.
    "select_and_gather_add": {},
}
_VALID = dict.fromkeys(FORMS, _valid_pool) | {
    "conv_general_dilated": _valid_conv,
    "dot_general": _valid_dot,
}


def _preferred_conv(op: Op) -> tuple[str, ...]:
    """Of what `experiments.forms --survey` shows on a 2-core CPU."""
    if not _dense(op):
        return "phases, shifted", "shifted", "summed", "split"
    if _holds(_few_places, op):
        return ("window product", "spread") if _holds(_several_images, op) else ()
    if op.kernel[3] <= _NARROW:
        return "shifted", "scattered dots"
    if prod(op.conv.lhs_dilation) > 1:
        return ("phases, spread",)
    return ("shifted", "product", "spread") if _holds(_wide, op) else ("shifted", "product")


def _several_images(op: Op) -> bool:
    """Of a kernel's gradient, whose images come as the channels."""
    return op.kernel[2] > 1


def _wide(op: Op) -> bool:
    """Where the library for spread images is the faster one."""
    if prod(op.conv.strides) > 1:
        return op.kernel[3] >= _WIDE and prod(op.kernel[:2]) <= 25
    least = 500 if op.images[0] == 1 else 144
    return op.kernel[3] >= _WIDE and op.terms >= least


def _preferred_dot(op: Op) -> tuple[str, ...]:
    """Of coordinates, say: what XLA:CPU's library does worst."""
    rows = (prod(shape) // op.summed for shape in op.shapes)
    return ("outer products",) if op.summed == 3 and prod(rows) >= _MANY else ()


_PREFERRED: dict[str, Callable[[Op], tuple[str, ...]]] = {
    "conv_general_dilated": _preferred_conv,
    "dot_general": _preferred_dot,
    "reduce_window_sum": lambda op: ("sums",),
    "reduce_window_max": lambda op: ("maxima",),
    "select_and_scatter_add": lambda op: ("scattered",),
}
