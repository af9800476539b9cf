"""Networks without batch norm."""

from collections.abc import Sequence

import jax
from flax import nnx
from jaxtyping import Array, Float

from jaxaccel import _tuned
from jaxaccel.nn._layers import HE, DepthwiseSeparable, Images, Logits, check_dropout, conv


class MLP(nnx.Module):
    """Flattened input, hidden layers of one width with relu and dropout, then a classifier.

    Args:
        in_features: Numbers per example, after flattening.
        width: Units of each hidden layer.
        depth: How many hidden layers; 0 makes a linear classifier.
        num_classes: Classes.
        dropout: Share of hidden units dropped in training, in [0, 1).
        rngs: The random streams; "params" and "dropout" are used.

    Raises:
        ValueError: If ``dropout`` or ``depth`` is out of range.

    Example:
        >>> model = MLP(784, width=32, depth=2, num_classes=10, rngs=nnx.Rngs(0))
        >>> model(jax.numpy.ones((2, 28, 28, 1))).shape
        (2, 10)
    """

    def __init__(
        self,
        in_features: int,
        width: int,
        depth: int,
        num_classes: int,
        *,
        dropout: float = 0.0,
        rngs: nnx.Rngs,
    ) -> None:
        if depth < 0:
            raise ValueError(f"depth: {depth} is negative; give the number of hidden layers")
        check_dropout(dropout)
        self.hidden = _add_dense(self, in_features, (width,) * depth, rngs)
        self.dropout = nnx.Dropout(dropout, rngs=rngs)
        self.classifier = nnx.Linear(width if depth else in_features, num_classes, rngs=rngs)

    def __call__(self, x: Float[Array, "batch ..."]) -> Logits:
        """The logits of ``x``."""
        x = x.reshape(x.shape[0], -1)
        for name in self.hidden:
            x = self.dropout(jax.nn.relu(getattr(self, name)(x)))
        return self.classifier(x)


class ConvNet(nnx.Module):
    """Convolutions with 2x2 pooling and relu, then dense layers: by default MNIST's classic.

    The default is 5x5 convolutions to 10 and 20 channels, 50 hidden units, 21,840 parameters.
    Dropout takes whole channels after the last convolution, before its pooling, and units after
    each hidden layer.

    Args:
        num_classes: Classes.
        input_shape: (height, width, channels) of the images.
        widths: Output channels of each VALID convolution, one or more.
        dense: Units of each hidden layer; may be empty.
        kernel_size: Side of the square kernels in pixels.
        dropout: Share of channels and of hidden units dropped in training, in [0, 1).
        separable: Make every convolution but the first a `DepthwiseSeparable`; the first stays
            plain, since a depthwise convolution of one or three channels sees too little.
        rngs: The random streams; "params" and "dropout" are used.

    Raises:
        ValueError: If ``widths`` is empty, ``dropout`` out of range, or the images too small.

    Example:
        >>> model = ConvNet(rngs=nnx.Rngs(0))
        >>> model(jax.numpy.ones((2, 28, 28, 1))).shape
        (2, 10)
    """

    def __init__(
        self,
        num_classes: int = 10,
        *,
        input_shape: tuple[int, int, int] = (28, 28, 1),
        widths: Sequence[int] = (10, 20),
        dense: Sequence[int] = (50,),
        kernel_size: int = 5,
        dropout: float = 0.5,
        separable: bool = False,
        rngs: nnx.Rngs,
    ) -> None:
        check_dropout(dropout)
        height, width = _convnet_size(input_shape, len(widths), kernel_size)
        self.convs = tuple(f"conv{i}" for i in range(1, len(widths) + 1))
        channels = (input_shape[2], *widths)
        for i, name in enumerate(self.convs):
            layer = DepthwiseSeparable if separable and i else conv
            sizes = (channels[i], channels[i + 1], kernel_size)
            setattr(self, name, layer(*sizes, padding="VALID", rngs=rngs))
        flat = height * width * widths[-1]
        self.channel_dropout = nnx.Dropout(dropout, broadcast_dims=(1, 2), rngs=rngs)
        self.hidden = _add_dense(self, flat, dense, rngs)
        self.dropout = nnx.Dropout(dropout, rngs=rngs)
        self.classifier = nnx.Linear((flat, *dense)[-1], num_classes, rngs=rngs)

    def __call__(self, x: Images) -> Logits:
        """The logits of ``x``."""
        for name in self.convs:
            x = getattr(self, name)(x)
            if name == self.convs[-1]:
                x = self.channel_dropout(x)
            x = jax.nn.relu(_tuned.max_pool(x, 2))
        x = x.reshape(x.shape[0], -1)
        for name in self.hidden:
            x = self.dropout(jax.nn.relu(getattr(self, name)(x)))
        return self.classifier(x)


def _add_dense(
    model: nnx.Module, features: int, widths: Sequence[int], rngs: nnx.Rngs
) -> tuple[str, ...]:
    """Set ``dense1``, ``dense2``, ... on the model and return these names."""
    names = tuple(f"dense{i}" for i in range(1, len(widths) + 1))
    for name, inputs, outputs in zip(names, (features, *widths), widths, strict=False):
        setattr(model, name, nnx.Linear(inputs, outputs, kernel_init=HE, rngs=rngs))
    return names


def _convnet_size(
    input_shape: tuple[int, int, int], depth: int, kernel_size: int
) -> tuple[int, int]:
    """Height and width after ``depth`` VALID convolutions, each with 2x2 pooling."""
    if depth == 0:
        raise ValueError("widths: empty; give the channels of at least one convolution")
    height, width = input_shape[:2]
    for i in range(1, depth + 1):
        seen = f"{height}x{width}"
        height, width = ((size - kernel_size + 1) // 2 for size in (height, width))
        if min(height, width) < 1:
            raise ValueError(
                f"conv{i}: nothing is left of {seen} pixels after a {kernel_size}x{kernel_size} "
                f"convolution and 2x2 pooling; give larger images than input_shape={input_shape}, "
                "fewer widths or a smaller kernel_size"
            )
    return height, width
