"""Models of ONNX as onnxruntime and openvino run them, and what onnxruntime makes of them."""

import sys
from collections import Counter

import jax
import numpy as np
import onnx
import onnxruntime

sys.modules.setdefault("openvino_telemetry", None)  # pyright: ignore[reportArgumentType]
# It would fork, which JAX warns of.
import openvino  # noqa: E402

# Else data would be put on integers where only the weights of a matrix product are.
ENTRIES = {"qdq_matmulnbits_accuracy_level": "1"}
OPTIONS = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}
ENGINES = ("onnxruntime", "openvino")


def session(model, folder=None, **entries):
    """Of onnxruntime; its own form of the graph goes into the folder."""
    options = onnxruntime.SessionOptions()
    for name, value in {**ENTRIES, **entries}.items():
        options.add_session_config_entry(f"session.{name}", value)
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    if folder is not None:
        options.optimized_model_filepath = str(folder / "optimized.onnx")
    content = model if isinstance(model, bytes) else model.SerializeToString()
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def optimized(model, folder):
    """How many of which operation are left when onnxruntime has fused what it can."""
    session(model, folder)
    return operations(onnx.load(folder / "optimized.onnx"))


def operations(model):
    return Counter(node.op_type for node in model.graph.node)


def run_by(engine, model, batches, **options):
    """The results for each batch of arguments, which are given by name."""
    if engine == "onnxruntime":
        started = session(model, **options)
        return [started.run(None, feeds) for feeds in batches]
    compiled = _compiled(model, **options)
    names = {name for port in compiled.inputs for name in port.names}  # of what is read
    read = lambda feeds: {name: x for name, x in feeds.items() if name in names}
    return [[np.array(x) for x in compiled(read(feeds)).values()] for feeds in batches]


def _compiled(model, **options):
    core = openvino.Core()
    options = {**OPTIONS, "INFERENCE_NUM_THREADS": 1, **options}
    content = model if isinstance(model, bytes) else model.SerializeToString()
    return core.compile_model(core.read_model(content), "CPU", options)


def feeds(model, *args):
    names = [value.name for value in model.graph.input]
    return dict(zip(names, map(np.array, jax.tree.leaves(args)), strict=True))


def close(found, expected, tolerance=1e-5):
    """Relative to the largest element of each result."""
    expected = jax.tree.leaves(expected)
    assert len(found) == len(expected)
    for a, b in zip(found, map(np.asarray, expected), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        finite = b[np.isfinite(b)] if b.dtype.kind == "f" else np.zeros(0)
        largest = np.abs(finite).max(initial=0)
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * largest)


def same_by(engines, model, fn, params, batches, tolerance=1e-5):
    """Raises an AssertionError where an engine differs from what XLA computes."""
    given = [feeds(model, *args) for args in batches]
    expected = [jax.jit(fn)(params, *args) for args in batches]
    for engine in engines:
        for found, result in zip(run_by(engine, model, given), expected, strict=True):
            close(found, result, tolerance)


def precisions(model):
    """How often openvino runs which kind of layer in which precision."""
    infos = [node.get_rt_info() for node in _compiled(model).get_runtime_model().get_ops()]
    text = lambda info, name: info[name].astype(str)
    return Counter((text(i, "layerType"), text(i, "runtimePrecision")) for i in infos)
