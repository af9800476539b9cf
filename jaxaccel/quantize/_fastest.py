"""`mode="fastest"`: which layers this device runs faster in floating point."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, PyTree

from jaxaccel._autotune import autotune
from jaxaccel._graph import Graph, needed, run, values_of
from jaxaccel._progress import Tracked
from jaxaccel._timing import Timed, synthetic, timed
from jaxaccel.fold._transform import keyed
from jaxaccel.fold._view import Keys
from jaxaccel.quantize._arithmetic import LOWEST, Grid
from jaxaccel.quantize._assemble import assembled
from jaxaccel.quantize._execute import result_of
from jaxaccel.quantize._layers import Layer
from jaxaccel.quantize._plan import Plan
from jaxaccel.quantize._program import Program, end_of, stays_integer
from jaxaccel.quantize._qtensor import is_qtensor
from jaxaccel.quantize._traced import Quantized, Traced

FLOAT, ALL, CHOSEN = "in floating point", "all on integers", "as chosen"
_WORTH = 0.9  # a smaller gain is lost where values go from one form to the other
_ROUNDS = 9
Call = tuple[Callable, Sequence[Any]]  # a function and its arguments


def fastest(
    traced: Traced, params: PyTree, args: Sequence[Any], power: bool, progress: bool
) -> tuple[Traced, dict[str, float]]:
    """The function with those layers on integers that gain by it, and seconds of the whole call.

    Each layer is timed, on integers and not, and then the whole call in three ways: the result is
    the fastest of these.
    """
    made = traced.plan(params, args)[0]
    slow = _slow(traced, params, args, power, progress)
    names = (*made.axes, *made.products)
    every = dict.fromkeys(names, "the whole call is faster so on this device") | slow
    ways = {FLOAT: every, ALL: {}, CHOSEN: slow}
    if not slow or slow.keys() == every.keys():
        del ways[CHOSEN]
    wholes = {name: traced.leaving(left) for name, left in ways.items()}
    calls = {name: _whole(one, params, args, power) for name, one in wholes.items()}
    seconds = _timed(calls).seconds
    return wholes[min(seconds, key=lambda name: seconds[name])], seconds


def _slow(
    traced: Traced, params: PyTree, args: Sequence[Any], power: bool, progress: bool
) -> dict[Keys, str]:
    """The kernels whose layers are faster in floating point, with the two times."""
    made, one, new = _stand_in(traced, params, args, power)
    program, given = made.program, keyed(new, is_qtensor)
    leaves = dict(zip(program.view.graph.inputs, jax.tree.leaves((params, *args)), strict=True))
    known: dict[Any, Timed] = {}
    found: dict[Keys, list[Timed]] = {}
    for layer in Tracked(program.layers, "int8: timing layers", progress):
        keys = program.view.leaves[layer.kernel.leaf]
        part = _alone(program.view.graph, layer)
        key = _described(part), _held(program, layer)
        if key not in known:
            floating = _in_float(part, layer, leaves)
            known[key] = _timed({FLOAT: floating, ALL: _on_integers(program, layer, one, given)})
        found.setdefault(keys, []).append(known[key])
    return {keys: reason for keys, times in found.items() if (reason := _reason(times))}


def _reason(times: Sequence[Timed]) -> str:
    """Why a kernel stays in floating point; nothing if it does not."""
    for one in times:
        if ALL not in one.seconds:
            return f"not on integers on this device: {one.dropped.get(ALL, 'failed')}"
    real, integer = (sum(one.seconds[name] for one in times) for name in (FLOAT, ALL))
    if real >= _WORTH * integer:
        return ""
    return f"faster so on this device: {1e3 * real:.3g} ms for {1e3 * integer:.3g}"


def _stand_in(
    traced: Traced, params: PyTree, args: Sequence[Any], power: bool
) -> tuple[Plan, Quantized, PyTree]:
    """The quantized function before its calibration; only how long it takes counts."""
    made = traced.plan(params, args)[0]
    symmetric = {number for one in made.program.all for number in one.symmetric}
    step = 2.0**-5 if power else 0.03
    grids = [Grid(step, 0 if i in symmetric else LOWEST) for i in range(made.grids)]
    return made, *assembled(traced, params, args, grids, power)


def _whole(traced: Traced, params: PyTree, args: Sequence[Any], power: bool) -> Call:
    _, one, new = _stand_in(traced, params, args, power)
    return autotune(one, progress=False), (new, *args)


def _alone(graph: Graph, layer: Layer) -> Graph:
    """From what a layer reads, and parameters, to what leaves it."""
    data, end = layer.contraction.data, layer.tail.end
    nodes = [node for node in graph.nodes if data not in node.outputs]
    part = needed(Graph([], nodes, [end], graph.constants))
    read = {value for node in part.nodes for value in values_of(node.inputs)}
    others = [value for value in graph.inputs if value in read and value is not data]
    return Graph([data, *others], part.nodes, part.outputs, part.constants)


def _described(graph: Graph) -> tuple:
    """Equal for layers that take equally long."""
    nodes = ((n.name, *(str(v.aval) for v in n.outputs), str(n.params)) for n in graph.nodes)
    return tuple(str(value.aval) for value in graph.inputs), *nodes


def _in_float(part: Graph, layer: Layer, leaves: Mapping[Any, Any]) -> Call:
    (x,) = synthetic([layer.contraction.data.aval])
    others = [leaves[value] for value in part.inputs[1:]]
    return autotune(lambda *args: run(part, args)[0], progress=False), (x, *others)


def _held(program: Program, layer: Layer) -> bool:
    """Whether what a layer reads is in 8 bits already."""
    data = layer.contraction.data
    return any(
        end_of(step) is data and program.runs(step) and stays_integer(step)
        for step in program.steps.values()
    )


def _on_integers(program: Program, layer: Layer, one: Quantized, given: Mapping[Keys, Any]) -> Call:
    keys, data = program.view.leaves[layer.kernel.leaf], layer.contraction.data.aval
    if _held(program, layer):
        data = jax.ShapeDtypeStruct(data.shape, np.int8)

    def call(x: Array, own: Mapping[Keys, Any]) -> Array:
        return result_of(program, layer, one.setting(own), x, own[keys])

    names = (keys, *(name for name in one.names(keys) if name is not None))
    own = {name: given[name] for name in names}
    return autotune(call, progress=False), (*synthetic([data]), own)


def _timed(calls: Mapping[str, Call]) -> Timed:
    """Of functions of different arguments; those of the first must compile."""
    operands: list[Any] = []
    functions: dict[str, Callable] = {}
    for name, (fn, args) in calls.items():
        leaves, tree = jax.tree.flatten(tuple(args))
        functions[name] = _of_some(fn, tree, slice(len(operands), len(operands) + len(leaves)))
        operands += leaves
    return timed(functions, operands, _ROUNDS, terms=None)


def _of_some(fn: Callable, tree: Any, own: slice) -> Callable:
    return lambda *operands: fn(*jax.tree.unflatten(tree, operands[own]))
