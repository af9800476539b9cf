"""Cross-layer equalization: every channel of a tensor gets a like range before they share a grid.

A relu, a max or an average pooling and a reshape pass a positive factor on: what one layer divides
a channel by, the next multiplies it with.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from jaxaccel._axes import Axes
from jaxaccel._axes import Labels as Ids
from jaxaccel._graph import Node, Value, run
from jaxaccel._labels import Labelling, label
from jaxaccel._table import table
from jaxaccel._trace import Trace
from jaxaccel.fold._transform import keyed
from jaxaccel.fold._view import Keys
from jaxaccel.quantize._calibrate import arguments, first
from jaxaccel.quantize._layers import Bounds, Layer
from jaxaccel.quantize._plan import Choice
from jaxaccel.quantize._program import Mean, Program, Same, end_of, operands_of
from jaxaccel.quantize._traced import Traced, check_params, folded

_POSITIVE = (Bounds(), Bounds(low=0.0))  # a positive factor before these is one behind them
_LARGEST = 1e4  # a factor beyond it would make of a small channel nothing but rounding


class Pair(NamedTuple):
    """A layer, and the one that alone reads its channels.

    Attributes:
        first: whose output channels are divided.
        second: whose input channels are multiplied.
        axis: of the leaf of `second`'s kernel, along which these lie.
        channels: for each index of that axis, the output channel of `first`.
    """

    first: Layer
    second: Layer
    axis: int
    channels: Int[np.ndarray, "inputs"]


class Row(NamedTuple):
    """What `equalize` did with a pair: the largest ratio of two channels' ranges between them."""

    first: str
    second: str
    before: float
    after: float


class EqualizeReport(NamedTuple):
    """The pairs; printed, a table."""

    pairs: tuple[Row, ...]

    def __str__(self) -> str:
        """A table."""
        return table(("layer", "is read by", "ratio of ranges", "after"), self.pairs)


class Equalized:
    """The function for equalized parameters; see `report`."""

    def __init__(self, fn: Callable, report: EqualizeReport) -> None:
        self._fn, self.report = fn, report

    def __repr__(self) -> str:
        """The function, and between how many pairs of layers factors were moved."""
        name = getattr(self._fn, "__name__", self._fn)
        return f"<jx.quantize.equalize of {name!s}: {len(self.report.pairs)} pairs>"

    def __call__(self, params: PyTree, *args: Any) -> Any:
        """The result of the original function."""
        return self._fn(params, *args)


def equalize(fn: Callable, params: PyTree, batches: Iterable[Any]) -> tuple[Equalized, PyTree]:
    """The same function, with the ranges of the channels of each tensor made alike.

    One grid serves all channels of a tensor, so that a channel a thousand times smaller than
    another is lost. Where a layer is read by one other layer alone, with no more than relus,
    poolings and reshapes between, channel c of the first is divided by s[c] and that of the
    second multiplied: ``s = sqrt(r / w)``, with r the range of the activation and w that of the
    second kernel's input channel, over the geometric mean of all channels; where the second is
    depthwise, whose channels have scales of their own, ``s = r``. Batch norm is folded first.

    Args:
        fn: ``fn(params, *args)``; inference.
        params: a pytree of arrays.
        batches: as of `int8`; read once.

    Returns:
        A function with a `report`, and its parameters, to be passed to `int8`.

    Raises:
        TypeError, ValueError: as `int8`.

    Source: Nagel et al. 2019 (https://arxiv.org/abs/1906.04721), with the ranges of activations
    for those of the first kernel, as Xiao et al. 2022 (https://arxiv.org/abs/2211.10438).
    """
    check_params(fn, params)
    args = first(batches)
    fn, params = folded(fn, params, args)
    traced = Traced(fn, params, Choice("static", lambda keys: True))
    made, trace = traced.plan(params, args)
    found = list(pairs(made.program, trace))
    ranges = _ranges(traced, params, batches)
    leaves = keyed(params)
    rows = [_scale(made.program, pair, leaves, ranges) for pair in found]
    report = EqualizeReport(tuple(rows))
    return Equalized(fn, report), jax.tree.unflatten(traced.tree, leaves.values())


def pairs(program: Program, trace: Trace) -> Iterator[Pair]:
    """The layers between which a factor can be moved, by the labels of their channels."""
    view = program.view
    flat = trace._replace(graph=view.graph)
    labelling, inputs = label(flat, range(len(view.leaves)), keep_outputs=False)
    axes = dict(zip(view.graph.inputs, inputs, strict=True))
    for layer in program.layers:
        second = _reader(program, layer) if _is_scalable(program, layer) else None
        if second is not None:
            found = _channels(labelling, axes, layer, second)
            if found is not None:
                yield Pair(layer, second, *found)


def _is_scalable(program: Program, layer: Layer) -> bool:
    """Whether a factor of its output is one of its kernel and its bias."""
    view = program.view
    biases = [view.origin(s.other) for s in layer.tail.shifts if s.other is not None]
    nodes = {s.node for s in layer.tail.shifts}
    if len(layer.kernel.outs) != 1 or None in layer.kernel.outs:
        return False
    channels = layer.kernel.leaf.shape[layer.kernel.axes[0]]
    own = all(
        leaf in view.leaves
        and view.read_by(leaf) <= nodes
        and prod(leaf.shape) == max(leaf.shape, default=1) == channels
        for leaf in biases
    )
    return layer.fixed and own and layer.tail.bounds in _POSITIVE


