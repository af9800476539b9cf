"""Runs a program: the integer steps on integers, the others as they were traced."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from itertools import product
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Int8

from jaxaccel._graph import Atom, Node, Value, loop, run
from jaxaccel._rewritten import rerun
from jaxaccel.fold._contractions import Contraction, spread
from jaxaccel.fold._view import Keys
from jaxaccel.quantize._arithmetic import (
    Clip,
    Grid,
    accumulated,
    clip_of,
    dequantize,
    fixed,
    quantize,
    requantize,
    rescaled,
    shift,
)
from jaxaccel.quantize._correction import accumulate, both, per_channel, sums
from jaxaccel.quantize._layers import Bounds, Kernel, Layer, Tail
from jaxaccel.quantize._plan import Activations
from jaxaccel.quantize._program import (
    Joined,
    Mean,
    Product,
    Program,
    Same,
    Step,
    Sum,
    end_of,
    operands_of,
    stays_integer,
)
from jaxaccel.quantize._qtensor import QTensor


class Constants(NamedTuple):
    """Of a layer, per output channel: what is added to its accumulator, and its rescaling."""

    multiplier: Array | None  # float32
    bias: Array | None = None  # in steps of the accumulator
    shift: Array | None = None  # int32; the multiplier of powers of two


class Segment(NamedTuple):
    """One integer step as it ran, in plain numbers.

    Attributes:
        step: what it is.
        operands: integers in; of a layer the data, and the kernel as it is read.
        grids: those of the operands that are data; none where they are dynamic.
        accumulator: of a convolution or a dot product, with the zero point's correction, int32.
        constants: of a layer that has them.
        result: integers on `grid`, or a real number where that is None.
    """

    step: Step
    operands: tuple[Array, ...]
    grids: tuple[Grid, ...]
    accumulator: Array | None
    constants: Constants | None
    result: Array
    grid: Grid | None


@dataclass
class Setting:
    """What a program runs with.

    Attributes:
        activations: "static", "dynamic" or "float".
        grids: by their numbers.
        constants: of each layer, by the path of its kernel.
        segments: where to put what ran, if that is asked for.
    """

    activations: Activations
    grids: Sequence[Grid] = ()
    constants: Mapping[Keys, Constants] = field(default_factory=dict)
    segments: list[Segment] | None = None


def execute(program: Program, arguments: Sequence[Any], setting: Setting) -> list[Array]:
    """The outputs of a program; an argument may be a `QTensor`."""
    return Run(program, setting).outputs(arguments)


def result_of(
    program: Program, layer: Layer, setting: Setting, data: Array, kernel: QTensor
) -> Array:
    """What leaves one layer; its data are in 8 bits or real."""
    run = Run(program, setting)
    run.real_[layer.kernel.leaf] = kernel
    (run.integers_ if data.dtype == jnp.int8 else run.real_)[layer.contraction.data] = data
    run._layer(layer)
    return (run.integers_ if run._stays(layer) else run.real_)[layer.tail.end]


class Run:
    """The values of one graph: real ones, and those in 8 bits."""

    def __init__(self, program: Program, setting: Setting) -> None:
        self.program, self.setting = program, setting
        self.real_: dict[Value, Any] = dict(program.view.graph.constants)
        self.integers_: dict[Value, Int8[Array, "..."]] = {}

    def outputs(self, arguments: Sequence[Any]) -> list[Array]:
        graph = self.program.view.graph
        self.real_.update(zip(graph.inputs, arguments, strict=True))
        for node in graph.nodes:
            step = self.program.steps.get(node)
            if node not in self.program.alive:
                continue
            if step is not None and self.program.runs(step):
                self._step(step)
            else:
                results = self._entered(node) or node.run([self.real(x) for x in node.inputs])
                self.real_.update(zip(node.outputs, results, strict=True))
        return [self.real(atom) for atom in graph.outputs]

    def real(self, atom: Atom) -> Any:
        """The value as it was traced."""
        if not isinstance(atom, Value):
            return atom.val
        if atom not in self.real_:
            found = dequantize(self.integers_[atom], self.grid(atom))
            self.real_[atom] = found.astype(atom.aval.dtype)
        found = self.real_[atom]
        return found.dequantize().astype(atom.aval.dtype) if isinstance(found, QTensor) else found

    def integers(self, value: Value) -> Int8[Array, "..."]:
        """The value on its grid."""
        if value not in self.integers_:
            self.integers_[value] = quantize(self.real(value), self.grid(value))
        return self.integers_[value]

    def grid(self, value: Value) -> Grid:
        return self.setting.grids[self.program.integers[value]]

    def _step(self, step: Step) -> None:
        run: Callable[[Any], None] = {
            Layer: self._layer, Product: self._product, Sum: self._sum, Mean: self._mean,
            Joined: self._joined, Same: self._same,
        }[type(step)]  # fmt: skip
        run(step)

    def _stays(self, step: Step) -> bool:
        """Whether the result of a step that runs is in 8 bits."""
        return end_of(step) in self.program.integers and stays_integer(step)

    def _keep(
        self,
        step: Step,
        operands: Sequence[Array],
        result: Array,
        acc: Array | None = None,
        constants: Constants | None = None,
    ) -> None:
        """The result of a step, in 8 bits where something reads it so."""
        end, integers, stays = end_of(step), self.program.integers, self._stays(step)
        if stays:
            self.integers_[end] = result
        else:
            self.real_[end] = result = result.astype(end.aval.dtype)
        if self.setting.segments is not None:
            grids = tuple(self.grid(x) for x in operands_of(step) if x in integers)
            grid = self.grid(end) if stays else None
            found = Segment(step, tuple(operands), grids, acc, constants, result, grid)
            self.setting.segments.append(found)

    def _layer(self, step: Layer) -> None:
        kernel = self.real_[step.kernel.leaf]
        if self.setting.activations == "float":
            self._weight_only(step, kernel)
        elif self.setting.activations == "dynamic":
            self._dynamic(step, kernel)
        else:
            self._static(step, kernel)

    def _weight_only(self, step: Layer, kernel: QTensor) -> None:
        """The scale of the kernel multiplies the result."""
        c = step.contraction
        values = moved_leaf(step.kernel, kernel.values).astype(c.kernel.aval.dtype)
        wide = jnp.promote_types(c.node.outputs[0].aval.dtype, jnp.float32)  # float16 overflows
        (out,) = c.node.run(both(c, self.real(c.data), values), preferred_element_type=wide)
        scales = per_channel(per_output(c, step.kernel, kernel.scale), c.labels)
        self._keep(step, (), out.astype(jnp.float32) * scales)

    def _dynamic(self, step: Layer, kernel: QTensor) -> None:
        c, values = step.contraction, moved_leaf(step.kernel, kernel.values)
        place = 0 if c.node.inputs[0] is c.data else 1
        q, scale = _by_row(c.node, place, self.real(c.data))
        acc = accumulate(c.node, both(c, q, values))
        scales = per_channel(per_output(c, step.kernel, kernel.scale), c.labels)
        self._keep(step, (q, values), acc.astype(jnp.float32) * (scale * scales), acc)

    def _static(self, step: Layer, kernel: QTensor) -> None:
        c, grid = step.contraction, self.grid(step.contraction.data)
        q, values = self.integers(c.data), moved_leaf(step.kernel, kernel.values)
        acc = sums(c, q, values, grid.zero_point)
        constants = self.setting.constants.get(self.program.view.leaves[step.kernel.leaf])
        if constants is None:
            scale = per_output(c, step.kernel, kernel.scale) * np.float32(grid.scale)
            constants = Constants(scale)
        out = self._left(step.tail, acc, constants, self._stays(step))
        self._keep(step, (q, values), out, acc, constants)

    def _left(self, tail: Tail, acc: Array, constants: Constants, stays: bool) -> Array:
        """An accumulator as it leaves."""
        for node in tail.moves:
            if node.name == "reduce_window_max":
                acc = _largest(acc, node.params)
            elif node.name != "convert_element_type":
                (acc,) = node.run([acc])
        along = lambda x: None if x is None else per_channel(x, tail.labels)
        multiplier, bias, bits = map(along, constants)
        if bits is not None:
            to = self.grid(tail.end)
            return shift(acc, bias, bits, to.zero_point, clip_of(to, *tail.bounds))
        assert multiplier is not None
        if not stays:
            return _limited(accumulated(acc, bias, multiplier), tail.bounds)
        to = self.grid(tail.end)
        return requantize(acc, bias, multiplier, to.zero_point, clip_of(to, *tail.bounds))

    def _product(self, step: Product) -> None:
        node = step.node
        if self.setting.activations == "dynamic":
            found = [_by_row(node, i, self.real(x)) for i, x in enumerate(step.operands)]
        else:
            found = [(self.integers(x), np.float32(self.grid(x).scale)) for x in step.operands]
        (a, of_a), (b, of_b) = found
        acc = accumulate(node, [a, b])
        self._keep(step, (a, b), acc.astype(jnp.float32) * (of_a * of_b), acc)

    def _sum(self, step: Sum) -> None:
        to = self.grid(step.tail.end)
        operands = [self.integers(x) for x in step.operands]
        out = _rescaled(operands, [self.grid(x) for x in step.operands], to,
                        clip_of(to, *step.tail.bounds))  # fmt: skip
        self._keep(step, operands, out)

    def _mean(self, step: Mean) -> None:
        q, grid, to = self.integers(step.operand), self.grid(step.operand), self.grid(step.tail.end)
        wide = q.astype(jnp.int32) - grid.zero_point
        (total,) = step.node.run([wide])
        factors = fixed([grid.scale * step.factor / to.scale], 255 * step.terms)
        out = rescaled([total], factors, to.zero_point, clip_of(to, *step.tail.bounds))
        self._keep(step, (q,), out, total)

    def _joined(self, step: Joined) -> None:
        to = self.grid(step.node.outputs[0])
        operands = [self.integers(x) for x in step.operands]
        parts = [
            q if self.grid(x) == to else _rescaled([q], [self.grid(x)], to, Clip())
            for q, x in zip(operands, step.operands, strict=True)
        ]
        self._keep(step, operands, step.node.run(parts)[0])

    def _same(self, step: Same) -> None:
        node, grid = step.node, self.grid(step.operand)
        q = self.integers(step.operand)
        if node.name == "pad":
            out = lax.pad(q, jnp.int8(grid.zero_point), node.params["padding_config"])
            out = lax.optimization_barrier(out)  # XLA:CPU folds it into a convolution, wrongly
        elif node.name in ("max", "min", "clamp"):
            out = jnp.clip(q, *clip_of(grid, *step.bounds))
        else:
            out = q if node.name == "convert_element_type" else node.run([q])[0]
        self._keep(step, (q,), out)

    def _entered(self, node: Node) -> list[Array] | None:
        """A loop, with the programs of its bodies."""
        bodies = self.program.bodies.get(node)
        if bodies is None:
            return None
        called: list[Callable[..., list[Any]]] = [
            lambda *args, body=body: type(self)(body, self._inner()).outputs(args)
            for body in bodies
        ]
        if node.name == "while":
            called.insert(0, lambda *args: run(node.bodies[0], args))
        return rerun(node, [self._passed(node, i) for i in range(len(node.inputs))], called)

    def _inner(self) -> Setting:
        """Of a loop's body: what happens in it cannot be shown outside."""
        return Setting(self.setting.activations, self.setting.grids)

    def _passed(self, node: Node, place: int) -> Any:
        """An operand of a loop; a kernel stays in 8 bits."""
        atom = node.inputs[place]
        held = self.real_.get(atom) if isinstance(atom, Value) else None
        if not isinstance(held, QTensor) or not _is_read_alone(node, place):
            return self.real(atom)
        scanned = node.name == "scan" and place >= sum(loop(node)[::2])
        return self.real(atom) if scanned and held.scale.shape[0] != held.values.shape[0] else held


