"""Networks of torchvision and the same in JAX, with torchvision's weights in both.

ResNet and MobileNet are those of `jx.nn`; DenseNet and ShuffleNet are written here, plainly, with
concatenate, split, reshape and swapaxes. The layers of all stand in the order of torchvision's, so
that weights carry over layer by layer; that the networks are the same is seen by their outputs.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

import jaxaccel as jx
from experiments import common

Images: TypeAlias = Float[Array, "batch height width channel"]
Logits: TypeAlias = Float[Array, "batch num_classes"]
Layer: TypeAlias = nnx.Conv | nnx.Linear | nnx.BatchNorm

CLASSES = 1000
NETWORKS: dict[str, Callable[[nnx.Rngs], nnx.Module]] = {
    "resnet18": lambda rngs: jx.nn.ResNet(18, CLASSES, rngs=rngs),
    "resnet50": lambda rngs: jx.nn.ResNet(50, CLASSES, rngs=rngs),
    "mobilenet_v2": lambda rngs: jx.nn.MobileNet(CLASSES, rngs=rngs),
    "densenet121": lambda rngs: DenseNet(CLASSES, rngs=rngs),
    "shufflenet_v2_x1_0": lambda rngs: ShuffleNet(CLASSES, rngs=rngs),
}
_TOLERANCE = 1e-3  # of the outputs, relative to the largest
_GROWTH = 32
_DENSE_STAGES = (6, 12, 24, 16)
_SHUFFLE_STAGES = ((4, 116), (8, 232), (4, 464))  # blocks, channels


class Packages(NamedTuple):
    """What the peer needs; `operators` must live as long as torchvision is used."""

    torch: Any
    models: Any
    pruning: Any
    operators: Any


@dataclass(frozen=True)
class Pair:
    """A network in both frameworks with the same weights, and an image for each.

    Attributes:
        kernels: paths of those of convolutions and dense layers, in the order of the layers.
        positions: of the output of each of these layers.
        difference: of the two networks' outputs, relative to the largest.
    """

    packages: Packages
    model: Any
    peer_image: Any
    fn: Callable
    params: Any
    image: Images
    kernels: list[str]
    positions: list[int]
    difference: float


def packages(parser: common.Parser) -> Packages:
    """PyTorch, torchvision's networks and Torch-Pruning, or an exit with one line."""
    torch, pruning = common.packages(parser, "torch", "torch_pruning")
    models, operators = _models(torch, parser)
    return Packages(torch, models, pruning, operators)


def pair(name: str, packages: Packages, seed: int) -> Pair:
    """The network of this name; SystemExit where the two do not compute the same."""
    torch, model = packages.torch, _model(name, packages, seed)
    module = NETWORKS[name](nnx.Rngs(seed))
    layers = dict(_layers(module))
    kinds = (torch.nn.BatchNorm2d, *_weighted_kinds(torch))
    peers = [layer for layer in model.modules() if isinstance(layer, kinds)]
    for layer, peer in zip(layers.values(), peers, strict=True):
        _carry(layer, peer)
    fn, params = jx.functional(module)
    image = np.random.default_rng(seed).standard_normal((1, 224, 224, 3), np.float32)
    peer_image = torch.from_numpy(image.transpose(0, 3, 1, 2).copy())
    output, positions = _forward(torch, model, peer_image)
    differs = difference(jax.jit(fn)(params, image), output)
    if not differs <= _TOLERANCE:
        raise SystemExit(f"{name}: outputs differ by {differs:.0e}: not the same network")
    kernels = [f"{p}/kernel" for p, layer in layers.items() if not isinstance(layer, nnx.BatchNorm)]
    return Pair(
        *(packages, model, peer_image, fn, params, jnp.asarray(image)),
        *(kernels, positions, differs),
    )


def difference(found: Any, wanted: Any) -> float:
    """The largest of two arrays, relative to the largest value."""
    return float(np.abs(np.asarray(found) - wanted).max() / np.abs(wanted).max())


def weighted(torch: Any, model: Any) -> list[Any]:
    """The convolutions and dense layers of a PyTorch network."""
    return [layer for layer in model.modules() if isinstance(layer, _weighted_kinds(torch))]


