"""`jx.export.onnx`: a function and its parameters as a file of ONNX."""

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.core
import jax.dtypes
import jax.numpy as jnp
from jaxtyping import PyTree

from jaxaccel._autotune import rules_alone
from jaxaccel._graph import aval_of, leaf_paths, values_of
from jaxaccel._slices import is_symbolic
from jaxaccel._trace import Trace, check_transparent, trace
from jaxaccel._tuned import untuned
from jaxaccel.export._batch import Axes, symbolic
from jaxaccel.export._files import staged, sync
from jaxaccel.export._onnx._assembled import assembled
from jaxaccel.export._onnx._converted import check_installed, first_line, only_example
from jaxaccel.export._onnx._int8 import OnGrids, as_written
from jaxaccel.export._onnx._lowered import lowered
from jaxaccel.export._onnx._settled import settled
from jaxaccel.export._tree import describe, implementations, raw, typed
from jaxaccel.fold import batchnorm

OPSETS = range(17, 24)
_WIDE = ("float64", "int64", "uint64", "complex128")
_NOT_PASSED = ("bfloat16", "complex64", "int2", "int4", "uint2", "uint4")


def onnx(
    path: str | os.PathLike[str],
    fn: Callable,
    params: PyTree,
    *example: Any,
    batch_axes: Axes = 0,
    opset: int = 17,
) -> None:
    """Writes a function and its parameters as a file of ONNX, for engines such as onnxruntime.

    Batch norm is folded first. The file computes in 32 bits, as JAX does by default. Images keep
    their layout at the inputs and the results; inside they have their channels first, as the
    operations of ONNX ask. It is written whole or not at all.

    A function of `jx.quantize.int8` becomes one of 8 bits: each step between ``DequantizeLinear``
    and ``QuantizeLinear``, of which engines make integer kernels. They round halves to even, and
    biases are whole numbers, so that an integer may be one off; where kernels alone are in 8 bits,
    engines may round the data as well. On x86 without VNNI the sums of onnxruntime saturate,
    unless its ``session.x64quantprecision`` is "1". Run the file in the engine that is to have it:
    openvino 2026.4 is wrong about some loops beside layers of 8 bits.

    Args:
        path: the file.
        fn: ``fn(params, *args)``; inference. Autotuned operations become ONNX's own.
        params: a pytree of arrays; each is in the file under its path.
        *example: arguments of `fn`: pytrees (dicts, lists, tuples) of arrays, or of
            `jax.ShapeDtypeStruct`. The inputs of the file are named by their paths, ``args/0`` if
            the first is an array; the results ``result``, or by the paths below it.
        batch_axes: which axis of each argument is the batch, as ``in_axes`` of `jax.vmap`. The
            file works for every size of it, 1 included; an `fn` that compares it with a number is
            told that they differ. None: for the sizes of the example alone.
        opset: the version of ONNX's operations, 17 to 23.

    Raises:
        ImportError: jax2onnx or onnx is missing.
        NotImplementedError: a primitive cannot be written; the message names the line of it.
        TypeError: a leaf is no array, has no numbers yet, or is of 64 bits; an argument or a
            result has another kind of node.
        ValueError: the axes do not fit the arguments, `fn` does not work for every batch size, its
            activations are "dynamic", or a file of ONNX cannot hold so much.

    Example:
        >>> import tempfile, jax.numpy as jnp, numpy as np, onnxruntime
        >>> def net(params, x):
        ...     return jnp.tanh(x @ params["dense"]["kernel"])
        >>> path = tempfile.mkdtemp() + "/net.onnx"
        >>> onnx(path, net, {"dense": {"kernel": jnp.eye(2)}}, jnp.ones((4, 2)))
        >>> session = onnxruntime.InferenceSession(path)
        >>> session.run(None, {"args/0": np.zeros((1, 2), "float32")})
        [array([[0., 0.]], dtype=float32)]
    """
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise IsADirectoryError(f"{target}: is a folder; name a file")
    made = model(fn, params, example, batch_axes, opset).SerializeToString()
    with staged(target) as stage:
        (stage / "model").write_bytes(made)
        sync(stage / "model")
        os.replace(stage / "model", target)
        sync(target.parent)


def model(
    fn: Callable, params: PyTree, example: Sequence[Any], batch_axes: Axes = 0, opset: int = 17
) -> Any:
    """The ``onnx.ModelProto`` that `onnx` writes."""
    return written(checked(fn, params, example, batch_axes), opset)