def _largest(acc: Array, params: Mapping[str, Any]) -> Array:
    """Of each window, none of which overlap; XLA makes it one loop with what follows."""
    window, steps = params["window_dimensions"], params["window_strides"]
    edges = [(int(low), int(high), 0) for low, high in params["padding"]]
    x = lax.pad(acc, jnp.int32(jnp.iinfo(jnp.int32).min), edges)
    sizes = [(n - size) // step for n, size, step in zip(x.shape, window, steps, strict=True)]
    found = []
    for start in product(*map(range, window)):
        stop = [at + n * step + 1 for at, n, step in zip(start, sizes, steps, strict=True)]
        found.append(lax.slice(x, start, stop, steps))
    return reduce(lax.max, found)


def _limited(x: Array, bounds: Bounds) -> Array:
    return x if bounds == Bounds() else jnp.clip(x, *bounds)


def _is_read_alone(node: Node, place: int) -> bool:
    """Whether an operand of a loop goes into its body, and is not changed there."""
    if node.name == "cond":
        return place > 0
    consts, body_consts, carry = loop(node)
    tested = consts if node.name == "while" else 0
    return tested <= place < consts + body_consts or place >= consts + body_consts + carry


def moved_leaf(kernel: Kernel, values: Array) -> Array:
    """The values of a leaf as the contraction reads them."""
    for node in kernel.path:
        if node.name != "convert_element_type":
            (values,) = node.run([values])
    return values


def per_output(c: Contraction, kernel: Kernel, scale: Any) -> Any:
    """The scale of a leaf with one axis for each output axis of the contraction."""
    kept = [axis for axis in kernel.outs if axis is not None]
    others = [axis for axis in range(scale.ndim) if axis not in kept]
    return scale.transpose(*kept, *others).reshape(c.sizes)


def _rescaled(
    operands: Sequence[Array], grids: Sequence[Grid], to: Grid, limits: Clip
) -> Int8[Array, "..."]:
    """The sum of integers of several grids on another one."""
    terms = [q.astype(jnp.int32) - g.zero_point for q, g in zip(operands, grids, strict=True)]
    factors = fixed([grid.scale / to.scale for grid in grids], 255)
    return rescaled(terms, factors, to.zero_point, limits)


def _by_row(node: Node, place: int, x: Array) -> tuple[Int8[Array, "..."], Array]:
    """An operand in 8 bits, with a scale for each row of the result (each image of a batch)."""
    if node.name == "dot_general":
        return _dot_rows(node, place, x)
    numbers = node.params["dimension_numbers"]
    batch = numbers.lhs_spec[0]
    q, scale = _one_scale(x, tuple(i for i in range(x.ndim) if i != batch))
    return q, spread(scale.reshape(-1), (numbers.out_spec[0],), x.ndim)


def _dot_rows(node: Node, place: int, x: Array) -> tuple[Int8[Array, "..."], Array]:
    summed, batches = node.params["dimension_numbers"]
    bound, batch = summed[place], batches[place]
    free = [i for i in range(x.ndim) if i not in (*bound, *batch)]
    q, scale = _one_scale(x, tuple(bound))
    rank = len(node.outputs[0].shape)
    first = len(batch) if place == 0 else rank - len(free)
    kept = scale.transpose(*batch, *free, *bound).reshape([x.shape[i] for i in (*batch, *free)])
    return q, spread(kept, (*range(len(batch)), *range(first, first + len(free))), rank)


def _one_scale(x: Array, axes: tuple[int, ...]) -> tuple[Int8[Array, "..."], Array]:
    """Symmetric integers, and a scale for each index of what is left of x without `axes`."""
    wide = x.astype(jnp.float32)
    largest = jnp.max(jnp.abs(wide), axis=axes, keepdims=True, initial=0)
    scale = jnp.where(largest == 0, 1, largest / 127)  # NaN stays NaN
    return jnp.clip(jnp.round(wide / scale), -127, 127).astype(jnp.int8), scale
