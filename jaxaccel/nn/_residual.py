"""Residual networks."""

import jax
import jax.numpy as jnp
from flax import nnx

from jaxaccel._tuned import max_pool
from jaxaccel.nn._layers import (
    Images,
    Logits,
    activate,
    bare_conv,
    check_dropout,
    depthwise,
    norm,
)

_CIFAR_DEPTHS = (20, 32, 44, 56, 110)
_IMAGENET_BLOCKS = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
}
# Table 2 of Sandler et al. 2018: expansion, channels, blocks, stride of the first block.
_MOBILENET_STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


class ResNet(nnx.Module):
    """Residual networks (He et al. 2016, https://arxiv.org/abs/1512.03385), CIFAR and ImageNet.

    Depths 20, 32, 44, 56 and 110 are section 4.2's CIFAR networks: three stages of two-layer
    blocks with parameter-free shortcuts. Depths 18 and 34 (two-layer blocks), 50, 101 and 152
    (bottlenecks with the stride in the 3x3, "v1.5") are the ImageNet networks: a 7x7 stem, 3x3
    pooling, four stages, projection shortcuts. Padding is symmetric, as in torchvision.

    Args:
        depth: One of the depths above.
        num_classes: Classes.
        in_features: Channels of the images.
        width: Channels of the stem; by default 16 (CIFAR) or 64 (ImageNet).
        rngs: The random streams; "params" is used.

    Raises:
        ValueError: If ``depth`` is none of the above.

    Example:
        >>> model = nnx.eval_shape(lambda: ResNet(20, rngs=nnx.Rngs(0)))
        >>> len(model.blocks), model.classifier.kernel.shape
        (9, (64, 10))
    """

    def __init__(
        self,
        depth: int,
        num_classes: int = 10,
        *,
        in_features: int = 3,
        width: int | None = None,
        rngs: nnx.Rngs,
    ) -> None:
        if depth not in (*_CIFAR_DEPTHS, *_IMAGENET_BLOCKS):
            known = ", ".join(map(str, (*_CIFAR_DEPTHS, *_IMAGENET_BLOCKS)))
            raise ValueError(f"depth: no ResNet of depth {depth}; take one of {known}")
        self.imagenet = depth in _IMAGENET_BLOCKS
        width = width or (64 if self.imagenet else 16)
        kernel_size, strides = (7, 2) if self.imagenet else (3, 1)
        self.conv1 = bare_conv(in_features, width, kernel_size, rngs, strides=strides)
        self.norm1 = norm(width, rngs)
        blocks = _residual_blocks(depth, width, rngs)
        self.blocks = nnx.List(blocks)
        self.classifier = nnx.Linear(blocks[-1].features, num_classes, rngs=rngs)

    def __call__(self, x: Images) -> Logits:
        """The logits of ``x``."""
        x = jax.nn.relu(self.norm1(self.conv1(x)))
        if self.imagenet:
            x = max_pool(x, 3, strides=2, pad=1)
        for block in self.blocks:
            x = block(x)
        return self.classifier(x.mean((1, 2)))


class MobileNet(nnx.Module):
    """MobileNetV2 (Sandler et al. 2018, https://arxiv.org/abs/1801.04381).

    Args:
        num_classes: Classes.
        in_features: Channels of the images.
        width: Multiplier of the channels, rounded to multiples of 8; below 1 it leaves the last
            1,280 channels as they are, as the reference implementation does.
        dropout: Share of features dropped before the classifier in training, in [0, 1).
        stem_strides: Stride of the first convolution; 1 suits small images such as CIFAR's.
        rngs: The random streams; "params" and "dropout" are used.

    Raises:
        ValueError: If ``dropout`` or ``width`` is out of range.

    Example:
        >>> model = nnx.eval_shape(lambda: MobileNet(10, width=0.25, rngs=nnx.Rngs(0)))
        >>> len(model.blocks), model.classifier.kernel.shape
        (17, (1280, 10))
    """

    def __init__(
        self,
        num_classes: int = 1000,
        *,
        in_features: int = 3,
        width: float = 1.0,
        dropout: float = 0.2,
        stem_strides: int = 2,
        rngs: nnx.Rngs,
    ) -> None:
        check_dropout(dropout)
        if width <= 0:
            raise ValueError(f"width: {width} is not positive; 1.0 is the network of the paper")
        features, last = _divisible(32 * width), _divisible(1280 * max(1.0, width))
        self.conv1 = bare_conv(in_features, features, 3, rngs, strides=stem_strides)
        self.norm1 = norm(features, rngs)
        blocks = []
        for expansion, channels, count, strides in _MOBILENET_STAGES:
            for step in (strides, *(1,) * (count - 1)):
                out = _divisible(channels * width)
                blocks.append(_InvertedResidual(features, out, expansion, step, rngs))
                features = out
        self.blocks = nnx.List(blocks)
        self.conv2 = bare_conv(features, last, 1, rngs)
        self.norm2 = norm(last, rngs)
        self.dropout = nnx.Dropout(dropout, rngs=rngs)
        self.classifier = nnx.Linear(last, num_classes, rngs=rngs)

    def __call__(self, x: Images) -> Logits:
        """The logits of ``x``."""
        x = jax.nn.relu6(self.norm1(self.conv1(x)))
        for block in self.blocks:
            x = block(x)
        x = jax.nn.relu6(self.norm2(self.conv2(x)))
        return self.classifier(self.dropout(x.mean((1, 2))))


