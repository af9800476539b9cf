"""A function with the plan of each of its calls, and the quantized function that runs it."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
from jaxtyping import PyTree

from jaxaccel._recipe import with_step
from jaxaccel._trace import Trace, trace
from jaxaccel.fold import batchnorm
from jaxaccel.fold._transform import keyed
from jaxaccel.fold._view import Keys
from jaxaccel.quantize._arithmetic import Grid
from jaxaccel.quantize._execute import Constants, Segment, Setting, execute
from jaxaccel.quantize._layers import Layer
from jaxaccel.quantize._plan import Activations, Choice, Plan, plan
from jaxaccel.quantize._program import Program, end_of
from jaxaccel.quantize._qtensor import all_finite, is_qtensor
from jaxaccel.quantize._report import report


class Traced:
    """A function, its original parameters' tree, and what is asked for."""

    def __init__(self, fn: Callable, params: PyTree, choice: Choice) -> None:
        self.fn, self.choice = fn, choice
        self.tree = jax.tree.structure(params)
        self.avals = {keys: jax.typeof(leaf) for keys, leaf in keyed(params).items()}

    def plan(self, given: PyTree, args: Sequence[Any], cast: bool = False) -> tuple[Plan, Trace]:
        """Of a call with these parameters: original, quantized, or (`cast`) of other dtypes."""
        leaves = keyed(given, is_qtensor)
        if cast:
            avals = [jax.typeof(leaves[keys]) for keys in self.avals]
        else:
            avals = [self._aval(keys, leaves.get(keys)) for keys in self.avals]
        traced = trace(self.fn, jax.tree.unflatten(self.tree, avals), *args)
        inputs = traced.graph.inputs[: traced.num_params]
        return plan(traced.graph, dict(zip(inputs, self.avals, strict=True)), self.choice), traced

    def checked(self, given: PyTree, args: Sequence[Any]) -> Plan:
        """The plan, if something in it runs on integers.

        Raises:
            ValueError: nothing does.
        """
        made, _ = self.plan(given, args)
        if not any(one.steps for one in made.program.all):
            raise ValueError(_nothing(made.program))
        return made

    def leaving(self, reasons: Mapping[Keys, str]) -> "Traced":
        """The same with more kernels left in floating point, for these reasons."""
        other = copy(self)
        other.choice = self.choice._replace(left={**self.choice.left, **reasons})
        return other

    def _aval(self, keys: Keys, leaf: Any) -> Any:
        original = self.avals[keys]
        if leaf is None or is_qtensor(leaf):
            return original
        aval = jax.typeof(leaf)
        return aval if (aval.shape, aval.dtype) == (original.shape, original.dtype) else original


class ConstantKeys(NamedTuple):
    """Where the `Constants` of a layer are stored."""

    multiplier: Keys | None
    bias: Keys | None
    shift: Keys | None