class Call(NamedTuple):
    """What is to be written: a function of flat arguments, and how these are called."""

    fn: Callable
    params: PyTree
    example: tuple[Any, ...]
    inputs: dict[str, Any]
    keys: Mapping[str, str | None]  # the implementation of those inputs that are random keys
    results: list[str]
    tree: Any  # of the results

    def flat(self, fn: Callable) -> Callable:
        """A function of the parameters and of arrays, in the place of `fn`."""
        tree = jax.tree.structure(self.example)

        def run(params: PyTree, *arrays: Any) -> list[Any]:
            pairs = zip(self.inputs, arrays, strict=True)
            args = jax.tree.unflatten(tree, [typed(x, self.keys[name]) for name, x in pairs])
            return [raw(x) for x in jax.tree.leaves(fn(params, *args))]

        return untuned(run)


def checked(fn: Callable, params: PyTree, example: Sequence[Any], batch_axes: Axes) -> Call:
    """What `onnx` is asked to write; raises where it cannot be."""
    check_installed()
    check_transparent(fn)
    fn, example = as_written(fn), tuple(example)
    leaves = leaf_paths(params)
    if not leaves:
        raise TypeError(f"params: {params!r} has no arrays; fn takes its parameters first")
    for name, leaf in leaves.items():
        aval_of(name, leaf)
        if isinstance(leaf, jax.ShapeDtypeStruct | jax.core.Tracer):
            raise TypeError(f"{name}: has no numbers yet; export outside of jax.jit, arrays")
        _check_dtype(name, leaf, _WIDE)
    given = describe(example, "args", custom=False)
    inputs = symbolic(example, given, batch_axes)
    with rules_alone():
        results = jax.eval_shape(fn, params, *example)  # the caller's own mistakes, as they are
    made = describe(results, "result", custom=False)
    if not made.names:
        raise ValueError(f"fn returns no arrays, but {results!r}")
    passed = [*jax.tree.leaves(example), *jax.tree.leaves(results)]
    for name, leaf in zip((*given.names, *made.names), passed, strict=True):
        _check_dtype(name, leaf, (*_WIDE, *_NOT_PASSED))
    named, tree = dict(zip(given.names, inputs, strict=True)), jax.tree.structure(results)
    return Call(fn, params, example, named, implementations(given.description), made.names, tree)


def _check_dtype(name: str, leaf: Any, refused: Sequence[str]) -> None:
    dtype = jnp.result_type(leaf)
    if dtype.name in refused:
        raise TypeError(
            f"{name}: is of {dtype}, and a file of ONNX computes in 32 bits; cast it, or export "
            "with jax.enable_x64(False)"
            if dtype.name in _WIDE
            else f"{name}: is of {dtype}, which engines neither take nor return; cast it"
        )


def written(call: Call, opset: int = 17) -> Any:
    """The model of a call."""
    if type(opset) is not int or opset not in OPSETS:
        raise ValueError(f"opset={opset!r}: must be one of {OPSETS[0]} to {OPSETS[-1]}")
    with rules_alone(), jax.enable_x64(False):
        traced, arrays = _traced(call)
        _check_keys(call, traced)
        given = dict(zip(traced.graph.inputs, arrays.items(), strict=False))  # the first of them
        try:
            made = lowered(settled(traced.graph, given), list(call.inputs.values()))
            return assembled(made, call.inputs, call.results, opset)
        except jax.errors.InconclusiveDimensionOperation as error:
            raise ValueError(only_example(first_line(error))) from error


def _traced(call: Call) -> tuple[Trace, dict[str, Any]]:
    """For every batch size, and the parameters by their names; batch norm folded, if it can be."""
    fn, params = call.fn, call.params
    # What keeps it from being folded keeps nothing from being written.
    with suppress(Exception), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "jx.fold.batchnorm: nothing to fold")
        if not isinstance(fn, OnGrids):  # whose batch norm is folded
            fn, params = batchnorm(fn, params, *call.example)
    try:
        return _trace(call, fn, params)
    except Exception as error:
        if not any(is_symbolic(aval.shape) for aval in call.inputs.values()):
            raise
        raise ValueError(only_example(first_line(error))) from error


def _check_keys(call: Call, traced: Trace) -> None:
    """Raises a TypeError where `fn` reads a random key that it is given."""
    read = {value for node in traced.graph.nodes for value in values_of(node.inputs)}
    arguments = traced.graph.inputs[traced.num_params :]
    for (name, key), value in zip(call.keys.items(), arguments, strict=True):
        if key is not None and value in read:
            raise TypeError(
                f"{name}: is a random key, which ONNX has not; let fn hold a fixed one, or draw "
                "the numbers before and pass these"
            )


def _trace(call: Call, fn: Callable, params: PyTree) -> tuple[Trace, dict[str, Any]]:
    names = describe(params, "", custom=True).names
    arrays = dict(zip(names, jax.tree.leaves(params), strict=True))
    return trace(call.flat(fn), params, *call.inputs.values()), arrays
