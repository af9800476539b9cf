"""The peers of `experiments.benchmark`, each in the fastest of its modes."""

import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from itertools import product
from pathlib import Path
from typing import Any, cast

import numpy as np

from experiments import common, peer_networks
from experiments.benchmark_jax import LEARNING_RATE
from experiments.benchmark_networks import Problem, torch_model
from experiments.benchmark_timing import Engine, clocked, fastest, repeated

LAYOUTS = {"contiguous": "contiguous_format", "channels last": "channels_last"}
# Batches that the int8 engines see to choose their scales.
CALIBRATION = 4
_OPSET = 17


@dataclass(frozen=True)
class Kit:
    """PyTorch as all its candidates use it; `operators` must outlive torchvision's use."""

    torch: Any
    models: Any
    operators: Any
    device: str

    def model(self, problem: Problem, layout: str) -> Any:
        """A new network with the problem's weights."""
        model = torch_model(problem, self.torch, self.models)
        return model.to(self.device, memory_format=getattr(self.torch, LAYOUTS[layout]))

    def images(self, problem: Problem, layout: str) -> Any:
        """The batch, NCHW."""
        images = self.torch.tensor(nchw(problem.images)).to(self.device)
        return images.contiguous(memory_format=getattr(self.torch, LAYOUTS[layout]))

    def wait(self, _: Any) -> None:
        """Until the device is done; a CPU always is."""
        if self.device == "cuda":
            self.torch.cuda.synchronize()

    def autocast(self, bfloat16: bool) -> Any:
        """The context of a forward pass."""
        return self.torch.autocast(self.device, self.torch.bfloat16) if bfloat16 else nullcontext()


def threads() -> int:
    """How many cores this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def torch_kit(parser: common.Parser, device: str) -> Kit:
    """PyTorch and torchvision's networks, or an exit with one line."""
    (torch,) = common.packages(parser, "torch")
    torch.set_num_threads(threads())
    torch.set_float32_matmul_precision("high" if device == "cuda" else "highest")
    return Kit(torch, *peer_networks._models(torch, parser), device)


def engines(parser: common.Parser) -> None:
    """onnxruntime and openvino, or an exit with one line."""
    # It would fork a process full of threads to report its use.
    cast(dict[str, Any], sys.modules).setdefault("openvino_telemetry", None)
    common.packages(parser, "onnx", "onnxruntime", "openvino")


def nchw(images: np.ndarray) -> np.ndarray:
    """Images as PyTorch has them."""
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2))


def torch(kit: Kit, problem: Problem, compiled: bool, bfloat16: bool = False) -> Engine:
    """PyTorch, eager or compiled: training or inference in the fastest of its modes."""
    if compiled:
        # What earlier cases compiled would make the batch size a variable, which is slower.
        kit.torch.compiler.reset()
    made = _train_modes if problem.case.train else _infer_modes
    return fastest(dict(made(kit, problem, compiled, bfloat16)))


def _infer_modes(
    kit: Kit, problem: Problem, compiled: bool, bfloat16: bool
) -> Iterator[tuple[str, Callable[[], Engine]]]:
    """Layouts; eager with convolution and batch norm fused or not; what compilers offer."""
    if not compiled:
        for layout, fused in product(LAYOUTS, (True, False)):
            name = f"{layout}, {'fused' if fused else 'as trained'}"
            yield name, partial(_infer, kit, problem, layout, bfloat16, fused)
        return
    for layout, (mode, options) in product(LAYOUTS, _compilers(kit, frozen=True).items()):
        yield f"{layout}, {mode}", partial(_infer, kit, problem, layout, bfloat16, False, options)


def _train_modes(
    kit: Kit, problem: Problem, compiled: bool, bfloat16: bool
) -> Iterator[tuple[str, Callable[[], Engine]]]:
    """Layouts; eager with both of the fast Adams; compiled with the fused one."""
    if not compiled:
        for layout, adam in product(LAYOUTS, ("fused", "foreach")):
            yield f"{layout}, {adam} Adam", partial(_train, kit, problem, layout, bfloat16, adam)
        return
    for layout, (mode, options) in product(LAYOUTS, _compilers(kit, frozen=False).items()):
        name = f"{layout}, {mode}, fused Adam"
        yield name, partial(_train, kit, problem, layout, bfloat16, "fused", options)


def _compilers(kit: Kit, frozen: bool) -> dict[str, dict[str, Any]]:
    """Arguments of `torch.compile`: weights as constants for inference, CUDA's graphs on a GPU."""
    if kit.device == "cuda":
        return {"default": {}, "reduce-overhead": {"mode": "reduce-overhead"}}
    return {"freezing": {"options": {"freezing": True}}} if frozen else {"default": {}}


