"""`jx.quantize.fake`: quantization-aware training, with steps that are learned."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from jaxaccel._graph import Atom, Node, Value, run
from jaxaccel._rewritten import rerun
from jaxaccel._select import Where
from jaxaccel.fold._transform import keyed
from jaxaccel.fold._view import Keys
from jaxaccel.quantize import _calibrate, _constants
from jaxaccel.quantize._arithmetic import HIGHEST, LOWEST, Grid
from jaxaccel.quantize._assemble import assembled
from jaxaccel.quantize._layers import Bounds, Layer
from jaxaccel.quantize._program import Program, Step, end_of, operands_of, stays_integer
from jaxaccel.quantize._ranges import Calibration
from jaxaccel.quantize._traced import Quantized, Traced, check_params, folded
from jaxaccel.quantize._transform import Scales, check_option, choice

_SMALLEST = float(np.finfo(np.float32).tiny)


def fake(
    fn: Callable,
    params: PyTree,
    batches: Iterable[Any],
    *,
    calibration: str | Calibration = "mse",
    scales: Scales = "float",
    where: Where | None = None,
) -> "Fake":
    """The function as it computes after `int8`, in floating point, to be trained.

    Kernels and activations are rounded to the steps of their grids, and pass their gradients on
    as if they were not (straight-through), but for what is clipped. The steps themselves are
    trained, too. Batch norm is folded first; zero points stay as they were calibrated.

    Args:
        fn: ``fn(params, *args)``; as for inference.
        params: a pytree of arrays.
        batches: for calibration, as of `int8`.
        calibration: as of `int8`.
        scales: as of `int8`; powers of two are rounded to in every step.
        where: as of `int8`.

    Returns:
        ``qat_fn(tree, *args)``, with the tree to start from in ``qat_fn.params``:
        ``{"weights": ..., "scales": ...}``, floating-point arrays for any optimizer. Afterwards
        ``qat_fn.convert(tree)`` gives the ``(fn, params)`` of `int8` with these steps. Adam
        changes a number by its rate however small it is: give the steps a lower one.

    Raises:
        TypeError, ValueError: as `int8`.

    Example:
        >>> import jax.numpy as jnp
        >>> def net(params, x):
        ...     return jnp.maximum(x @ params["a"]["kernel"], 0) @ params["b"]["kernel"]
        >>> params = {"a": {"kernel": jnp.eye(3)}, "b": {"kernel": jnp.ones((3, 2))}}
        >>> x = jnp.array([[1.0, 2.0, -0.5]])
        >>> qat = fake(net, params, [x], calibration="minmax")
        >>> gradient = jax.grad(lambda tree: qat(tree, x).sum())(qat.params)
        >>> gradient["weights"]["b"]["kernel"].round(1)
        Array([[1., 1.],
               [2., 2.],
               [0., 0.]], dtype=float32)
        >>> small, new = qat.convert(qat.params)
        >>> small(new, x).round(1)
        Array([[3., 3.]], dtype=float32)

    Source: Esser et al. 2020, "Learned step size quantization" (https://arxiv.org/abs/1902.08153).
    """
    check_option("scales", scales, ("float", "power_of_two"))
    method = _calibrate.method(calibration)
    check_params(fn, params)
    args = _calibrate.first(batches)
    fn, params = folded(fn, params, args)
    traced = Traced(fn, params, choice(fn, params, args, "static", where))
    made = traced.checked(params, args)
    grids = _calibrate.grids(traced, params, batches, method, scales == "power_of_two")
    return Fake(traced, params, args, made.axes, grids, scales == "power_of_two")


class Fake:
    """What `fake` returns; `params` is the tree to train from."""

    def __init__(
        self,
        traced: Traced,
        params: PyTree,
        args: Sequence[Any],
        axes: Mapping[Keys, tuple[int, ...]],
        grids: Sequence[Grid],
        power: bool,
    ) -> None:
        self._traced, self._axes, self._power = traced, dict(axes), power
        self._args = jax.tree.map(jax.typeof, tuple(args))
        self._zeros = [grid.zero_point for grid in grids]
        leaves = keyed(params)
        kernels = {
            "/".join(keys): _constants.kernel(leaves[keys], kept, power).scale
            for keys, kept in self._axes.items()
        }
        activations = [jnp.float32(grid.scale) for grid in grids]
        self.params = {
            "weights": params,
            "scales": {"kernels": kernels, "activations": activations},
        }

    def __repr__(self) -> str:
        """The original function, and how many kernels and activations are rounded."""
        name = getattr(self._traced.fn, "__name__", self._traced.fn)
        return (
            f"<jx.quantize.fake of {name!s}: {len(self._axes)} kernels, {len(self._zeros)} grids>"
        )

    def __call__(self, tree: PyTree, *args: Any) -> Any:
        """The result of the function, rounded as `int8` rounds."""
        self._check(tree)
        made, traced = self._traced.plan(tree["weights"], args)
        leaves = keyed(tree["weights"])
        for keys, axes in self._axes.items():
            x, scale = leaves[keys], self._scale(tree["scales"]["kernels"]["/".join(keys)])
            terms = prod(n for i, n in enumerate(x.shape) if i not in axes)
            leaves[keys] = rounded(x, scale, -127, 127, terms)
        scales = [self._scale(scale) for scale in tree["scales"]["activations"]]
        grids = list(zip(scales, self._zeros, strict=True))
        arguments = [*leaves.values(), *jax.tree.leaves(args)]
        results = _run(made.program, arguments, grids, self._power)
        return jax.tree.unflatten(traced.out_tree, results)

    def convert(self, tree: PyTree) -> tuple[Quantized, PyTree]:
        """The function and parameters of `int8`, with the steps of a trained tree.

        Raises:
            ValueError: `tree` is not of this function.
        """
        self._check(tree)
        scales = jax.tree.map(self._scale, tree["scales"])
        grids = [Grid(float(scale), zero) for scale, zero in
                 zip(scales["activations"], self._zeros, strict=True)]  # fmt: skip
        check_params(self._traced.fn, tree["weights"])
        leaves = keyed(tree["weights"])
        kernels = {
            keys: _constants.with_scale(leaves[keys], scales["kernels"]["/".join(keys)])
            for keys in self._axes
        }
        return assembled(self._traced, tree["weights"], self._args, grids, self._power, kernels)

    def _scale(self, scale: Float[Array, "..."]) -> Float[Array, "..."]:
        """A trained step as it is used: positive, and a power of two where that is asked for."""
        scale = jnp.maximum(jnp.abs(scale), _SMALLEST)
        if not self._power:
            return scale
        # ldexp is exact, where exp2 of an integer is not on every backend.
        power = jnp.round(jnp.log2(jax.lax.stop_gradient(scale))).astype(jnp.int32)
        whole = jnp.ldexp(jnp.float32(1), power)
        return scale + jax.lax.stop_gradient(whole - scale)

    def _check(self, tree: PyTree) -> None:
        expected = jax.tree.structure(self.params)
        if jax.tree.structure(tree) != expected:
            raise ValueError(
                f"{self!r}: expected a tree like its params, {{'weights': ..., 'scales': ...}}, "
                f"got {jax.tree.structure(tree)}; train qat_fn.params"
            )


def rounded(
    x: Float[Array, "..."],
    scale: Float[Array, "..."],
    low: int,
    high: int,
    terms: int,
    nearest: Callable[[Array], Array] = jnp.round,
) -> Float[Array, "..."]:
    """``clip(round(x / scale), low, high) * scale``, straight through the rounding.

    The gradient of the scale is that of `terms` numbers, and is brought to that of one weight.
    """
    share, fixed = 1 / np.sqrt(terms * 127), jax.lax.stop_gradient(scale)
    scale = fixed + (scale - fixed) * share  # exactly what it was
    steps = x.astype(jnp.float32) / scale
    inside = (steps >= low) & (steps <= high)  # the largest weight of a channel lies on the bound
    steps = jnp.where(inside, steps, jnp.clip(jax.lax.stop_gradient(steps), low, high))
    steps = steps + jax.lax.stop_gradient(nearest(steps) - steps)
    return (steps * scale).astype(x.dtype)


def _halves_up(x: Float[Array, "..."]) -> Float[Array, "..."]:
    return jnp.floor(x + 0.5)


def _run(
    program: Program,
    arguments: Sequence[Any],
    grids: Sequence[tuple[Array, int]],
    power: bool,
) -> list[Any]:
    """Runs the graph; what is in 8 bits of `int8` is rounded to its grid, halves as there."""
    graph = program.view.graph
    values: dict[Value, Any] = dict(graph.constants)
    values.update(zip(graph.inputs, arguments, strict=True))
    steps = [s for s in program.steps.values() if stays_integer(s)]
    ends = {end_of(s): s for s in steps if end_of(s) in program.integers}

    def read(atom: Atom, step: Step | None) -> Any:
        if not isinstance(atom, Value):
            return atom.val
        reads = step is not None and program.runs(step) and atom in operands_of(step)
        if reads and atom in program.integers and atom not in ends:
            return _on_grid(program, atom, values[atom], grids, jnp.round)
        return values[atom]

    for node in graph.nodes:
        operands = [read(atom, program.steps.get(node)) for atom in node.inputs]
        results = _entered(program, node, operands, grids, power)
        for value, x in zip(node.outputs, results, strict=True):
            if value in ends:
                shifted = power or not isinstance(ends[value], Layer)
                x = _on_grid(program, value, x, grids, _halves_up if shifted else jnp.round)
            values[value] = x
    return [read(atom, None) for atom in graph.outputs]


def _on_grid(
    program: Program,
    value: Value,
    x: Array,
    grids: Sequence[tuple[Array, int]],
    nearest: Callable[[Array], Array],
) -> Array:
    scale, zero = grids[program.integers[value]]
    x = jnp.clip(x, *program.bounds.get(value, Bounds()))
    return rounded(x, scale, LOWEST - zero, HIGHEST - zero, prod(x.shape[1:]), nearest)


def _entered(
    program: Program,
    node: Node,
    operands: list[Any],
    grids: Sequence[tuple[Array, int]],
    power: bool,
) -> Sequence[Any]:
    """The results of a node, of a loop with what is rounded in it."""
    if node not in program.bodies:
        return node.run(operands)
    bodies: list[Callable[..., list[Any]]] = [
        lambda *args, body=body: _run(body, args, grids, power) for body in program.bodies[node]
    ]
    if node.name == "while":
        bodies.insert(0, lambda *args: run(node.bodies[0], args))
    return rerun(node, operands, bodies)