class _Residual(nnx.Module):
    """Convolutions beside a shortcut; a bottleneck is 1x1, 3x3, 1x1 at a quarter of the width.

    Where the shape changes, the shortcut is a projection (option B of the paper) or every
    ``strides``-th pixel with zero channels appended (option A).
    """

    def __init__(
        self,
        in_features: int,
        features: int,
        strides: int,
        *,
        bottleneck: bool,
        project: bool,
        rngs: nnx.Rngs,
    ) -> None:
        inner = features // 4 if bottleneck else features
        self.features, self.strides, self.missing = features, strides, features - in_features
        first = (1, 1) if bottleneck else (3, strides)
        self.conv1 = bare_conv(in_features, inner, first[0], rngs, strides=first[1])
        self.norm1 = norm(inner, rngs)
        self.conv2 = bare_conv(inner, inner, 3, rngs, strides=strides if bottleneck else 1)
        self.norm2 = norm(inner, rngs)
        self.conv3 = bare_conv(inner, features, 1, rngs) if bottleneck else None
        self.norm3 = norm(features, rngs) if bottleneck else None
        project = project and (strides > 1 or self.missing != 0)
        self.shortcut = (
            bare_conv(in_features, features, 1, rngs, strides=strides) if project else None
        )
        self.shortcut_norm = norm(features, rngs) if project else None

    def __call__(self, x: Images) -> Images:
        y = self.norm2(self.conv2(activate(self.conv1(x), self.norm1)))
        if self.conv3 is not None and self.norm3 is not None:
            y = self.norm3(self.conv3(jax.nn.relu(y)))
        return jax.nn.relu(y + self._skip(x))

    def _skip(self, x: Images) -> Images:
        if self.shortcut is not None and self.shortcut_norm is not None:
            return self.shortcut_norm(self.shortcut(x))
        if self.strides == 1 and self.missing == 0:
            return x
        x = x[:, :: self.strides, :: self.strides]
        return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, self.missing)))


class _InvertedResidual(nnx.Module):
    """1x1 expansion, depthwise 3x3, linear 1x1, beside the identity where shapes agree."""

    def __init__(
        self, in_features: int, features: int, expansion: int, strides: int, rngs: nnx.Rngs
    ) -> None:
        inner = in_features * expansion
        self.residual = strides == 1 and in_features == features
        self.expand = bare_conv(in_features, inner, 1, rngs) if expansion > 1 else None
        self.expand_norm = norm(inner, rngs) if expansion > 1 else None
        self.depthwise = depthwise(inner, 3, rngs, strides=strides, padding=1, use_bias=False)
        self.depthwise_norm = norm(inner, rngs)
        self.project = bare_conv(inner, features, 1, rngs)
        self.project_norm = norm(features, rngs)

    def __call__(self, x: Images) -> Images:
        y = x
        if self.expand is not None and self.expand_norm is not None:
            y = jax.nn.relu6(self.expand_norm(self.expand(y)))
        y = jax.nn.relu6(self.depthwise_norm(self.depthwise(y)))
        y = self.project_norm(self.project(y))
        return x + y if self.residual else y


def _residual_blocks(depth: int, width: int, rngs: nnx.Rngs) -> list[_Residual]:
    """The blocks of every stage, each stage twice as wide as the one before."""
    imagenet = depth in _IMAGENET_BLOCKS
    bottleneck = imagenet and depth >= 50
    counts = _IMAGENET_BLOCKS[depth] if imagenet else ((depth - 2) // 6,) * 3
    blocks, in_features = [], width
    for stage, count in enumerate(counts):
        features = width * 2**stage * (4 if bottleneck else 1)
        for i in range(count):
            strides = 2 if stage > 0 and i == 0 else 1
            kind = {"bottleneck": bottleneck, "project": imagenet, "rngs": rngs}
            blocks.append(_Residual(in_features, features, strides, **kind))
            in_features = features
    return blocks


def _divisible(channels: float) -> int:
    """The nearest multiple of 8, at least 8, and not more than a tenth below ``channels``."""
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * channels else rounded