class DenseNet(nnx.Module):
    """DenseNet-121 (Huang et al. 2017, https://arxiv.org/abs/1608.06993)."""

    def __init__(self, num_classes: int, *, rngs: nnx.Rngs) -> None:
        features, parts = 64, []
        self.stem = _conv(3, features, 7, rngs, strides=2)
        self.stem_norm = _norm(features, rngs)
        for stage, count in enumerate(_DENSE_STAGES):
            if stage:
                parts.append(_Transition(features, features // 2, rngs))
                features //= 2
            for _ in range(count):
                parts.append(_DenseLayer(features, rngs))
                features += _GROWTH
        self.parts = nnx.List(parts)
        self.norm = _norm(features, rngs)
        self.classifier = nnx.Linear(features, num_classes, rngs=rngs)

    def __call__(self, x: Images) -> Logits:
        """The logits of ``x``."""
        x = _pool_3x3(jax.nn.relu(self.stem_norm(self.stem(x))))
        for part in self.parts:
            x = part(x)
        return self.classifier(jax.nn.relu(self.norm(x)).mean((1, 2)))


class _DenseLayer(nnx.Module):
    """The input, and behind it the channels made of it by a 1x1 and a 3x3 convolution."""

    def __init__(self, features: int, rngs: nnx.Rngs) -> None:
        self.norm1 = _norm(features, rngs)
        self.conv1 = _conv(features, 4 * _GROWTH, 1, rngs)
        self.norm2 = _norm(4 * _GROWTH, rngs)
        self.conv2 = _conv(4 * _GROWTH, _GROWTH, 3, rngs)

    def __call__(self, x: Images) -> Images:
        y = self.conv1(jax.nn.relu(self.norm1(x)))
        y = self.conv2(jax.nn.relu(self.norm2(y)))
        return jnp.concatenate([x, y], -1)


class _Transition(nnx.Module):
    """A 1x1 convolution, then the means of 2x2 squares."""

    def __init__(self, in_features: int, features: int, rngs: nnx.Rngs) -> None:
        self.norm = _norm(in_features, rngs)
        self.conv = _conv(in_features, features, 1, rngs)

    def __call__(self, x: Images) -> Images:
        return nnx.avg_pool(self.conv(jax.nn.relu(self.norm(x))), (2, 2), (2, 2))


class ShuffleNet(nnx.Module):
    """ShuffleNetV2 of width 1 (Ma et al. 2018, https://arxiv.org/abs/1807.11164)."""

    def __init__(self, num_classes: int, *, rngs: nnx.Rngs) -> None:
        features, blocks = 24, []
        self.stem = _conv(3, features, 3, rngs, strides=2)
        self.stem_norm = _norm(features, rngs)
        for count, channels in _SHUFFLE_STAGES:
            blocks.append(_Downsampling(features, channels, rngs))
            blocks += [_Unit(channels, rngs) for _ in range(count - 1)]
            features = channels
        self.blocks = nnx.List(blocks)
        self.conv = _conv(features, 1024, 1, rngs)
        self.norm = _norm(1024, rngs)
        self.classifier = nnx.Linear(1024, num_classes, rngs=rngs)

    def __call__(self, x: Images) -> Logits:
        """The logits of ``x``."""
        x = _pool_3x3(jax.nn.relu(self.stem_norm(self.stem(x))))
        for block in self.blocks:
            x = block(x)
        return self.classifier(jax.nn.relu(self.norm(self.conv(x))).mean((1, 2)))


class _Unit(nnx.Module):
    """Half of the channels pass, the other half go through convolutions."""

    def __init__(self, features: int, rngs: nnx.Rngs) -> None:
        self.branch = _Branch(features // 2, features // 2, 1, rngs)

    def __call__(self, x: Images) -> Images:
        passed, changed = jnp.split(x, 2, -1)
        return _shuffled(jnp.concatenate([passed, self.branch(changed)], -1))


class _Downsampling(nnx.Module):
    """Two branches read all channels and halve the sides."""

    def __init__(self, in_features: int, features: int, rngs: nnx.Rngs) -> None:
        half = features // 2
        self.depthwise = _conv(in_features, in_features, 3, rngs, 2, groups=in_features)
        self.depthwise_norm = _norm(in_features, rngs)
        self.conv = _conv(in_features, half, 1, rngs)
        self.norm = _norm(half, rngs)
        self.branch = _Branch(in_features, half, 2, rngs)

    def __call__(self, x: Images) -> Images:
        y = self.depthwise_norm(self.depthwise(x))
        y = jax.nn.relu(self.norm(self.conv(y)))
        return _shuffled(jnp.concatenate([y, self.branch(x)], -1))


class _Branch(nnx.Module):
    """1x1, depthwise 3x3, 1x1."""

    def __init__(self, in_features: int, features: int, strides: int, rngs: nnx.Rngs) -> None:
        self.conv1 = _conv(in_features, features, 1, rngs)
        self.norm1 = _norm(features, rngs)
        self.depthwise = _conv(features, features, 3, rngs, strides, groups=features)
        self.depthwise_norm = _norm(features, rngs)
        self.conv2 = _conv(features, features, 1, rngs)
        self.norm2 = _norm(features, rngs)

    def __call__(self, x: Images) -> Images:
        x = jax.nn.relu(self.norm1(self.conv1(x)))
        x = self.depthwise_norm(self.depthwise(x))
        return jax.nn.relu(self.norm2(self.conv2(x)))


def _models(torch: Any, parser: common.Parser) -> tuple[Any, Any]:
    """torchvision's networks, and operators that its wheel lacks beside a torch without CUDA."""
    operators = None
    try:
        common.packages(parser, "torchvision")
    except RuntimeError:
        operators = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            operators.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return *common.packages(parser, "torchvision.models"), operators


def _weighted_kinds(torch: Any) -> tuple[Any, ...]:
    return torch.nn.Conv2d, torch.nn.Linear


def _layers(module: nnx.Module, path: str = "params") -> Iterator[tuple[str, Layer]]:
    """Paths and modules of all layers with parameters, in the order they were made."""
    if isinstance(module, Layer):
        yield path, module
        return
    for name, part in vars(module).items():
        if isinstance(part, nnx.Module):
            yield from _layers(part, f"{path}/{name}")


def _model(name: str, packages: Packages, seed: int) -> Any:
    """With scales and statistics as after some training, so that they too are compared."""
    packages.torch.manual_seed(seed)
    model = getattr(packages.models, name)(weights=None, num_classes=CLASSES).eval()
    for layer in model.modules():
        if isinstance(layer, packages.torch.nn.BatchNorm2d):
            for values in (layer.weight, layer.running_var):
                values.data.uniform_(0.8, 1.2)
            for values in (layer.bias, layer.running_mean):
                values.data.uniform_(-0.2, 0.2)
    return model


def _carry(layer: Layer, peer: Any) -> None:
    """Sets the parameters of a layer to those of its counterpart in PyTorch."""
    given = {name: value.numpy() for name, value in peer.state_dict().items()}
    if isinstance(layer, nnx.BatchNorm):
        names = {"scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
        values = {name: given[of_peer] for name, of_peer in names.items()}
    else:
        # [out, in, height, width] -> [height, width, in, out], and [out, in] -> [in, out]
        kernel = np.moveaxis(given.pop("weight"), (1, 0), (-2, -1))
        values = {"kernel": kernel, **given}
    for name, value in values.items():
        variable = getattr(layer, name)
        if variable.shape != value.shape:
            raise ValueError(f"{name}: {variable.shape} in JAX, {value.shape} in PyTorch")
        variable.set_value(jnp.asarray(value))


def _forward(torch: Any, model: Any, image: Any) -> tuple[np.ndarray, list[int]]:
    """The output, and the output positions of each convolution and dense layer."""
    found: dict[Any, int] = {}

    def count(layer: Any, _: Any, output: Any) -> None:
        found[layer] = output[0, 0].numel()

    hooks = [layer.register_forward_hook(count) for layer in weighted(torch, model)]
    with torch.no_grad():
        output = model(image).numpy()
    for hook in hooks:
        hook.remove()
    return output, [found[layer] for layer in weighted(torch, model)]


def _conv(
    in_features: int,
    features: int,
    kernel_size: int,
    rngs: nnx.Rngs,
    strides: int = 1,
    groups: int = 1,
) -> nnx.Conv:
    """No bias, and torchvision's symmetric padding."""
    return nnx.Conv(
        in_features,
        features,
        (kernel_size, kernel_size),
        strides=strides,
        padding=kernel_size // 2,
        feature_group_count=groups,
        use_bias=False,
        rngs=rngs,
    )


def _norm(features: int, rngs: nnx.Rngs) -> nnx.BatchNorm:
    return nnx.BatchNorm(features, epsilon=1e-5, rngs=rngs)


def _pool_3x3(x: Images) -> Images:
    pads = ((0, 0), (1, 1), (1, 1), (0, 0))
    return lax.reduce_window(x, -jnp.inf, lax.max, (1, 3, 3, 1), (1, 2, 2, 1), pads)


def _shuffled(x: Images) -> Images:
    """Channels of both halves in turn."""
    batch, height, width, channels = x.shape
    halves = x.reshape(batch, height, width, 2, channels // 2)
    return halves.swapaxes(-1, -2).reshape(x.shape)
