"""The transform and the function that it returns."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
from jaxtyping import PyTree

from jaxaccel._graph import Value, run
from jaxaccel._recipe import with_step
from jaxaccel._trace import Trace, trace
from jaxaccel.fold import _describe, _signature
from jaxaccel.fold._coefficients import new_leaves
from jaxaccel.fold._match import Matches, match
from jaxaccel.fold._report import Report
from jaxaccel.fold._rewrite import rewrite
from jaxaccel.fold._view import Keys, View, view


def batchnorm(fn: Callable, params: PyTree, *example: Any) -> tuple[Any, PyTree]:
    """Batch norm and every other per-channel affine chain, folded into kernels and biases.

    What adds to, or multiplies, the result of a convolution or a dot product per output channel
    goes into the kernel and one bias: ``s * (conv(x, W) + c) + b = conv(x, s * W) + (s * c + b)``.
    So does what stands before it, where no padding comes between. A chain behind anything else
    (a concatenation, a pooling) becomes one multiplication and one addition, stored in its scale
    and bias, if it has these. The rest is left as it is; ``fn.report`` says what and why.

    Args:
        fn: ``fn(params, *args)``; inference, with running statistics in `params`.
        params: a pytree of arrays.
        *example: arguments of `fn`, arrays or `jax.ShapeDtypeStruct`s. Any batch size works
            afterwards.

    Returns:
        A function with a `report`, and its parameters: nested dicts under the original paths. The
        leaves that were folded away are absent, a new bias stands beside its kernel as ``bias``.
        If there is nothing to fold: `fn` and `params` themselves, with a warning.

    Raises:
        TypeError: `fn` takes or returns what is no array.
        ValueError: a new bias has the path of another leaf, or a coefficient is not finite.

    Example:
        >>> import jax.numpy as jnp
        >>> def net(params, x):
        ...     y = x @ params["dense"]["kernel"] - params["norm"]["mean"]
        ...     return y * jax.lax.rsqrt(params["norm"]["var"] + 1e-5)
        >>> norm = {"mean": jnp.ones(3), "var": jnp.full(3, 4.0)}
        >>> params = {"dense": {"kernel": jnp.ones((2, 3))}, "norm": norm}
        >>> folded, new = batchnorm(net, params, jnp.ones((1, 2)))
        >>> jax.tree.map(jnp.shape, new)
        {'dense': {'bias': (3,), 'kernel': (2, 3)}}
        >>> print(folded.report)
                into          what
        ----------------------------------------------------
        folded  dense/kernel  norm/{mean, var} -> dense/bias
        1 folded, 0 merged, 0 refused

    Source: Jacob et al. 2018, section 3.2 (https://arxiv.org/abs/1712.05877).
    """
    leaves = keyed(params)
    _, v = _view(fn, params, example, list(leaves))
    matches = match(v)
    report = _describe.report(v, matches)
    if not (report.folded or report.merged):
        warnings.warn(_nothing(report), stacklevel=2)
        return fn, params
    values = dict(zip(v.leaves, leaves.values(), strict=True))
    stored = _stored(v, matches, values)
    _, kept = rewrite(v, matches, stored)
    new = {keys: stored[keys] if keys in stored else leaves[keys] for keys in kept}
    return Folded(fn, params, new, _signature.signature(v, matches), report), nested(new)


class Folded:
    """``fn(params, *args)`` without the chains that were folded; see `report`."""

    def __init__(
        self, fn: Callable, params: PyTree, new: Mapping[Keys, Any], signature: str, report: Report
    ) -> None:
        self._fn, self._signature, self.report = fn, signature, report
        self.recipe = with_step(fn, "fold.batchnorm", **report.to_dict())
        self._tree = jax.tree.structure(params)
        self._originals = {keys: jax.typeof(leaf) for keys, leaf in keyed(params).items()}
        self._expected = {keys: jnp.shape(leaf) for keys, leaf in new.items()}

    def __repr__(self) -> str:
        """The original function, and how much was folded into its kernels."""
        counts = f"{len(self.report.folded)} folded, {len(self.report.merged)} merged"
        return f"<jx.fold.batchnorm of {getattr(self._fn, '__name__', self._fn)!s}: {counts}>"

    def __call__(self, params: PyTree, *args: Any) -> Any:
        """The result of the original function on folded parameters."""
        given = keyed(params)
        self._check(given)
        avals = {keys: self._aval(keys, given) for keys in self._originals}
        traced, v = _view(
            self._fn, jax.tree.unflatten(self._tree, avals.values()), args, list(avals)
        )
        matches = match(v)
        if _signature.signature(v, matches) != self._signature:
            raise ValueError(
                f"{self!r}: for these arguments fn has other chains, or other constants in them, "
                "than for the example: they depend on shapes; fold with an example of these shapes"
            )
        graph, kept = rewrite(v, matches, {keys: jax.typeof(x) for keys, x in given.items()})
        results = run(graph, [*(given[keys] for keys in kept), *jax.tree.leaves(args)])
        return jax.tree.unflatten(traced.out_tree, [jnp.asarray(x) for x in results])

    def _aval(self, keys: Keys, given: Mapping[Keys, Any]) -> Any:
        """What the original is traced with: the leaf given, if there is one of that shape."""
        original = self._originals[keys]
        same = keys in given and jnp.shape(given[keys]) == original.shape
        return jax.typeof(given[keys]) if same else original

    def _check(self, given: Mapping[Keys, Any]) -> None:
        for keys in self._expected.keys() ^ given.keys():
            missing = keys in self._expected
            raise ValueError(
                f"{'/'.join(keys)}: {'missing from' if missing else 'not in'} the folded "
                "parameters; pass the tree that jx.fold.batchnorm returned with this function"
            )
        for keys, shape in self._expected.items():
            if jnp.shape(given[keys]) != shape:
                raise ValueError(
                    f"{'/'.join(keys)}: shape {jnp.shape(given[keys])}, expected {shape}; pass "
                    "the tree that jx.fold.batchnorm returned with this function"
                )


def keyed(tree: PyTree, is_leaf: Callable[[Any], bool] | None = None) -> dict[Keys, Any]:
    """The leaves of a tree; a key of a path may hold a "/" itself."""
    name = lambda key: jax.tree_util.keystr((key,), simple=True)
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf)
    return {tuple(map(name, path)): leaf for path, leaf in leaves}


def nested(leaves: Mapping[Keys, Any]) -> Any:
    """Plain dicts with the leaves at their paths."""
    root: dict[str, Any] = {}
    for keys, leaf in leaves.items():
        if not keys:
            return leaf
        place = root
        for key in keys[:-1]:
            place = place.setdefault(key, {})
        place[keys[-1]] = leaf
    return root


def _view(
    fn: Callable, params: PyTree, args: Sequence[Any], keys: Sequence[Keys]
) -> tuple[Trace, View]:
    traced = trace(fn, params, *args)
    inputs = traced.graph.inputs[: traced.num_params]
    return traced, view(traced.graph, dict(zip(inputs, keys, strict=True)))


def _nothing(report: Report) -> str:
    text = "jx.fold.batchnorm: nothing to fold; fn and params are returned as they are"
    if report.refused:
        first = report.refused[0]
        text += f" ({len(report.refused)} refused; {first.where}: {first.reason})"
    return text


def _stored(v: View, matches: Matches, values: Mapping[Value, Any]) -> dict[Keys, Any]:
    """The new leaves, computed as one program."""
    leaves = list(values)
    compute = jax.jit(lambda arrays: new_leaves(v, matches, dict(zip(leaves, arrays, strict=True))))
    arrays = list(values.values())
    if any(isinstance(x, jax.ShapeDtypeStruct) for x in arrays):
        return jax.eval_shape(compute, arrays)[0]
    stored, affines = compute(arrays)
    if not any(isinstance(x, jax.core.Tracer) for x in arrays):
        _describe.check_finite(v, matches, values, affines)
    return stored
