"""The peers of `experiments.quantization`: Qwix and onnxruntime on the same network and batches."""

import warnings
from collections.abc import Callable
from functools import cache
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jax
import numpy as np
from flax import nnx

from experiments import common, peer_networks, torch_networks
from experiments.benchmark_networks import torch_layout
from experiments.benchmark_peers import nchw, quantize_static
from experiments.pruning import agree
from experiments.quantization_rows import WIDTH, Candidate, Run, Trial
from jaxaccel._graph import leaf_paths

_OPSET = 17
PACKAGES = ("qwix", "torch", "onnx", "onnxruntime")


def qwix(static: bool) -> Callable[[Trial], Candidate]:
    """Weights per channel and activations in int8, as in its README.

    Static: ranges are means over `batches` of the largest absolute number, seen as it trains
    (`QtProvider`), then passed on (`PtqProvider`). Batch norm stays, in float32.
    """

    def made(trial: Trial) -> Candidate:
        graph, state = nnx.split(qwix_module(trial, static))
        return lambda state, x: nnx.merge(graph, state)(x), state

    return made


def qwix_module(trial: Trial, static: bool) -> nnx.Module:
    tool, module = import_module("qwix"), plain_module(trial)
    kinds = {"weight_qtype": "int8", "act_qtype": "int8"}
    rules = [tool.QuantizationRule(module_path=".*", act_static_scale=static, **kinds)]
    if static:
        module = tool.quantize_model(module, tool.QtProvider(rules), trial.batches[0])
        for batch in trial.batches:
            module(batch)
    return tool.quantize_model(module, tool.PtqProvider(rules), trial.batches[0])


def plain_module(trial: Trial) -> Any:
    """The Flax network with JAX's own convolution, which Qwix replaces."""
    fn: Any = trial.whole[0]
    module = fn.module(trial.whole[1])
    module.eval()
    for _, layer in nnx.iter_modules(module):
        if isinstance(layer, nnx.Conv):
            layer.conv_general_dilated = jax.lax.conv_general_dilated
    return module


def torch_model(trial: Trial) -> Any:
    """The network in PyTorch with the same weights."""
    fn, params = trial.whole
    if trial.name == "MobileNet":
        model = _torch_mobilenet(trial)
    else:
        made = {"ConvNet": torch_networks.convnet, "ResNet-20": torch_networks.resnet}
        model = made[trial.name](params)
    agree(model, fn, params, np.asarray(trial.batches[0]))
    return model


@cache
def torchvision() -> tuple[Any, Any]:
    """Its networks, and what must live as long as these are used."""
    parser = common.parser("quantization", None, "quantization")
    return peer_networks._models(import_module("torch"), parser)


def _torch_mobilenet(trial: Trial) -> Any:
    torch, models = import_module("torch"), torchvision()[0]
    model = models.mobilenet_v2(weights=None, num_classes=10, width_mult=WIDTH, dropout=0.0)
    stem = model.features[0][0]
    model.features[0][0] = torch.nn.Conv2d(1, stem.out_channels, 3, 1, 1, bias=False)
    kinds = (torch.nn.BatchNorm2d, torch.nn.Conv2d, torch.nn.Linear)
    peers = [layer for layer in model.modules() if isinstance(layer, kinds)]
    values: dict[str, dict[str, Any]] = {}
    for path, leaf in leaf_paths(trial.whole[1]).items():
        layer, _, kind = path.partition("/")[2].rpartition("/")
        values.setdefault(layer, {})[kind] = np.asarray(leaf)
    order = [path.partition("/")[2] for path, _ in peer_networks._layers(trial.build())]
    for path, peer in zip(order, peers, strict=True):
        given = {name: torch.tensor(x) for name, x in torch_layout(values[path]).items()}
        peer.load_state_dict(given, strict=False)
    return model.eval()


def onnxruntime(method: str) -> Callable[[Trial], Run]:
    """Static int8 by its own tools (QDQ, per channel), calibrated by this method of theirs."""

    def made(trial: Trial) -> Run:
        with TemporaryDirectory() as folder:
            source = exported(trial, Path(folder))
            feeds = [{"images": nchw(np.asarray(batch))} for batch in trial.batches]
            return session(quantize_static(source, source.with_suffix(".int8.onnx"), feeds, method))

    return made


def exported(trial: Trial, folder: Path) -> Path:
    """The float network as a file."""
    torch, path = import_module("torch"), folder / "float.onnx"
    images = torch.tensor(nchw(np.asarray(trial.batches[0])))
    names: dict[str, Any] = {"input_names": ["images"], "output_names": ["logits"]}
    names["dynamic_axes"] = {"images": {0: "batch"}, "logits": {0: "batch"}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the newer exporter needs another package
        torch.onnx.export(
            torch_model(trial), (images,), str(path), dynamo=False, opset_version=_OPSET, **names
        )
    return path


def session(path: Path) -> Run:
    ort = import_module("onnxruntime")
    options = ort.SessionOptions()
    options.log_severity_level = 3
    made = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda images: made.run(None, {"images": nchw(np.asarray(images))})[0]


QWIX: dict[str, Callable[[Trial], Candidate]] = {
    "Qwix static": qwix(static=True),
    "Qwix dynamic": qwix(static=False),
}
ONNXRUNTIME: dict[str, Callable[[Trial], Run]] = {"onnxruntime": onnxruntime("MinMax")}
ONNXRUNTIME_LATER: dict[str, Callable[[Trial], Run]] = {
    "onnxruntime, percentile": onnxruntime("Percentile"),
    "onnxruntime, entropy": onnxruntime("Entropy"),
}