def _infer(
    kit: Kit,
    problem: Problem,
    layout: str,
    bfloat16: bool,
    fused: bool,
    options: dict[str, Any] | None = None,
) -> Engine:
    model, images = kit.model(problem, layout), kit.images(problem, layout)
    if fused:
        model = import_module("torch.fx.experimental.optimization").fuse(model)
    if options is not None:
        model = kit.torch.compile(model, dynamic=False, fullgraph=True, **options)

    def call() -> Any:
        with kit.torch.inference_mode(), kit.autocast(bfloat16):
            return model(images)

    logits, first = clocked(lambda: call().float().cpu().numpy())
    run = repeated(call, kit.wait, each=kit.device == "cpu")
    return Engine(run, lambda: None, logits, first)


def _train(
    kit: Kit,
    problem: Problem,
    layout: str,
    bfloat16: bool,
    adam: str,
    options: dict[str, Any] | None = None,
) -> Engine:
    model, images = kit.model(problem, layout).train(), kit.images(problem, layout)
    labels = kit.torch.tensor(problem.labels).to(kit.device)
    optimizer = kit.torch.optim.Adam(model.parameters(), lr=LEARNING_RATE, **{adam: True})
    initial = {name: value.clone() for name, value in model.state_dict().items()}

    def objective(images: Any, labels: Any) -> Any:
        with kit.autocast(bfloat16):
            logits = model(images)
        return kit.torch.nn.functional.cross_entropy(logits.float(), labels)

    if options is not None:
        objective = kit.torch.compile(objective, dynamic=False, fullgraph=True, **options)

    def call() -> Any:
        optimizer.zero_grad(set_to_none=True)
        loss = objective(images, labels)
        loss.backward()
        optimizer.step()
        return loss.detach()

    def restart() -> None:
        model.load_state_dict(initial)
        for values in optimizer.state.values():
            for value in values.values():
                value.zero_()

    loss, first = clocked(lambda: call().item())
    losses = np.array([loss, *(call().item() for _ in range(2))])
    return Engine(repeated(call, kit.wait, each=False), restart, losses, first)


def onnx_file(kit: Kit, problem: Problem, folder: Path, int8: bool) -> Path:
    """The network as a file that other engines read, made where it is not there yet."""
    path = folder / f"{problem.case.name}{'-int8' if int8 else ''}.onnx"
    if path.exists():
        return path
    if int8:
        return _quantized(onnx_file(kit, problem, folder, False), path, problem)
    model, images = kit.model(problem, "contiguous"), kit.images(problem, "contiguous")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the newer exporter needs another package
        names = {"input_names": ["images"], "output_names": ["logits"]}
        kit.torch.onnx.export(
            model, (images,), str(path), dynamo=False, opset_version=_OPSET, **names
        )
    return path


def _quantized(source: Path, path: Path, problem: Problem) -> Path:
    random, shape = np.random.default_rng(1), problem.images.shape
    drawn = [random.standard_normal(shape, np.float32) for _ in range(CALIBRATION)]
    batches = problem.calibration or drawn
    return quantize_static(source, path, [{"images": nchw(batch)} for batch in batches])


def quantize_static(
    source: Path, path: Path, feeds: Sequence[dict[str, np.ndarray]], method: str = "MinMax"
) -> Path:
    """Static int8 by onnxruntime's tools, as its documentation advises: prepared, per channel."""
    tools = import_module("onnxruntime.quantization")
    prepared = path.with_suffix(".prepared.onnx")
    import_module("onnxruntime.quantization.shape_inference").quant_pre_process(source, prepared)
    left = iter(feeds)

    class Reader(tools.CalibrationDataReader):
        def get_next(self) -> Any:
            return next(left, None)

    tools.quantize_static(
        prepared,
        path,
        Reader(),
        quant_format=tools.QuantFormat.QDQ,
        per_channel=True,
        activation_type=tools.QuantType.QUInt8,
        weight_type=tools.QuantType.QInt8,
        calibrate_method=getattr(tools.CalibrationMethod, method),
    )
    return path


def onnxruntime(kit: Kit, problem: Problem, folder: Path, int8: bool) -> Engine:
    """onnxruntime on the CPU, with all of its graph optimizations."""
    ort, path = import_module("onnxruntime"), onnx_file(kit, problem, folder, int8)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 3
    make = lambda: ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    session, compile_s = clocked(make)
    images = nchw(problem.images)
    call = lambda: session.run(None, {"images": images})[0]
    logits, first = clocked(call)
    run = repeated(call, lambda _: None, each=False)
    return Engine(run, lambda: None, logits, compile_s + first, compile_s)


def openvino(kit: Kit, problem: Problem, folder: Path, int8: bool) -> Engine:
    """openvino on the CPU, tuned for the time of one request, in float32 or from the int8 file."""
    core, path = import_module("openvino").Core(), onnx_file(kit, problem, folder, int8)
    config = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": threads(),
        "INFERENCE_PRECISION_HINT": "f32",  # the processor's bfloat16 would be other work
    }
    make = lambda: core.compile_model(path, "CPU", config).create_infer_request()
    request, compile_s = clocked(make)
    images = nchw(problem.images)
    call = lambda: request.infer([images], share_inputs=True, share_outputs=True)[0]
    logits, first = clocked(call)
    run = repeated(call, lambda _: None, each=False)
    return Engine(run, lambda: None, logits.copy(), compile_s + first, compile_s)