class Quantized:
    """``fn(params, *args)`` on integers; see `report`."""

    def __init__(
        self,
        traced: Traced,
        made: Plan,
        new: Mapping[Keys, Any],
        grids: Sequence[Grid],
        names: Mapping[Keys, ConstantKeys],
    ) -> None:
        self._traced, self._grids, self._names = traced, tuple(grids), dict(names)
        self._signature = signature(made)
        self._expected = {keys: _shape(leaf) for keys, leaf in new.items()}
        self.report = report(made, grids)
        settings = {"activations": traced.choice.activations, **self.report.to_dict()}
        self.recipe = with_step(traced.fn, "quantize.int8", **settings)

    def __repr__(self) -> str:
        """The original function, and how much of it runs on integers."""
        name = getattr(self._traced.fn, "__name__", self._traced.fn)
        return f"<jx.quantize.int8 of {name!s}: {len(self.report.rows)} on integers>"

    def __call__(self, params: PyTree, *args: Any) -> Any:
        """The result of the original function, from quantized parameters."""
        return self.run(params, args)

    @property
    def activations(self) -> Activations:
        """As of `int8`."""
        return self._traced.choice.activations

    def segments(self, params: PyTree, *args: Any) -> list[Segment]:
        """Every integer step as it runs: integers in, integers or real numbers out."""
        found: list[Segment] = []

        def run(params: PyTree, args: Sequence[Any]) -> list[Any]:
            found.clear()
            self.run(params, args, found)
            return [(s.operands, s.accumulator, s.constants, s.result) for s in found]

        ran = jax.jit(run)(params, args)
        names = ("operands", "accumulator", "constants", "result")
        return [
            s._replace(**dict(zip(names, x, strict=True))) for s, x in zip(found, ran, strict=True)
        ]

    def names(self, kernel: Keys) -> ConstantKeys:
        """Where the constants of a layer are stored."""
        return self._names.get(kernel, ConstantKeys(None, None, None))

    def setting(self, given: Mapping[Keys, Any], segments: list[Segment] | None = None) -> Setting:
        """What to run with; the constants are those of the kernels that are given."""
        at = lambda keys: None if keys is None else given[keys]
        constants = {
            k: Constants(*map(at, names)) for k, names in self._names.items() if k in given
        }
        return Setting(self._traced.choice.activations, self._grids, constants, segments)

    def run(
        self,
        params: PyTree,
        args: Sequence[Any],
        segments: list[Segment] | None = None,
        execute: Callable[[Program, Sequence[Any], Setting], list[Any]] = execute,
    ) -> Any:
        """The same by another way to execute a program, and with what ran."""
        given = keyed(params, is_qtensor)
        self._check(given)
        made, traced = self._traced.plan(params, args)
        check_same(self, made, self._signature)
        setting = self.setting(given, segments)
        leaves = [given.get(keys) for keys in self._traced.avals]
        results = execute(made.program, [*leaves, *jax.tree.leaves(args)], setting)
        return jax.tree.unflatten(traced.out_tree, [jnp.asarray(x) for x in results])

    def _check(self, given: Mapping[Keys, Any]) -> None:
        for keys in self._expected.keys() ^ given.keys():
            missing = keys in self._expected
            raise ValueError(
                f"{'/'.join(keys)}: {'missing from' if missing else 'not in'} the quantized "
                "parameters; pass the tree that jx.quantize.int8 returned with this function"
            )
        for keys, shape in self._expected.items():
            if _shape(given[keys]) != shape:
                raise ValueError(
                    f"{'/'.join(keys)}: {_shape(given[keys])}, expected {shape}; pass the tree "
                    "that jx.quantize.int8 returned with this function"
                )


def _shape(leaf: Any) -> str:
    kind = "a QTensor" if is_qtensor(leaf) else "an array"
    return f"{kind} of shape {leaf.shape if is_qtensor(leaf) else jnp.shape(leaf)}"


def signature(made: Plan) -> list[Any]:
    """Equal for two plans that do the same, whatever the shapes."""
    found: list[Any] = [made.axes, made.grids]
    for program in made.program.all:
        view = program.view
        for step in program.steps.values():
            found.append((type(step).__name__, program.integers.get(end_of(step))))
            if isinstance(step, Layer):
                leaves = view.sources([step.kernel.leaf, *(s.other for s in step.tail.shifts)])
                found.append([view.leaves[leaf] for leaf in leaves])
    return found


def check_same(fn: Any, made: Plan, expected: list[Any]) -> None:
    """Raises a ValueError where the plan of a call is not that of the calibration."""
    if signature(made) != expected:
        raise ValueError(
            f"{fn!r}: for these arguments fn has other steps than for the batches of its "
            "calibration: they depend on shapes, or sum over an axis whose size is not known, as "
            "of the batch; quantize with batches of these shapes"
        )


def check_params(fn: Callable, params: PyTree) -> None:
    """Raises an error where a function, or a leaf, cannot be quantized."""
    if isinstance(fn, Quantized):
        raise ValueError(f"fn: {fn!r} is quantized already; pass the function that it was made of")
    for keys, leaf in keyed(params, is_qtensor).items():
        path = "/".join(keys)
        if not keys:
            raise ValueError(
                "params: is a single array, beside which nothing can stand; put it in a dict"
            )
        if is_qtensor(leaf):
            raise ValueError(
                f"{path}: is a QTensor already; pass jx.quantize.dequantize(params), or the "
                "parameters from before"
            )
        if isinstance(leaf, jax.ShapeDtypeStruct | jax.core.Tracer):
            raise TypeError(f"{path}: has no numbers yet; quantize outside of jax.jit, on arrays")
        if jnp.issubdtype(jnp.result_type(leaf), jnp.floating) and not all_finite(leaf):
            raise ValueError(f"{path}: holds NaN or infinity; restore an earlier checkpoint")


def folded(fn: Callable, params: PyTree, args: Sequence[Any]) -> tuple[Callable, PyTree]:
    """The function without batch norm; itself, if it has none."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "jx.fold.batchnorm: nothing to fold")
        return batchnorm(fn, params, *args)


def _nothing(program: Program) -> str:
    text = "jx.quantize.int8: fn has no convolution or dot product to quantize"
    left = [one for part in program.all for one in part.left]
    return text + "".join(f"; {one.where}: {one.reason} ({one.source})" for one in left[:3])
