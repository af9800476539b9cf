"""The networks of `experiments.pruning` in PyTorch, and the channels that Torch-Pruning removes.

Layers have the names of those of `jaxaccel.nn`, so that weights and choices carry over by path.
"""

from collections import OrderedDict
from collections.abc import Mapping
from copy import deepcopy
from functools import cache
from importlib import import_module
from typing import Any

import numpy as np
from jaxtyping import Float, PyTree

from jaxaccel._graph import leaf_paths

_NAMES = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}


def convnet(params: PyTree) -> Any:
    """`jaxaccel.nn.ConvNet` of two 5x5 convolutions and one hidden layer, for inference."""
    nn, sizes = import_module("torch").nn, _sizes(params)
    layers = {
        "conv1": nn.Conv2d(*sizes["conv1"], 5),
        "pool1": nn.MaxPool2d(2),
        "relu1": nn.ReLU(),
        "conv2": nn.Conv2d(*sizes["conv2"], 5),
        "pool2": nn.MaxPool2d(2),
        "relu2": nn.ReLU(),
        "flat": nn.Flatten(),
        "dense1": nn.Linear(*sizes["dense1"]),
        "relu3": nn.ReLU(),
        "classifier": nn.Linear(*sizes["classifier"]),
    }
    return _filled(nn.Sequential(OrderedDict(layers)), params, {"dense1": sizes["conv2"][1]})


def resnet(params: PyTree) -> Any:
    """`jaxaccel.nn.ResNet` of the CIFAR kind, shortcuts of option A, for inference."""
    (block, mean), nn, sizes = _classes(), import_module("torch").nn, _sizes(params)
    count = sum(name.startswith("blocks.") and name.endswith("conv1") for name in sizes)
    inputs, width = sizes["conv1"]
    layers = {
        "conv1": nn.Conv2d(inputs, width, 3, padding=1, bias=False),
        "norm1": nn.BatchNorm2d(width),
        "relu": nn.ReLU(),
        "blocks": nn.Sequential(*(block(*sizes[f"blocks.{i}.conv1"]) for i in range(count))),
        "mean": mean(),
        "classifier": nn.Linear(*sizes["classifier"]),
    }
    return _filled(nn.Sequential(OrderedDict(layers)), params, {})


@cache
def _classes() -> tuple[Any, Any]:
    """Two convolutions beside a shortcut without parameters; the mean over places."""
    torch = import_module("torch")
    nn = torch.nn

    class Block(nn.Module):
        def __init__(self, inputs: int, features: int) -> None:
            super().__init__()
            self.missing = features - inputs
            self.strides = 2 if self.missing else 1
            options = {"padding": 1, "bias": False}
            self.conv1 = nn.Conv2d(inputs, features, 3, self.strides, **options)
            self.norm1 = nn.BatchNorm2d(features)
            self.conv2 = nn.Conv2d(features, features, 3, **options)
            self.norm2 = nn.BatchNorm2d(features)

        def forward(self, x: Any) -> Any:
            y = self.norm2(self.conv2(torch.relu(self.norm1(self.conv1(x)))))
            if self.missing:
                x = x[:, :, :: self.strides, :: self.strides]
                x = nn.functional.pad(x, (0, 0, 0, 0, 0, self.missing))
            return torch.relu(y + x)

    # With nn.Flatten here Torch-Pruning cuts the classifier's inputs to the wrong number.
    class Mean(nn.Module):
        def forward(self, x: Any) -> Any:
            return x.mean((2, 3))

    return Block, Mean


def _sizes(params: PyTree) -> dict[str, tuple[int, int]]:
    """Inputs and outputs of each convolution and dense layer, by its name in PyTorch."""
    return {
        ".".join(path.split("/")[1:-1]): leaf.shape[-2:]
        for path, leaf in leaf_paths(params).items()
        if path.endswith("kernel")
    }


def _filled(model: Any, params: PyTree, channels: Mapping[str, int]) -> Any:
    """The network with JAX's values.

    `channels` are those of the image that a dense layer reads flattened, by the layer's name.
    """
    torch, state = import_module("torch"), model.state_dict()
    for path, leaf in leaf_paths(params).items():
        _, *layer, kind = path.split("/")
        name, value = ".".join(layer), np.asarray(leaf)
        if kind == "kernel":
            value = _output_first(value, channels.get(name, value.shape[-2]))
        state[f"{name}.{_NAMES.get(kind, kind)}"] = torch.tensor(value)
    model.load_state_dict(state)
    return model.eval()


def _output_first(kernel: np.ndarray, channels: int) -> np.ndarray:
    """[output, channel, height, width], a dense kernel's last three as one."""
    if kernel.ndim == 4:
        return kernel.transpose(3, 2, 0, 1)
    inputs, outputs = kernel.shape
    return kernel.reshape(-1, channels, outputs).transpose(2, 1, 0).reshape(outputs, inputs)


def outputs(
    model: Any, images: Float[np.ndarray, "batch height width channel"]
) -> Float[np.ndarray, "batch classes"]:
    """The logits of a network for images as JAX has them."""
    torch = import_module("torch")
    with torch.no_grad():
        return model(torch.tensor(images.transpose(0, 3, 1, 2))).numpy()


def pruned(
    model: Any, ratio: float, images: Float[np.ndarray, "batch height width channel"]
) -> tuple[Any, dict[str, np.ndarray]]:
    """A smaller copy by Torch-Pruning, set up as in its README but for rounding to 8 channels.

    Args:
        model: one of the networks above.
        ratio: the share of channels to remove of every group that it finds.
        images: an example of the input.

    Returns:
        The copy, and the original output channels that stay, by the path of a kernel in JAX.
    """
    small = _pruner(model, ratio, images)
    small.step()
    tagged = deepcopy(model)
    for layer in _layers(tagged).values():
        shape = (-1, *(1,) * (layer.weight.ndim - 1))
        numbers = import_module("torch").arange(len(layer.weight)).reshape(shape)
        layer.weight.data = numbers.expand_as(layer.weight).float().clone()
    again = _pruner(tagged, ratio, images)
    again.load_pruning_history(small.pruning_history())
    kept = {
        f"params/{name.replace('.', '/')}/kernel": layer.weight.data.flatten(1)[:, 0].int().numpy()
        for name, layer in _layers(again.model).items()
    }
    return small.model, kept


def _pruner(model: Any, ratio: float, images: np.ndarray) -> Any:
    tp, model = import_module("torch_pruning"), deepcopy(model)
    return tp.pruner.BasePruner(
        model,
        import_module("torch").tensor(images.transpose(0, 3, 1, 2)),
        importance=tp.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=ratio,
        ignored_layers=[model.classifier],
    )


def _layers(model: Any) -> dict[str, Any]:
    nn = import_module("torch").nn
    kinds = (nn.Conv2d, nn.Linear)
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, kinds)}
