"""From grids and rounded kernels to the quantized function and its parameters."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
from jaxtyping import PyTree

from jaxaccel.fold._transform import keyed, nested
from jaxaccel.fold._view import Keys, beside, check_free
from jaxaccel.quantize import _biases, _constants
from jaxaccel.quantize._arithmetic import Grid
from jaxaccel.quantize._execute import Constants
from jaxaccel.quantize._qtensor import QTensor
from jaxaccel.quantize._traced import ConstantKeys, Quantized, Traced


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
    tops = {step: _constants.top(kernel(keys)) for keys, step in fixed.items() if power}
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
        if at in new:  # in a flat dict, of another layer
            at = (*keys[:-1], f"{keys[-1]}_bias")
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
        check_free(keys, new, "the quantized layer")
        new[keys] = x
