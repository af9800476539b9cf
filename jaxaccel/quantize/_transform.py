"""`jx.quantize.int8`: the transform."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, TypeAlias

import numpy as np
from jaxtyping import PyTree

from jaxaccel._progress import Tracked
from jaxaccel._select import Where, select
from jaxaccel.fold._transform import keyed
from jaxaccel.quantize import _calibrate, _fastest, _rounding
from jaxaccel.quantize._assemble import assembled
from jaxaccel.quantize._plan import Activations, Choice
from jaxaccel.quantize._ranges import Calibration
from jaxaccel.quantize._traced import Quantized, Traced, check_params, folded

Scales: TypeAlias = Literal["float", "power_of_two"]
Rounding: TypeAlias = Literal["nearest", "adaround"]
Mode: TypeAlias = Literal["all", "fastest"]
_NONE = np.zeros((0, 0), np.float32)  # the leaf of a product of data with data


def int8(
    fn: Callable,
    params: PyTree,
    batches: Iterable[Any],
    *,
    activations: Activations = "static",
    calibration: str | Calibration = "mse",
    scales: Scales = "float",
    rounding: Rounding = "nearest",
    bias_correction: bool = False,
    where: Where | None = None,
    mode: Mode = "all",
    progress: bool = True,
) -> tuple[Quantized, PyTree]:
    """The same function with its convolutions and dot products on 8-bit integers.

    Chains of batch norm are folded first. Each kernel gets a scale for every output channel,
    symmetric; sums are taken in int32. With static activations the data are put on a grid that
    was found on `batches`, and stay in 8 bits from layer to layer, through relu, max and average
    pooling, reshapes, concatenations and residual additions. What stays in floating point is in
    ``fn.report``, with the reason.

    Args:
        fn: ``fn(params, *args)``; inference.
        params: a pytree of arrays.
        batches: the arguments of `fn` for calibration: an iterable of tuples ``(x, ...)``, or of
            single arguments. Read anew for every pass: one for the shapes, one or two for the
            ranges, one for each tool; where activations are not static only the first is read.
        activations: "static"; "dynamic": the range is taken from each row (dot product) or each
            image (convolution) at run time, and every layer returns real numbers; "float":
            kernels alone are in 8 bits.
        calibration: "minmax", "percentile" (99.99), "mse" or "entropy", or a function of a
            `Histogram` that returns the ends of the range.
        scales: "float"; "power_of_two": every rescaling is a shift that rounds halves up, the
            arithmetic of hardware.
        rounding: "nearest"; "adaround": each number of a kernel is rounded up or down so that the
            layer's result on the first batch moves least, by some hundred steps of gradient
            descent for each layer. Static activations only, as the next.
        bias_correction: whether the average by which rounded kernels move each channel of a
            layer's result, over `batches`, is taken from its bias.
        where: which layers: a glob over the paths of kernels, a predicate ``(path, leaf) -> bool``,
            or a mapping from globs to True or False; all by default. A product of data with data
            (attention) goes by its name in the report, ``dot_general_0``, and an empty array.
        mode: "all"; "fastest": each layer is timed on this device, for the shapes of the first
            batch, on integers and in floating point, each in its fastest form (`jx.autotune`). The
            slower ones stay as they were, with their times in the report; the whole call is timed
            too, and stays as it was where that is faster. Layers in loops are not timed alone.
        progress: draw bars while it takes longer than a moment.

    Returns:
        A function with a `report`, and its parameters: nested dicts under the original paths. A
        kernel is a `QTensor`. A layer that adds in int32 has its bias, in steps of its
        accumulator, under the original path (int32 for powers of two), and beside its kernel
        ``<kernel>_multiplier``, or ``<kernel>_shift``, for each output channel.

    Raises:
        TypeError: `fn` takes or returns what is no array, or `batches` is no iterable, or can be
            read once only.
        ValueError: for an unknown option; no batches; nothing to quantize; parameters that are
            quantized already; numbers in calibration that are not finite.

    Example:
        >>> import jax.numpy as jnp
        >>> def net(params, x):
        ...     return jnp.maximum(x @ params["a"]["kernel"], 0) @ params["b"]["kernel"]
        >>> params = {"a": {"kernel": jnp.eye(3)}, "b": {"kernel": jnp.ones((3, 2))}}
        >>> small, new = int8(net, params, [jnp.array([[1.0, 2.0, -0.5]])], calibration="minmax")
        >>> small(new, jnp.array([[1.0, 2.0, -1.0]])).round(1)
        Array([[3., 3.]], dtype=float32)
        >>> print(small.report)
              where                   reads  gives
        --------------------------------------------------------
        int8  a/kernel    0.0098 * (q + 77)  0.00784 * (q + 128)
        int8  b/kernel  0.00784 * (q + 128)  real
        2 on integers, 0 left in floating point

    Source: Jacob et al. 2018 (https://arxiv.org/abs/1712.05877).
    """
    check_option("activations", activations, ("static", "dynamic", "float"))
    check_option("scales", scales, ("float", "power_of_two"))
    check_option("rounding", rounding, ("nearest", "adaround"))
    check_option("mode", mode, ("all", "fastest"))
    if activations != "static" and (rounding != "nearest" or bias_correction):
        raise ValueError(
            f"activations={activations!r}: rounding='adaround' and bias_correction are for layers "
            "whose accumulators stay integers; pass activations='static'"
        )
    method = _calibrate.method(calibration)
    check_params(fn, params)
    first = _calibrate.first(batches)
    fn, params = folded(fn, params, first)
    traced = Traced(fn, params, choice(fn, params, first, activations, where))
    made = traced.checked(params, first)
    power, seconds = scales == "power_of_two", {}
    if mode == "fastest":
        traced, seconds = _fastest.fastest(traced, params, first, power, progress)
        made = traced.plan(params, first)[0]
    batches = Tracked(batches, "int8: calibration", progress)
    grids = _calibrate.grids(traced, params, batches, method, power) if made.grids else []
    kernels, moved = None, {}
    if rounding == "adaround" or bias_correction:
        kernels = _rounding.kernels(traced, params, batches, made.axes, power, rounding)
    if kernels and bias_correction:
        moved = _rounding.shifts(traced, params, batches, kernels)
    quantized, new = assembled(traced, params, first, grids, power, kernels, moved)
    quantized.report = quantized.report._replace(seconds=seconds)
    return quantized, new


def check_option(name: str, value: str, known: Sequence[str]) -> None:
    """Raises a ValueError that names the option."""
    if value not in known:
        raise ValueError(f"{name}={value!r} must be one of {', '.join(map(repr, known))}")


def choice(
    fn: Callable, params: PyTree, args: Sequence[Any], activations: Activations, where: Where | None
) -> Choice:
    """The layers that `where` chooses."""
    every = Choice(activations, lambda keys: True)
    if where is None:
        return every
    leaves = {"/".join(keys): leaf for keys, leaf in keyed(params).items()}
    for keys in Traced(fn, params, every).plan(params, args)[0].products:
        leaves["/".join(keys)] = _NONE
    chosen = set(select(leaves, where, lambda path, leaf: True))
    return every._replace(takes=lambda keys: "/".join(keys) in chosen)
