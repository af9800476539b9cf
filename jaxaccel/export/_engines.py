"""`jx.export.compile`: a function on an engine, called as it was before."""

import importlib
import os
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias, cast

import jax
import numpy as np
from jaxtyping import PyTree

from jaxaccel.export._batch import Axes, symbolic
from jaxaccel.export._manifest import Aval
from jaxaccel.export._onnx import checked, written
from jaxaccel.export._tree import describe, raw

Engine: TypeAlias = Literal["xla", "onnxruntime", "openvino"]
Run: TypeAlias = Callable[[dict[str, np.ndarray]], Sequence[np.ndarray]]


def compile(
    fn: Callable,
    params: PyTree,
    *example: Any,
    engine: Engine = "xla",
    batch_axes: Axes = 0,
    opset: int = 17,
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
        batch_axes, opset: as of `jx.export.onnx`.

    Returns:
        A function of the same arguments, without the parameters. Its result is the same tree, of
        JAX's arrays for "xla" and NumPy's for the others. Engines differ where ONNX leaves it open:
        openvino's relu gives a number for NaN, and its top k of equal numbers any of them.

    Raises:
        ImportError: the engine is not installed.
        NotImplementedError, TypeError: as `jx.export.onnx`.
        RuntimeError: the engine does not take what was written.
        ValueError: as `jx.export.onnx`, or for an unknown engine.

    Example:
        >>> import jax.numpy as jnp
        >>> net = lambda params, x: {"y": x @ params["kernel"]}
        >>> params = {"kernel": jnp.array([[1.0], [2.0]])}
        >>> call = compile(net, params, jnp.ones((4, 2)), engine="onnxruntime")
        >>> call(jnp.array([[1.0, 1.0]]))
        {'y': array([[3.]], dtype=float32)}
    """
    if engine != "xla" and engine not in _STARTED:
        raise ValueError(f"engine={engine!r} must be one of 'xla', 'onnxruntime', 'openvino'")
    if engine == "xla":
        given = describe(tuple(example), "args", custom=False)
        inputs = dict(zip(given.names, symbolic(example, given, batch_axes), strict=True))
        jax.eval_shape(fn, params, *example)
        return Compiled(engine, params, _xla(fn, params, _Arguments.of(example, inputs)))
    imported(engine)  # before the work that needs it
    call = checked(fn, params, example, batch_axes)
    made = written(call, opset)
    try:
        run = started(engine, made.SerializeToString())
    except Exception as error:  # of the engine's own kinds
        raise RuntimeError(f"engine={engine!r} does not take what was written: {error}") from error
    results = [_aval_of(info) for info in made.graph.output]
    arguments = _Arguments.of(example, call.inputs)
    return Compiled(engine, params, _foreign(engine, run, arguments, results, call.tree))


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
            RuntimeError: the engine fails, or gives arrays of other shapes than the function.
            TypeError, ValueError: the arguments are not like the example; the message names the
                path.
        """
        return self.bind(*args)()


class _Arguments(NamedTuple):
    """What a call takes."""

    tree: Any
    names: list[str]
    avals: list[Aval]

    @classmethod
    def of(cls, example: tuple[Any, ...], inputs: Mapping[str, Any]) -> "_Arguments":
        """From an example, and its leaves by their names as shapes."""
        return cls(jax.tree.structure(example), [*inputs], list(map(Aval.of, inputs.values())))

    def leaves(self, args: tuple[Any, ...]) -> list[Any]:
        """Those of a call, random keys as their numbers; raises an error where they differ."""
        leaves, found = jax.tree.flatten(args)
        if found != self.tree:
            raise ValueError(f"args: {found}, expected {self.tree}")
        leaves = list(map(raw, leaves))
        for name, leaf, aval in zip(self.names, leaves, self.avals, strict=True):
            aval.check(name, leaf)
        return leaves


def _xla(fn: Callable, params: PyTree, arguments: _Arguments) -> Callable[..., Callable[[], Any]]:
    compiled, held = jax.jit(fn), jax.device_put(params)

    def bind(*args: Any) -> Callable[[], Any]:
        arguments.leaves(args)
        given = jax.device_put(args)
        return lambda: compiled(held, *given)

    return bind


def _foreign(
    engine: str, run: Run, arguments: _Arguments, results: Sequence[Aval], tree: Any
) -> Callable[..., Callable[[], Any]]:
    """For an engine that takes and returns NumPy's arrays."""

    def bind(*args: Any) -> Callable[[], Any]:
        given = zip(arguments.names, arguments.leaves(args), arguments.avals, strict=True)
        arrays = {name: np.asarray(x, aval.dtype, order="C") for name, x, aval in given}

        def call() -> Any:
            found = run(arrays)
            for place, (array, aval) in enumerate(zip(found, results, strict=True)):
                if not aval.fits(Aval.of(array)):
                    raise RuntimeError(
                        f"{engine} gives {Aval.of(array)} for result {place}, which is {aval}: it "
                        "has a fault in what this function needs; use another engine"
                    )
            return jax.tree.unflatten(tree, found)

        return call

    return bind


def _aval_of(info: Any) -> Aval:
    """Of a result of a model."""
    from onnx import helper

    kind = info.type.tensor_type
    sizes = tuple(d.dim_param or d.dim_value for d in kind.shape.dim)
    return Aval(helper.tensor_dtype_to_np_dtype(kind.elem_type).name, sizes)


def started(engine: str, content: bytes) -> Run:
    """A model of ONNX on an engine, from arrays by their names to a list of them."""
    return _STARTED[engine](imported(engine), content)


def imported(engine: str) -> Any:
    """The package of an engine; raises an ImportError that names it."""
    modules, reports = cast(dict[str, Any], sys.modules), "openvino_telemetry"
    known = reports in modules
    # openvino would report its use, by a process that it forks.
    modules.setdefault(reports, None)
    try:
        return importlib.import_module(engine)
    except ImportError as error:
        raise ImportError(f"engine={engine!r} is not installed: pip install {engine}") from error
    finally:
        if not known:
            modules.pop(reports, None)


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
        # Of a number, openvino wants to be able to write to it.
        kept = {name: x if x.ndim else x.copy() for name, x in arrays.items() if name in read}
        return [*request.infer(kept, share_inputs=True).values()]

    return run


_STARTED: dict[str, Callable[[Any, bytes], Run]] = {
    "onnxruntime": _onnxruntime,
    "openvino": _openvino,
}
