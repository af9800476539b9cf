"""Functions of int8 as they are written for ONNX, beside what they compute in XLA."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jaxaccel._graph import run
from jaxaccel.export._onnx import _model, model
from jaxaccel.export._onnx._grids import on_grid
from jaxaccel.export._onnx._int8 import OnGrids, _Reals, execute
from jaxaccel.export._onnx._lowered import lowered
from jaxaccel.export._onnx._settled import settled
from jaxaccel.quantize._arithmetic import dequantize
from jaxaccel.quantize._program import end_of
from tests.onnx_engines import feeds, run_by

ENGINES = ("jax", "onnxruntime", "openvino")


@dataclass(frozen=True)
class Shown(OnGrids):
    """The function with the result of each integer step, and its own results."""

    def __call__(self, params, *args):
        found = []
        results = self.fn.run(params, args, found, execute)
        return {"steps": [s.result for s in found], "results": results}


def in_jax(fn, params, *args):
    """What would be written for arguments of these shapes: operations that know their JAX."""
    call = _model.checked(fn, params, args, None)
    traced, arrays = _model._traced(call)
    graph = settled(traced.graph, dict(zip(traced.graph.inputs, arrays.items(), strict=False)))
    made = lowered(graph, list(call.inputs.values())).graph
    return jax.jit(lambda *args: run(made, jax.tree.leaves(args)))(*args)


def written(fn, params, *args):
    """What each engine computes, for any arguments."""
    shown = Shown(fn)
    made, tree = (
        model(shown, params, args),
        jax.tree.structure(jax.eval_shape(shown, params, *args)),
    )

    def by(name):
        if name == "jax":
            return lambda *args: jax.tree.unflatten(tree, in_jax(shown, params, *args))
        return lambda *args: jax.tree.unflatten(tree, run_by(name, made, [feeds(made, *args)])[0])

    return {name: by(name) for name in ENGINES}


def expected(fn, params, *args):
    """The same by XLA, on integers; and the grid of each step, None where it gives real numbers."""
    found = fn.segments(params, *args)
    real = [s.result if s.grid is None else dequantize(s.result, s.grid) for s in found]
    results = jax.jit(fn)(params, *args)
    return {"steps": real, "results": results}, [s.grid for s in found]


def steps_apart(found, expected, grids):
    """How many integers differ by how many steps of their grid."""
    counts = Counter()
    for a, b, grid in zip(found["steps"], expected["steps"], grids, strict=True):
        if grid is not None:
            off = np.rint((np.asarray(a, np.float64) - np.asarray(b)) / grid.scale).astype(int)
            counts.update(np.abs(off).ravel().tolist())
    return counts


def apart(found, expected):
    """The largest difference of the results, in units of the largest element."""
    pairs = zip(
        jax.tree.leaves(found["results"]), jax.tree.leaves(expected["results"]), strict=True
    )
    return max(
        float(np.abs(np.asarray(a) - b).max() / (np.abs(b).max(initial=0) or 1)) for a, b in pairs
    )


class Reset(_Reals):
    """Every step reads what XLA has there, but for those inside a loop."""

    def __init__(self, program, setting, given=()):
        super().__init__(program, setting)
        self.given = given

    def _keep(self, step, operands, result, acc=None, constants=None):
        super()._keep(step, operands, result, acc, constants)
        found, end = self.setting.segments or [], end_of(step)
        if found and found[-1].grid is not None:
            self.integers_[end] = on_grid(self.given[len(found) - 1], self.grid(end))


@dataclass(frozen=True)
class Alone:
    """What each step of a function gives for the integers that XLA has before it."""

    fn: Any

    def __call__(self, params, args, given):
        found = []
        run = lambda program, arguments, setting: Reset(program, setting, given).outputs(arguments)
        self.fn.run(params, args, found, run)
        return [s.result for s in found]


def alone(fn, params, args, wanted, grids):
    """By engine, how many integers differ by how many steps, where all before them is the same."""
    shown, given = Alone(fn), wanted["steps"]
    made = model(shown, params, (args, given), None)
    counts = {}
    for engine in ENGINES:
        if engine == "jax":
            found = in_jax(shown, params, args, given)
        else:
            (found,) = run_by(engine, made, [feeds(made, args, given)])
        counts[engine] = steps_apart({"steps": found}, wanted, grids)
    return counts
