"""The networks of the main job: a teacher, and its student in fewer multiply-accumulates."""

from collections.abc import Sequence

from flax import nnx
from jaxtyping import Array, Float

import jaxaccel as jx

LARGE = 48  # pixels: from here on a digit is somewhere in the image, not all of it


def build(splits: jx.data.Splits, seed: int, *, separable: bool) -> nnx.Module:
    """The teacher, or its depthwise-separable student, for the images of a data set.

    Images that are all digit get the classic ConvNet, and the student half the channels in its
    first convolution; larger ones get the deeper `Finder`.
    """
    shape = splits.train.image.shape[1:]
    classes, rngs = int(splits.train.label.max()) + 1, nnx.Rngs(seed)
    if min(shape[:2]) >= LARGE:
        return Finder(classes, shape[2], separable=separable, rngs=rngs)
    widths = (8, 32) if separable else (16, 32)
    options = {"widths": widths, "dropout": 0.25, "separable": separable}
    return jx.nn.ConvNet(classes, input_shape=shape, rngs=rngs, **options)


class Finder(nnx.Module):
    """3x3 convolutions with batch norm, a mean over places, a classifier: finds what is small.

    The mean over places makes the position of the digit irrelevant.

    Args:
        num_classes: Classes.
        channels: Channels of the images.
        separable: Make every convolution but the first a `jx.nn.DepthwiseSeparable`.
        widths: Channels of each convolution; the first, third, ... have stride 2.
        rngs: The random streams; "params" is used.
    """

    def __init__(
        self,
        num_classes: int,
        channels: int,
        *,
        separable: bool = False,
        widths: Sequence[int] = (12, 16, 24, 32, 48, 64),
        rngs: nnx.Rngs,
    ) -> None:
        options = {"batch_norm": True, "rngs": rngs}
        unit = jx.nn.DepthwiseSeparable if separable else jx.nn.ConvReLU
        self.convs = tuple(f"conv{i}" for i in range(1, len(widths) + 1))
        for i, (name, features) in enumerate(zip(self.convs, widths, strict=True)):
            layer = unit if i else jx.nn.ConvReLU
            setattr(self, name, layer(channels, features, strides=1 if i % 2 else 2, **options))
            channels = features
        self.classifier = nnx.Linear(channels, num_classes, rngs=rngs)

    def __call__(self, x: Float[Array, "batch height width channel"]) -> Float[Array, "batch n"]:
        """The logits of ``x``."""
        for name in self.convs:
            x = getattr(self, name)(x)
        return self.classifier(x.mean((1, 2)))
