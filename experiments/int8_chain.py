"""The whole chain of `experiments.int8_speed`: trained, pruned to half the MACs, in int8.

The images are cluttered digits. ConvNet sees them at 28x28, as in `experiments.pruning`, and is
timed so. MobileNetV2 and ResNet-18 are those for ImageNet but for ten classes, in three equal
channels: ResNet-18 at 56x56, timed on the same images at 224x224; MobileNetV2 without the stride of
its first layer at 28x28, timed at 112x112, which is the work of 224x224 with it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import jaxaccel as jx
from experiments import common, mnist
from experiments.benchmark_networks import Case, Problem, flax_norms
from experiments.mnist import Network
from experiments.pruning import pooled

HALF = 0.5  # of the multiply-accumulates
BATCHES, BATCH = 8, 64  # of calibration


class Setup(NamedTuple):
    """How a network is trained and timed.

    Attributes:
        epochs: of training; half as many of fine-tuning.
        peak: the highest learning rate.
        side: of the images that are timed, in pixels, and `batch`, how many.
        round_to: channels are left in multiples of this, as vector units take them.
        target: how many times as fast as plain `jax.jit` the end of the chain is meant to be.
    """

    build: Callable[[nnx.Rngs], nnx.Module]
    epochs: int
    peak: float
    side: int
    batch: int
    round_to: int
    target: float


CHAINS = {
    "convnet": Setup(lambda rngs: jx.nn.ConvNet(dropout=0.0, rngs=rngs), 16, 1e-2, 28, 128, 8, 5),
    "mobilenet": Setup(
        lambda rngs: jx.nn.MobileNet(10, stem_strides=1, dropout=0.0, rngs=rngs),
        *(10, 2e-2, 112, 16, 8, 12),
    ),
    "resnet18": Setup(lambda rngs: jx.nn.ResNet(18, 10, rngs=rngs), 4, 2e-3, 224, 16, 16, 2.5),
}


@dataclass(frozen=True)
class Chain:
    """A network on its way; what is trained is kept in a folder."""

    name: str
    seed: int
    train: int
    folder: Path

    @property
    def setup(self) -> Setup:
        """Of this network."""
        return CHAINS[self.name]

    @cached_property
    def splits(self) -> jx.data.Splits:
        """Cluttered digits as this network takes them."""
        found = jx.data.digits("cluttered")
        first = jx.data.arrays(found.train.image[: self.train], found.train.label[: self.train])
        found = found._replace(train=first)
        steps = {"convnet": [pooled], "mobilenet": [pooled, coloured], "resnet18": [coloured]}
        for convert in steps[self.name]:
            found = jx.data.Splits(*map(convert, found))
        return found

    def job(self, epochs: int) -> mnist.Job:
        """The loaders, from the start of their order."""
        return mnist.Job(self.splits, epochs, self.seed, progress=False)

    def build(self) -> nnx.Module:
        """Not yet trained."""
        return self.setup.build(nnx.Rngs(self.seed))

    @cached_property
    def whole(self) -> Network:
        """In float32, as trained."""
        return self._kept("whole", self.build, self.setup.epochs)

    @cached_property
    def pruned(self) -> Network:
        """Half of the multiply-accumulates, fine-tuned with the whole network as its teacher."""
        epochs, name = max(1, self.setup.epochs // 2), f"pruned-{self.setup.round_to}"
        return self._kept(name, self.smaller, epochs, **mnist.follow(self.whole))

    def smaller(self) -> Any:
        """The module without the channels that go, not yet fine-tuned."""
        fn: Any = self.whole.fn
        image = jnp.zeros((1, *self.splits.test.image.shape[1:]))
        plan = jx.prune.plan(
            fn,
            self.whole.params,
            image,
            budget={"flops": HALF},
            scope="local",
            round_to=self.setup.round_to,
        )
        return plan.module(fn.module(self.whole.params))

    @cached_property
    def batches(self) -> list[Any]:
        """Images for calibration, from the training set."""
        images = self.splits.train.image[: BATCHES * BATCH]
        return [common.scaled(part) for part in np.split(images, BATCHES)]

    def int8(self, network: Network, **options: Any) -> Network:
        """The network on integers."""
        fn, params = jx.quantize.int8(network.fn, network.params, self.batches, **options)
        return Network(f"{network.name}, int8", fn, params, "", [])

    def accuracy(self, network: Network) -> float:
        """On the test set, in percent."""
        return 100 * self.job(1).test_metrics(network)[0]

    def problem(self, network: Network, images: np.ndarray) -> Problem:
        """The network with images, as `experiments.benchmark` times it."""
        case = Case(self.name, False, images.shape[1], len(images))
        plain, _ = jx.functional(flax_norms(self.build()))
        labels = np.zeros(len(images), np.int32)
        return Problem(case, self.build(), network.fn, plain, network.params, images, labels)

    def timed_images(self) -> np.ndarray:
        """Of the test set, each pixel repeated."""
        images = np.asarray(common.scaled(self.splits.test.image[: self.setup.batch]))
        times = self.setup.side // images.shape[1]
        return images.repeat(times, 1).repeat(times, 2)

    def _kept(self, name: str, model: Callable[[], Any], epochs: int, **options: Any) -> Network:
        path = self.folder / f"chain-{self.name}-{self.train}-{self.seed}-{name}-{epochs}.npz"
        fn, like = jx.functional(model())
        leaves, structure = jax.tree.flatten(like)
        if not path.exists():
            fit = partial(self.job(epochs).fit, name, self.name, peak=self.setup.peak)
            found = fit(model(), **options)
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.with_suffix(".partial").open("wb") as file:
                np.savez(file, *jax.tree.leaves(found.params))
            path.with_suffix(".partial").replace(path)
        with np.load(path) as file:
            values = [jnp.asarray(file[f"arr_{i}"]) for i in range(len(leaves))]
        return Network(name, fn, jax.tree.unflatten(structure, values), "", [])


def coloured(part: jx.data.Arrays) -> jx.data.Arrays:
    """Three equal channels."""
    return jx.data.arrays(part.image.repeat(3, -1), part.label)
