"""`jx.quantize.int8`: the transform."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, TypeAlias

from jaxtyping import PyTree

from jaxaccel._select import Where, select
from jaxaccel.fold._transform import keyed, nested
from jaxaccel.fold._view import Keys
from jaxaccel.quantize import _biases, _calibrate, _constants
from jaxaccel.quantize._arithmetic import Grid
from jaxaccel.quantize._execute import Constants
from jaxaccel.quantize._plan import Activations, Choice
from jaxaccel.quantize._program import Program
from jaxaccel.quantize._qtensor import quantized
from jaxaccel.quantize._ranges import Calibration
from jaxaccel.quantize._traced import ConstantKeys, Quantized, Traced, check_params, folded

Scales: TypeAlias = Literal["float", "power_of_two"]


def int8(
    fn: Callable,
    params: PyTree,
    batches: Iterable[Any],
    *,
    activations: Activations = "static",
    calibration: str | Calibration = "mse",
    scales: Scales = "float",
    where: Where | None = None,
) -> "tuple[Quantized, PyTree]":
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
    _check_option("activations", activations, ("static", "dynamic", "float"))
    _check_option("scales", scales, ("float", "power_of_two"))
    method = _calibrate.method(calibration)
    check_params(fn, params)
    first = _calibrate.first(batches)
    fn, params = folded(fn, params, first)
    traced = Traced(fn, params, Choice(activations, _taker(params, where)))
    made, _ = traced.plan(params, first)
    if not any(one.steps for one in made.program.all):
        raise ValueError(_nothing(made.program))
    power = scales == "power_of_two"
    grids = _calibrate.grids(traced, params, batches, method, power) if made.grids else []
    return _quantized(traced, params, first, grids, power)


def _check_option(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise ValueError(f"{name}={value!r} must be one of {', '.join(map(repr, known))}")


def _taker(params: PyTree, where: Where | None) -> Callable[[Keys], bool]:
    if where is None:
        return lambda keys: True
    leaves = {"/".join(keys): leaf for keys, leaf in keyed(params).items()}
    chosen = set(select(leaves, where, lambda path, leaf: True))
    return lambda keys: "/".join(keys) in chosen


def _nothing(program: Program) -> str:
    text = "jx.quantize.int8: fn has no convolution or dot product to quantize"
    left = [one for part in program.all for one in part.left]
    return text + "".join(f"; {one.where}: {one.reason} ({one.source})" for one in left[:3])


def _quantized(
    traced: Traced, params: PyTree, args: Sequence[Any], grids: Sequence[Grid], power: bool
) -> "tuple[Quantized, PyTree]":
    """The function and the parameters, leaf by leaf."""
    made, _ = traced.plan(params, args)
    leaves, program = keyed(params), made.program
    fixed = {program.view.leaves[s.kernel.leaf]: s for s in program.layers if s.fixed}
    biases = _biases.biases(program, list(fixed.values()), leaves)
    powers = {s: _constants.exponents(leaves[k], s.kernel.axes) for k, s in fixed.items() if power}
    grids = _constants.coarsened(program, grids, powers)
    new = {keys: x for keys, x in leaves.items() if keys not in biases.gone}
    names: dict[Keys, ConstantKeys] = {}
    for keys, axes in made.axes.items():
        step = fixed.get(keys)
        if step is None:
            new[keys] = quantized(leaves[keys], axes)
            continue
        data = grids[program.integers[step.contraction.data]]
        end = program.integers.get(step.tail.end)
        bias, at = biases.of.get(step), biases.keys.get(step)
        make = _constants.shift_layer if power else _constants.float_layer
        new[keys], found = make(step, leaves[keys], bias, data, None if end is None else grids[end])
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