def _reader(program: Program, layer: Layer) -> Layer | None:
    """The layer that alone reads this one, behind what passes a positive factor on."""
    by_operand = {x: step for step in program.steps.values() for x in operands_of(step)}
    end = layer.tail.end
    while program.view.only_reader(end) is not None:
        step = by_operand.get(end)
        if isinstance(step, Layer):
            return step if step.fixed else None
        if isinstance(step, Same):
            bounds = step.bounds
        elif isinstance(step, Mean):
            bounds = step.tail.bounds
        else:
            return None
        if bounds not in _POSITIVE:
            return None
        end = end_of(step)
    return None


def _channels(
    labelling: Labelling, axes: Mapping[Value, Axes], layer: Layer, second: Layer
) -> tuple[int, np.ndarray] | None:
    """The axis of the second kernel's leaf that goes with the channels, and which it has where."""
    out = axes[layer.kernel.leaf][layer.kernel.axes[0]]
    depthwise = second.contraction.groups > 1
    places = second.kernel.outs if depthwise else second.kernel.ins
    axis = places[-1] if places else None
    into = None if axis is None else axes[second.kernel.leaf][axis]
    if axis is None or not isinstance(out, Ids) or not isinstance(into, Ids):
        return None
    if depthwise and second.contraction.kernel.shape[second.contraction.ins[-1]] != 1:
        return None
    of = {root: channel for channel, root in enumerate(labelling.roots(out.ids))}
    found = [of.get(root, -1) for root in labelling.roots(into.ids)]
    if len(of) < len(out.ids) or -1 in found:
        return None
    return axis, np.array(found)


def _path(program: Program, layer: Layer) -> Keys:
    return program.view.leaves[layer.kernel.leaf]


def _ranges(
    traced: Traced, params: PyTree, batches: Iterable[Any]
) -> dict[Keys, Float[np.ndarray, "channels"]]:
    """Of each layer the largest absolute number of each channel, as it leaves."""

    @jax.jit
    def look(params: PyTree, args: Sequence[Any]) -> list[Array]:
        program = traced.plan(params, args)[0].program
        ends = {layer.tail.end: layer for layer in program.layers if layer.fixed}
        seen: dict[Value, Array] = {}

        def rule(node: Node, operands: list[Array]) -> Sequence[Array]:
            results = node.run(operands)
            for value, x in zip(node.outputs, results, strict=True):
                if value in ends:
                    seen[value] = _per_channel(ends[value], x)
            return results

        run(program.view.graph, [*jax.tree.leaves(params), *jax.tree.leaves(args)], rule)
        return [seen[end] for end in ends]

    program = traced.plan(params, first(batches))[0].program
    names = [_path(program, layer) for layer in program.layers if layer.fixed]
    found: dict[Keys, np.ndarray] = {}
    for place, batch in enumerate(batches):
        for keys, x in zip(names, look(params, arguments(batch)), strict=True):
            new = np.asarray(x, np.float64)
            if not np.isfinite(new).all():
                raise ValueError(
                    f"batches[{place}]: the result of {'/'.join(keys)} holds NaN or infinity; "
                    "leave such inputs out"
                )
            found[keys] = np.maximum(found.get(keys, new), new)
    if any((x < 0).any() for x in found.values()):
        raise ValueError("batches: had no numbers; pass batches that are not empty")
    return found


def _per_channel(layer: Layer, x: Array) -> Array:
    rest = [axis for axis, name in enumerate(layer.tail.labels) if name is None]
    wide = jnp.clip(x.astype(jnp.float32), *layer.tail.bounds)
    return jnp.max(jnp.abs(wide), axis=tuple(rest), initial=-1)


def _scale(
    program: Program, pair: Pair, leaves: dict[Keys, Any], seen: Mapping[Keys, np.ndarray]
) -> Row:
    """Moves the factors of a pair; gives what that did."""
    layer, second = pair.first, pair.second
    ranges = seen[_path(program, layer)]
    kernel = np.asarray(leaves[_path(program, second)], np.float64)
    into = np.zeros(len(ranges))
    rest = tuple(i for i in range(kernel.ndim) if i != pair.axis)
    np.maximum.at(into, pair.channels, np.abs(kernel).max(rest))
    alive = (ranges > 0) & (into > 0)
    wanted = ranges if second.contraction.groups > 1 else np.sqrt(ranges / np.where(alive, into, 1))
    mean = np.exp(np.log(wanted[alive]).mean()) if alive.any() else 1.0
    factors = np.where(alive, np.clip(wanted / mean, 1 / _LARGEST, _LARGEST), 1.0)
    _multiply(leaves, _path(program, layer), layer.kernel.axes[0], 1 / factors)
    for s in layer.tail.shifts:
        leaf = program.view.origin(s.other) if s.other is not None else None
        if leaf is not None:
            keys = program.view.leaves[leaf]
            _multiply(leaves, keys, int(np.argmax(np.shape(leaves[keys]))), 1 / factors)
    _multiply(leaves, _path(program, second), pair.axis, factors[pair.channels])
    spread = lambda x: float(x[alive].max() / x[alive].min()) if alive.any() else 1.0
    name = lambda one: "/".join(_path(program, one))
    return Row(name(layer), name(second), spread(ranges), spread(ranges / factors))


def _multiply(leaves: dict[Keys, Any], keys: Keys, axis: int, factors: np.ndarray) -> None:
    x = jnp.asarray(leaves[keys])
    shape = [-1 if i == axis else 1 for i in range(x.ndim)]
    leaves[keys] = (x * jnp.asarray(factors.reshape(shape), jnp.float32)).astype(x.dtype)
