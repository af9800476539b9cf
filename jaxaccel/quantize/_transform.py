"""`jx.quantize.int8`: the transform."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal, TypeAlias

import numpy as np
from jaxtyping import PyTree

from jaxaccel._select import Where, select
from jaxaccel.fold._transform import keyed, nested
from jaxaccel.fold._view import Keys, beside
from jaxaccel.quantize import _biases, _calibrate, _constants, _rounding
from jaxaccel.quantize._arithmetic import Grid
from jaxaccel.quantize._execute import Constants
from jaxaccel.quantize._plan import Activations, Choice
from jaxaccel.quantize._qtensor import QTensor
from jaxaccel.quantize._ranges import Calibration
from jaxaccel.quantize._traced import ConstantKeys, Quantized, Traced, check_params, folded

Scales: TypeAlias = Literal["float", "power_of_two"]
Rounding: TypeAlias = Literal["nearest", "adaround"]


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
            single arguments. Read twice, unless `calibration` is "minmax"; where activations are
            not static only the first is read.
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
        where: which kernels: a glob over paths, a predicate ``(path, leaf) -> bool``, or a mapping
            from globs to True or False; all by default.

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
    if activations != "static" and (rounding != "nearest" or bias_correction):
        raise ValueError(
            f"activations={activations!r}: rounding='adaround' and bias_correction are for layers "
            "whose accumulators stay integers; pass activations='static'"
        )
    method = _calibrate.method(calibration)
    check_params(fn, params)
    first = _calibrate.first(batches)
    fn, params = folded(fn, params, first)
    traced = Traced(fn, params, Choice(activations, taker(params, where)))
    made = traced.checked(params, first)
    power = scales == "power_of_two"
    grids = _calibrate.grids(traced, params, batches, method, power) if made.grids else []
    kernels, moved = None, {}
    if rounding == "adaround" or bias_correction:
        kernels = _rounding.kernels(traced, params, batches, made.axes, power, rounding)
    if kernels and bias_correction:
        moved = _rounding.shifts(traced, params, batches, kernels)
    return assembled(traced, params, first, grids, power, kernels, moved)


def check_option(name: str, value: str, known: Sequence[str]) -> None:
    """Raises a ValueError that names the option."""
    if value not in known:
        raise ValueError(f"{name}={value!r} must be one of {', '.join(map(repr, known))}")


def taker(params: PyTree, where: Where | None) -> Callable[[Keys], bool]:
    """Whether the kernel at a path is to be quantized."""
    if where is None:
        return lambda keys: True
    leaves = {"/".join(keys): leaf for keys, leaf in keyed(params).items()}
    chosen = set(select(leaves, where, lambda path, leaf: True))
    return lambda keys: "/".join(keys) in chosen


def assembled(
    traced: Traced,
    params: PyTree,
    args: Sequence[Any],
    grids: Sequence[Grid],
    power: bool,
    given: Mapping[Keys, QTensor] | None = None,
    moved: Mapping[Keys, np.ndarray] = MappingProxyType({}),
) -> tuple[Quantized, PyTree]:
    """The function and the parameters, leaf by leaf.

    The kernels are `given`, or rounded here; what is `moved` in a layer's result is taken from its
    bias.
    """
    made, _ = traced.plan(params, args)
    leaves, program = keyed(params), made.program
    fixed = {program.view.leaves[s.kernel.leaf]: s for s in program.layers if s.fixed}
    biases = _biases.biases(program, list(fixed.values()), leaves)
    round_ = lambda keys: _constants.kernel(leaves[keys], made.axes[keys], power)
    kernel = round_ if given is None else given.__getitem__
    tops = {step: float(kernel(keys).scale.max()) for keys, step in fixed.items() if power}
    grids = _constants.coarsened(program, grids, tops)
    new = {keys: x for keys, x in leaves.items() if keys not in biases.gone}
    names: dict[Keys, ConstantKeys] = {}
    for keys in made.axes:
        new[keys], step = kernel(keys), fixed.get(keys)
        if step is None:
            continue
        end = program.integers.get(step.tail.end)
        data = grids[program.integers[step.contraction.data]]
        bias, at = biases.of.get(step), biases.keys.get(step)
        if keys in moved:
            bias, at = (0 if bias is None else bias) - moved[keys], at or beside(keys, "bias")
        ends = bias, data, None if end is None else grids[end]
        if power:
            new[keys] = _constants.fitting(step, leaves[keys], new[keys], *ends)
            found = _constants.shift_layer(step, new[keys], *ends)
        else:
            found = _constants.float_layer(step, new[keys], *ends)
        names[keys] = _named(keys, at, found)
        _store(new, names[keys], found)
    return Quantized(traced, made, new, grids, names), nested(new)


def _named(kernel: Keys, bias: Keys | None, found: Constants) -> ConstantKeys:
    suffix = lambda name: (*kernel[:-1], f"{kernel[-1]}_{name}")
    shifted = found.shift is not None
    return ConstantKeys(None if shifted else suffix("multiplier"), bias,
                        suffix("shift") if shifted else None)  # fmt: skip


def _store(new: dict[Keys, Any], names: ConstantKeys, found: Constants) -> None:
    for keys, x in zip(names, found, strict=True):
        if keys is None:
            continue
        for other in new:
            if keys[: len(other)] == other[: len(keys)]:
                raise ValueError(
                    f"{'/'.join(keys)}: the quantized layer needs this path, but "
                    f"{'/'.join(other) or 'the only array'} stands there; rename that leaf, or put "
                    "each kernel in a dict of its own"
                )
        new[keys] = x
