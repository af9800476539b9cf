"""`jx.quantize.fake`: quantization-aware training, with steps that are learned."""

from collections.abc import Callable, Iterable, Sequence
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from jaxaccel._recipe import with_step
from jaxaccel._select import Where
from jaxaccel.fold._transform import keyed
from jaxaccel.quantize import _calibrate, _constants
from jaxaccel.quantize._arithmetic import Grid
from jaxaccel.quantize._assemble import assembled
from jaxaccel.quantize._plan import Plan
from jaxaccel.quantize._ranges import Calibration
from jaxaccel.quantize._straight import Rounded, rounded
from jaxaccel.quantize._traced import (
    Quantized,
    Traced,
    check_params,
    check_same,
    folded,
    signature,
)
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
    trained, too, except those inside of a function with a derivative of its own, which keeps it.
    Batch norm is folded first; zero points stay as they were calibrated. Given bfloat16, it
    computes with steps of bfloat16; `convert` takes those of the tree that it is given.

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
    return Fake(traced, params, args, made, grids, scales == "power_of_two")


class Fake:
    """What `fake` returns; `params` is the tree to train from."""

    def __init__(
        self,
        traced: Traced,
        params: PyTree,
        args: Sequence[Any],
        made: Plan,
        grids: Sequence[Grid],
        power: bool,
    ) -> None:
        self._traced, self._axes, self._power = traced, dict(made.axes), power
        self._signature = signature(made)
        self.recipe = with_step(traced.fn, "quantize.fake")
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
        made, traced = self._traced.plan(tree["weights"], args, cast=True)
        check_same(self, made, self._signature)
        leaves = keyed(tree["weights"])
        for keys, axes in self._axes.items():
            x, scale = leaves[keys], self._scale(tree["scales"]["kernels"]["/".join(keys)])
            terms = prod(n for i, n in enumerate(x.shape) if i not in axes)
            leaves[keys] = rounded(x, scale, -127, 127, terms)
        scales = [self._scale(scale) for scale in tree["scales"]["activations"]]
        grids = list(zip(scales, self._zeros, strict=True))
        arguments = [*leaves.values(), *jax.tree.leaves(args)]
        results = Rounded(made.program, traced.graph, grids, self._power)(*arguments)
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
        scale = jnp.maximum(jnp.abs(scale.astype(jnp.float32)), _SMALLEST)
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
