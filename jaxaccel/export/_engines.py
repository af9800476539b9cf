"""`jx.export.compile`: a function on an engine, called as it was before."""

import importlib
import os
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias, cast

import jax
import numpy as np
from jaxtyping import PyTree

from jaxaccel.export._batch import Axes, symbolic
from jaxaccel.export._manifest import Aval
from jaxaccel.export._onnx import model
from jaxaccel.export._tree import describe

Engine: TypeAlias = Literal["xla", "onnxruntime", "openvino"]
Run: TypeAlias = Callable[[dict[str, np.ndarray]], Sequence[np.ndarray]]


def compile(
    fn: Callable, params: PyTree, *example: Any, engine: Engine = "xla", batch_axes: Axes = 0
) -> "Compiled":
    """A function and its parameters on an engine; `jx.measure.compare` takes it beside others.

    onnxruntime and openvino get what `jx.export.onnx` writes. They run it on the CPU, on all the
    cores that this process may use; openvino in float32, for the least time of one call.

    Args:
        fn: ``fn(params, *args)``; inference.
        params: a pytree of arrays.
        *example: arguments of `fn`: pytrees (dicts, lists, tuples) of arrays, or of
            `jax.ShapeDtypeStruct`.
        engine: "xla", which is `jax.jit` on JAX's default device; "onnxruntime"; "openvino".
        batch_axes: as of `jx.export.onnx`.

    Returns:
        A function of the same arguments, without the parameters. Its result is the same tree, of
        JAX's arrays for "xla" and NumPy's for the others.

    Raises:
        ImportError: the engine is not installed.
        NotImplementedError, TypeError: as `jx.export.onnx`.
        ValueError: as `jx.export.onnx`, or for an unknown engine.

    Example:
        >>> import jax.numpy as jnp
        >>> net = lambda params, x: {"y": x @ params["kernel"]}
        >>> params = {"kernel": jnp.array([[1.0], [2.0]])}
        >>> call = compile(net, params, jnp.ones((4, 2)), engine="onnxruntime")
        >>> call(jnp.array([[1.0, 1.0]]))
        {'y': array([[3.]], dtype=float32)}
    """
    if engine == "xla":
        return Compiled(engine, params, _xla(fn, params))
    if engine not in _STARTED:
        raise ValueError(f"engine={engine!r} must be one of 'xla', 'onnxruntime', 'openvino'")
    _imported(engine)  # before the work that needs it
    content = model(fn, params, example, batch_axes).SerializeToString()
    results = jax.tree.structure(jax.eval_shape(fn, params, *example))
    bind = _foreign(started(engine, content), example, batch_axes, results)
    return Compiled(engine, params, bind)


class Compiled:
    """``call(*args)``: a function on an engine, which holds the parameters.

    Attributes:
        engine: its name.
        params: the parameters.
        bind: ``bind(*args)`` is a call of no arguments: these are where the engine wants them.
    """

    def __init__(self, engine: str, params: PyTree, bind: Callable[..., Callable[[], Any]]) -> None:
        self.engine, self.params, self.bind = engine, params, bind

    def __repr__(self) -> str:
        return f"<a function on {self.engine}>"

    def __call__(self, *args: Any) -> Any:
        """The result.

        Raises:
            TypeError, ValueError: the arguments are not like the example; the message names the
                path. With "xla", what JAX raises for the function.
        """
        return self.bind(*args)()


def _xla(fn: Callable, params: PyTree) -> Callable[..., Callable[[], Any]]:
    compiled, held = jax.jit(fn), jax.device_put(params)

    def bind(*args: Any) -> Callable[[], Any]:
        given = jax.device_put(args)
        return lambda: compiled(held, *given)

    return bind


def _foreign(
    run: Run, example: Sequence[Any], batch_axes: Axes, results: Any
) -> Callable[..., Callable[[], Any]]:
    """For an engine that takes and returns NumPy's arrays."""
    given = describe(tuple(example), "args", custom=False)
    inputs = [Aval.of(x) for x in symbolic(example, given, batch_axes)]
    tree = jax.tree.structure(tuple(example))

    def bind(*args: Any) -> Callable[[], Any]:
        leaves, found = jax.tree.flatten(args)
        if found != tree:
            raise ValueError(f"args: {found}, expected {tree}")
        for name, leaf, aval in zip(given.names, leaves, inputs, strict=True):
            aval.check(name, leaf)
        arrays = {
            name: np.asarray(x, aval.dtype, order="C")
            for name, x, aval in zip(given.names, leaves, inputs, strict=True)
        }
        return lambda: jax.tree.unflatten(results, run(arrays))

    return bind


def started(engine: str, content: bytes) -> Run:
    """A model of ONNX on an engine, from arrays by their names to a list of them."""
    return _STARTED[engine](_imported(engine), content)


def _imported(engine: str) -> Any:
    # openvino would report its use, by a process that it forks.
    cast(dict[str, Any], sys.modules).setdefault("openvino_telemetry", None)
    try:
        return importlib.import_module(engine)
    except ImportError as error:
        raise ImportError(f"engine={engine!r} is not installed: pip install {engine}") from error


def _threads() -> int:
    """How many cores this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def _onnxruntime(tool: Any, content: bytes) -> Run:
    options = tool.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, _threads()
    # Else data that are float32 beside weights in 8 bits would be put on integers too.
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    session = tool.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return lambda arrays: session.run(None, arrays)


def _openvino(tool: Any, content: bytes) -> Run:
    options = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": _threads(),
        "INFERENCE_PRECISION_HINT": "f32",  # some processors would take bfloat16
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,  # as above
    }
    core = tool.Core()
    compiled = core.compile_model(core.read_model(content), "CPU", options)
    read = {name for port in compiled.inputs for name in port.names}
    own = threading.local()  # a request serves one caller at a time

    def run(arrays: dict[str, np.ndarray]) -> list[np.ndarray]:
        request = vars(own).get("request") or compiled.create_infer_request()
        own.request = request
        kept = {name: array for name, array in arrays.items() if name in read}
        return [*request.infer(kept, share_inputs=True).values()]

    return run


_STARTED: dict[str, Callable[[Any, bytes], Run]] = {
    "onnxruntime": _onnxruntime,
    "openvino": _openvino,
}
