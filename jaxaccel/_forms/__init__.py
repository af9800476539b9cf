"""Equivalent forms of an op: the same sum, arranged the way a backend runs it fastest.

`FORMS` is the table: name of a primitive -> name of a form -> the form, and when it applies.
`rule` chooses without timing; `jaxaccel.autotune` times what `candidates` names.
"""

from collections.abc import Callable
from math import prod
from typing import NamedTuple

import jax
from jaxtyping import Array

from jaxaccel._forms import _contracted, _conv, _depthwise, _int8, _pooling
from jaxaccel._forms._banded import banded
from jaxaccel._forms._conditions import (
    MAX_TAPS,
    Condition,
    always,
    both,
    by_one,
    close,
    dense,
    depthwise,
    each_image,
    few_groups,
    few_places,
    flat,
    gaps,
    holds,
    no_more_groups,
    one_tap,
    several_places,
    single,
    sized,
    taps,
    thin,
    thin_images,
)
from jaxaccel._forms._conv import Conv, ConvForm, alone, canonical, edged, phases, split
from jaxaccel._forms._int8 import BOTH, one_sided
from jaxaccel._forms._integers import by_rows
from jaxaccel._forms._op import Op as Op

XLA = "xla"  # the op itself
_FEW = 8  # numbers summed in a matrix product
_MANY = 100_000  # numbers in its result
_NARROW = 4  # channels
_WIDE = 20
_THIN = 32


class Form(NamedTuple):
    """`run(*operands, **params)` equals the primitive wherever ``applies(op)``."""

    run: Callable[..., Array]
    applies: Condition
    platforms: tuple[str, ...] = ("cpu", "cuda")


def candidates(op: Op, platform: str = "cpu") -> dict[str, Form]:
    """The forms that this call can take there, besides the op itself."""
    if not holds(_VALID[op.name], op):
        return {}
    forms = {name: form for name, form in FORMS[op.name].items() if platform in form.platforms}
    return {name: form for name, form in forms.items() if holds(form.applies, op)}


def rule(op: Op, platform: str) -> str:
    """The name of the form to take where nothing is timed."""
    ruled = platform == "cpu" or (platform == "cuda" and op.int8)
    possible = candidates(op, platform) if ruled else {}
    if not possible:
        return XLA
    try:
        names = _int8.preferred(op, platform) if op.int8 else _PREFERRED[op.name](op)
        return next((name for name in names if name in possible), XLA)
    except jax.errors.InconclusiveDimensionOperation:  # of a symbolic size
        return XLA


def plain(op: Op, platform: str) -> str:
    """The form to leave a call in: XLA's own, but the rules' where XLA has no usable one."""
    lacks = op.int8 and holds(lambda op: _int8.lacking(op, platform), op)
    return rule(op, platform) if lacks else XLA


def _valid_conv(op: Op) -> bool:
    numbers = op.int8 or (op.floats and op.dtypes[0] == op.dtypes[1])
    return numbers and flat(op) and sized(op) and min(op.places) > 0


