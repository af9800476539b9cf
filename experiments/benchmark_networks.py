"""The cases of `experiments.benchmark`: networks, batches, targets, and the same in PyTorch."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, PyTree

import jaxaccel as jx
from experiments import peer_networks, torch_networks
from experiments.peer_networks import CLASSES
from jaxaccel._graph import leaf_paths

# Those of scales and statistics, as after some training: at its initial values a batch norm does
# nothing, and a network that leaves it out would pass for the same one.
_VALUES = {"scale": (0.8, 1.2), "var": (0.8, 1.2), "bias": (-0.2, 0.2), "mean": (-0.2, 0.2)}

NETWORKS: dict[str, Callable[[nnx.Rngs], nnx.Module]] = {
    "convnet": lambda rngs: jx.nn.ConvNet(dropout=0.0, rngs=rngs),
    "mobilenet": lambda rngs: jx.nn.MobileNet(CLASSES, dropout=0.0, rngs=rngs),
    "resnet18": lambda rngs: jx.nn.ResNet(18, CLASSES, rngs=rngs),
}


@dataclass(frozen=True)
class Case:
    """A network at work on one batch.

    Attributes:
        train: a training step, else inference.
        side: of the images, in pixels.
        plain: how many times as fast as plain Flax jaxaccel is meant to be, where that is said.
        peer: the same against the best peer.
    """

    network: str
    train: bool
    side: int
    batch: int
    plain: float | None = None
    peer: float | None = None

    @property
    def name(self) -> str:
        """As in ``--cases``."""
        side = "" if self.network == "convnet" else f"-{self.side}px"
        return f"{'train' if self.train else 'infer'}-{self.network}{side}-batch{self.batch}"

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of the images."""
        return (self.batch, self.side, self.side, 1 if self.network == "convnet" else 3)


CASES = {
    case.name: case
    for case in (
        Case("convnet", True, 28, 128, plain=2.5, peer=1.2),
        Case("mobilenet", True, 96, 32, plain=8, peer=1),
        Case("mobilenet", True, 224, 16),
        Case("resnet18", True, 224, 16, plain=1.15),
        Case("resnet18", True, 224, 1, plain=1.15),
        Case("convnet", False, 28, 128),
        Case("mobilenet", False, 96, 32),
        Case("mobilenet", False, 224, 1, plain=6),
        Case("mobilenet", False, 224, 16, plain=6),
        Case("resnet18", False, 224, 1),
        Case("resnet18", False, 224, 16),
    )
}


class Problem(NamedTuple):
    """A case with its values, the same for all candidates."""

    case: Case
    module: nnx.Module
    fn: Any  # what jx.functional returns
    plain: Any  # the same with Flax's own batch norm
    params: PyTree
    images: Float[np.ndarray, "batch height width channel"]
    labels: Int[np.ndarray, " batch"]
    calibration: Sequence[np.ndarray] = ()  # images; where there are none, some are drawn


def problem(case: Case, seed: int) -> Problem:
    """The case with weights, images and labels drawn from this seed."""
    random = np.random.default_rng(seed)
    module = NETWORKS[case.network](nnx.Rngs(seed))
    fn, params = jx.functional(module)
    plain, _ = jx.functional(flax_norms(NETWORKS[case.network](nnx.Rngs(seed))))

    def value(path: tuple, leaf: Array) -> Array:
        limits = _VALUES.get(path[-1].key)
        return jnp.asarray(random.uniform(*limits, leaf.shape), leaf.dtype) if limits else leaf

    params = jax.tree_util.tree_map_with_path(value, params)
    classes = params["params"]["classifier"]["bias"].size
    images = random.standard_normal(case.shape, np.float32)
    labels = random.integers(classes, size=case.batch)
    return Problem(case, module, fn, plain, params, images, labels)


def flax_norms(module: nnx.Module) -> nnx.Module:
    """The module with a new batch norm of `flax.nnx` in place of every one of `jx.nn`."""
    for _, parent in nnx.iter_modules(module):
        for name, layer in list(vars(parent).items()):
            if isinstance(layer, jx.nn.BatchNorm):
                made = nnx.BatchNorm(layer.num_features, rngs=nnx.Rngs(0))
                made.momentum, made.epsilon = layer.momentum, layer.epsilon
                setattr(parent, name, made)
    return module


def torch_model(problem: Problem, torch: Any, models: Any) -> Any:
    """The network in PyTorch with the same weights, or fewer; `models` are torchvision's."""
    if problem.case.network == "convnet":
        return torch_networks.convnet(problem.params)
    made = {
        "mobilenet": lambda: models.mobilenet_v2(weights=None, num_classes=CLASSES, dropout=0.0),
        "resnet18": lambda: models.resnet18(weights=None, num_classes=CLASSES),
    }
    model = made[problem.case.network]()
    if problem.case.network == "mobilenet":
        strides: Any = problem.module.conv1.strides  # pyright: ignore[reportAttributeAccessIssue]
        model.features[0][0].stride = np.broadcast_to(strides, 2).tolist()
    kinds = (torch.nn.BatchNorm2d, torch.nn.Conv2d, torch.nn.Linear)
    peers = [layer for layer in model.modules() if isinstance(layer, kinds)]
    for values, peer in zip(layer_values(problem), peers, strict=True):
        for name, given in values.items():
            getattr(peer, name).data = torch.tensor(given)
        if getattr(peer, "groups", 1) > 1:  # of a depthwise one, which may have lost channels
            peer.groups = peer.in_channels = peer.out_channels = len(peer.weight)
    return model.eval()


def layer_values(problem: Problem) -> list[dict[str, np.ndarray]]:
    """The values of every layer under PyTorch's names and in its layout, in the layers' order."""
    paths: dict[str, dict[str, Any]] = {}
    for path, leaf in leaf_paths(problem.params).items():
        layer, _, kind = path.partition("/")[2].rpartition("/")
        paths.setdefault(layer, {})[kind] = np.asarray(leaf)
    order = [path.partition("/")[2] for path, _ in peer_networks._layers(problem.module)]
    return [torch_layout(paths[layer]) for layer in order]


def torch_layout(values: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """One layer's values under PyTorch's names, the output channels of a kernel first."""
    return {
        torch_networks._NAMES.get(kind, kind): (
            torch_networks._output_first(value, value.shape[-2]) if kind == "kernel" else value
        )
        for kind, value in values.items()
    }
