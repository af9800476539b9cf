"""A function of `jx.quantize.int8` as one of real numbers, which lie on grids."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, PyTree

from jaxaccel._autotune import Autotuned
from jaxaccel._graph import Atom, Value, values_of
from jaxaccel.export._onnx._grids import apart, average, layer, mean, on_grid, scaled
from jaxaccel.fold._contractions import Contraction, over_outputs
from jaxaccel.fold._view import View
from jaxaccel.quantize._arithmetic import Grid, clip_of
from jaxaccel.quantize._correction import both, per_channel
from jaxaccel.quantize._execute import Constants, Run, Setting, moved_leaf, per_output
from jaxaccel.quantize._layers import Bounds, Layer, Tail
from jaxaccel.quantize._program import Joined, Mean, Product, Program, Same, Sum
from jaxaccel.quantize._qtensor import QTensor
from jaxaccel.quantize._traced import Quantized

_ALL = Bounds()


def as_written(fn: Callable) -> Callable:
    """The function; of one of `jx.quantize.int8` what ONNX has operations for.

    Raises:
        ValueError: these would need ranges that are found at run time.
    """
    found = fn
    while isinstance(found, Autotuned | jax.stages.Wrapped):
        found = found.__wrapped__  # pyright: ignore
    if not isinstance(found, Quantized):
        return fn
    if found.activations == "dynamic":
        raise ValueError(
            f"fn: {found!r} finds the ranges of activations at run time, for which ONNX has no "
            "pairs of QuantizeLinear and DequantizeLinear; pass activations='static' to "
            "jx.quantize.int8"
        )
    return OnGrids(found)


@dataclass(frozen=True)
class OnGrids:
    """A quantized function with every integer as the number that it stands for."""

    fn: Quantized

    def __call__(self, params: PyTree, *args: Any) -> Any:
        """As the function, within rounding."""
        return self.fn.run(params, args, execute=execute)


def execute(program: Program, arguments: Sequence[Any], setting: Setting) -> list[Array]:
    """The outputs of a program whose integers are real numbers."""
    return _Reals(program, setting).outputs(arguments)


class _Reals(Run):
    """Holds the values that `Run` holds in 8 bits as real numbers."""

    def real(self, atom: Atom) -> Any:
        """As it was traced."""
        if isinstance(atom, Value) and atom not in self.real_:
            self.real_[atom] = self.integers_[atom].astype(atom.aval.dtype)
        return super().real(atom)

    def integers(self, value: Value) -> Array:
        """On its grid, in float32."""
        if value not in self.integers_:
            x = self.real(value).astype(jnp.float32)
            # Else openvino adds what was added before the sum to other channels.
            x = apart(x) if _is_reduced(self.program.view, value) else x
            self.integers_[value] = _on(self.grid(value), x)
        return self.integers_[value]

    def _weight_only(self, step: Layer, kernel: QTensor) -> None:
        c, scale = step.contraction, per_output(step.contraction, step.kernel, kernel.scale)
        x = self.real(c.data).astype(jnp.float32)
        self._keep(step, (), _contracted(c, x, moved_leaf(step.kernel, kernel.values), scale))

    def _static(self, step: Layer, kernel: QTensor) -> None:
        c, tail, stays = step.contraction, step.tail, self._stays(step)
        x, values = self.integers(c.data), moved_leaf(step.kernel, kernel.values)
        constants = self.setting.constants.get(self.program.view.leaves[step.kernel.leaf])
        reads, to = self.grid(c.data), self.grid(tail.end) if stays else None
        if constants is None:
            constants = Constants(
                per_output(c, step.kernel, kernel.scale) * np.float32(reads.scale)
            )
        scale = _scale_of(constants, reads, to)
        out = _contracted(c, x, values, scale, constants.bias, reads.scale)
        if to is not None:
            out = _on(to, out, tail.bounds)
        out = _moved(tail, out)
        self._keep(step, (x, values), out if stays else self._apart(tail.end, out, tail.bounds))

    def _apart(self, end: Value, x: Array, bounds: Bounds = _ALL) -> Array:
        """What leaves the integers."""
        if bounds == _ALL:
            # Else openvino multiplies it by its scale twice, where several nodes read it, and may
            # fail where it is reshaped.
            return apart(x) if end in self.program.view.readers or x.ndim > 2 else x
        x = x if bounds.low == -np.inf else lax.max(x, np.float32(bounds.low))
        return x if bounds.high == np.inf else lax.min(x, np.float32(bounds.high))

    def _product(self, step: Product) -> None:
        a, b = (self.integers(x) for x in step.operands)
        (out,) = step.node.run([a, b], preferred_element_type=np.dtype(np.float32))
        self._keep(step, (a, b), self._apart(step.node.outputs[0], out))

    def _sum(self, step: Sum) -> None:
        a, b = (self.integers(x) for x in step.operands)
        self._keep(step, (a, b), _on(self.grid(step.tail.end), lax.add(a, b), step.tail.bounds))

    def _mean(self, step: Mean) -> None:
        x, to, p = self.integers(step.operand), self.grid(step.tail.end), step.node.params
        factor = step.factor * step.terms
        if step.node.name == "reduce_sum":
            out = mean(x, tuple(p["axes"]))
        else:
            edges = tuple((int(low), int(high), 0) for low, high in p["padding"])
            x = on_grid(x, self.grid(step.operand), padding=edges) if any(map(any, edges)) else x
            out = average(x, p["window_dimensions"], p["window_strides"])
        small = Grid(to.scale / factor, to.zero_point)
        bounds = Bounds(*(bound / factor for bound in step.tail.bounds))
        self._keep(step, (x,), _on(small, out, bounds, to.scale))

    def _joined(self, step: Joined) -> None:
        operands = [self.integers(x) for x in step.operands]
        (out,) = step.node.run(operands)
        self._keep(step, operands, _on(self.grid(step.node.outputs[0]), out))

    def _same(self, step: Same) -> None:
        node, grid, x = step.node, self.grid(step.operand), self.integers(step.operand)
        if node.name == "pad":
            out = on_grid(x, grid, padding=tuple(node.params["padding_config"]))
        elif node.name in ("max", "min", "clamp"):
            out = _on(grid, x, step.bounds)
        else:
            out = x if node.name == "convert_element_type" else node.run([x])[0]
            out = _on(grid, out) if node.name == "reduce_max" else out
        self._keep(step, (x,), out)


def _on(grid: Grid, x: Array, bounds: Bounds = _ALL, gives: float | None = None) -> Array:
    return on_grid(x, grid, clip_of(grid, *bounds), gives)


def _scale_of(constants: Constants, reads: Grid, to: Grid | None) -> Array:
    """That of the kernel, as the constants have it."""
    ratio = np.float32((1 if to is None else to.scale) / reads.scale)
    if constants.shift is not None:
        return jnp.ldexp(jnp.full(constants.shift.shape, ratio), -constants.shift)
    assert constants.multiplier is not None
    return constants.multiplier * ratio


def _contracted(
    c: Contraction,
    x: Array,
    values: Array,
    scale: Array,
    bias: Array | None = None,
    data: float = 1.0,
) -> Array:
    """Of real numbers with a kernel in 8 bits, and with a bias."""
    scale = jnp.broadcast_to(scale, c.sizes)
    bias = None if bias is None else jnp.broadcast_to(bias, c.sizes)
    if _is_one_layer(c):
        return layer(c, x, values, scale, bias, data)
    kernel = scaled(values, over_outputs(c, scale))
    (out,) = c.node.run(both(c, x, kernel), preferred_element_type=np.dtype(np.float32))
    return out if bias is None else out + per_channel(bias * (scale * np.float32(data)), c.labels)


def _is_one_layer(c: Contraction) -> bool:
    """Whether ONNX has an operation for it that has a bias."""
    if c.node.name == "dot_general":
        return not any(c.node.params["dimension_numbers"][1])
    return set(c.node.params["lhs_dilation"]) <= {1} and len(c.kernel.shape) <= 5


def _is_reduced(view: View, value: Value) -> bool:
    """Whether it is a sum over some axes, or the largest, but for what constants do to that."""
    node = view.makers.get(value)
    while node is not None and not node.name.startswith("reduce_"):
        data = [x for x in values_of(node.inputs) if not view.knows(x)]
        node = view.makers.get(data[0]) if len(data) == 1 else None
    return node is not None


def _moved(tail: Tail, x: Array) -> Array:
    for node in tail.moves:
        if node.name != "convert_element_type":
            (x,) = node.run([x])
    return x