def _valid_pool(op: Op) -> bool:
    """Windows of whole pixels, each with at least one that is no edge."""
    p = op.params
    dilations = (*p.get("base_dilation", ()), *p.get("window_dilation", ()))
    select = p.get("select_prim")
    edges = zip(p["padding"], p["window_dimensions"], strict=True)
    return (
        (op.floats or op.int8)
        and sized(op)
        and all(d == 1 for d in dilations)
        and (select is None or select.name == "ge")
        and 1 < prod(p["window_dimensions"]) <= MAX_TAPS
        and prod(p["window_strides"]) <= MAX_TAPS
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
    possible = {"conv_general_dilated": flat, "dot_general": _small}.get(op.name)
    return (op.floats or op.int8) and (possible is None or holds(possible, op))


def _small(op: Op) -> bool:
    """A product without a batch, where what it, or a derivative, sums over is short."""
    _, (batch, _) = op.params["dimension_numbers"]
    return not batch and (op.int8 or min(op.summed or _FEW + 1, *op.free) <= _FEW)


def _valid_dot(op: Op) -> bool:
    short = op.floats and op.dtypes[0] == op.dtypes[1] and 1 < op.summed <= _FEW
    return sized(op) and (op.int8 or short)


def _itself(x: Array, kernel: Array, conv: Conv) -> Array:
    return conv(x, kernel)


def _few_channels(op: Op) -> bool:
    return dense(op) and close(op) and op.kernel[1] > 1 and op.kernel[2] <= _NARROW


_ONE_PLACE = both(dense, lambda op: op.places == (1, 1))  # where all forms are one product
_PLACES = both(dense, few_places, thin_images, several_places)
_TAPS = both(taps, thin(2), several_places)
_CONVS = {
    "shifted": (edged(alone(_depthwise.shifted)), depthwise),
    "phases, shifted": (alone(phases(_depthwise.shifted)), both(depthwise, gaps)),
    "summed": (_depthwise.summed, both(each_image, few_places)),
    "spread": (_conv.spread, both(single, no_more_groups)),
    "phases": (phases(_itself), both(dense, gaps)),
    "phases, spread": (phases(_conv.spread), both(dense, single, gaps)),
    "split": (split(_itself), few_groups),
    "split, spread": (split(_conv.spread), both(few_groups, single)),
    "product": (_contracted.im2col, one_tap),
    "im2col": (_contracted.im2col, _TAPS),
    "row im2col": (_contracted.row_im2col, both(_TAPS, lambda op: min(op.kernel[:2]) > 1)),
    "summed dots": (_contracted.summed_dots, _TAPS),
    "scattered dots": (_contracted.scattered_dots, both(taps, thin(3), by_one)),
    "window product": (_contracted.gathered, _ONE_PLACE),
    "gathered": (_contracted.gathered, _PLACES),
    "gathered rows": (_contracted.gathered_rows, both(_PLACES, lambda op: min(op.places) > 1)),
    "by place": (_contracted.by_place, _PLACES),
    "banded 2": (banded(2), _few_channels),
    "banded 4": (banded(4), _few_channels),
}


def _conv_form(name: str) -> Form:
    """Of floats, of int8, or of both, each where its own condition holds."""
    never = lambda op: False
    run, floats = _CONVS.get(name, (None, never))
    other, int8, platforms = _int8.CONVS.get(name, (None, never, BOTH))
    applies = lambda op: (int8 if op.int8 else floats)(op)
    made: ConvForm | None = run or other
    assert made is not None
    return Form(canonical(made, product=name == "product"), applies, platforms)


FORMS: dict[str, dict[str, Form]] = {
    "conv_general_dilated": {name: _conv_form(name) for name in {**_CONVS, **_int8.CONVS}},
    "dot_general": {
        "outer products": Form(_contracted.outer_products, lambda op: op.floats),
        "by rows": Form(by_rows, lambda op: op.int8 and one_sided(op), ("cpu",)),
    },
    "reduce_window_sum": {"sums": Form(_pooling.sums, always)},
    "reduce_window_max": {"maxima": Form(_pooling.maxima, always)},
    "select_and_scatter_add": {"scattered": Form(_pooling.scattered, always)},
    # Its transpose is the above. Where values tie, XLA's choice here is not the first.
    "select_and_gather_add": {},
}
_VALID = dict.fromkeys(FORMS, _valid_pool) | {
    "conv_general_dilated": _valid_conv,
    "dot_general": _valid_dot,
}


def _preferred_conv(op: Op) -> tuple[str, ...]:
    """Of what `experiments.forms --survey` shows on a 2-core CPU."""
    if not dense(op):
        return "phases, shifted", "shifted", "summed", "split"
    if holds(few_places, op):
        return ("window product", "spread") if holds(_several_images, op) else ()
    if op.kernel[3] <= _NARROW:
        return "shifted", "scattered dots"
    if prod(op.conv.lhs_dilation) > 1:
        return ("phases, spread",)
    if op.kernel[2] <= _NARROW and op.kernel[3] <= _THIN and prod(op.kernel[:2]) <= 25:
        return "shifted", "product", "banded 2" if op.kernel[1] <= 3 else "banded 4"
    return ("shifted", "product", "spread") if holds(_wide, op) else ("shifted", "product")


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
