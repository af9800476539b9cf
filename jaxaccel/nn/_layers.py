"""The units that XLA fuses, and the constructors all networks share."""

from collections.abc import Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float

from jaxaccel import _tuned

Images: TypeAlias = Float[Array, "batch height width channel"]
Logits: TypeAlias = Float[Array, "batch num_classes"]
Padding: TypeAlias = str | int | Sequence[tuple[int, int]]

HE = nnx.initializers.he_normal()


class ConvReLU(nnx.Module):
    """Convolution, optional batch norm, relu, optional max pooling: the unit XLA fuses.

    Args:
        in_features: Channels of the input.
        out_features: Channels of the output.
        kernel_size: Side of the square kernel in pixels.
        strides: Stride along both spatial axes.
        padding: "SAME", "VALID", one int for all edges, or (low, high) per spatial axis.
        pool: Side of the squares to take the maximum of, or None.
        batch_norm: Normalise before the relu; the convolution then has no bias.
        rngs: The random streams; "params" is used.

    Example:
        >>> model = ConvReLU(1, 8, pool=2, rngs=nnx.Rngs(0))
        >>> model(jax.numpy.ones((2, 28, 28, 1))).shape
        (2, 14, 14, 8)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: int = 3,
        *,
        strides: int = 1,
        padding: Padding = "SAME",
        pool: int | None = None,
        batch_norm: bool = False,
        rngs: nnx.Rngs,
    ) -> None:
        self.pool = pool
        options = {"strides": strides, "padding": padding, "use_bias": not batch_norm}
        self.conv = conv(in_features, out_features, kernel_size, rngs, **options)
        self.norm = norm(out_features, rngs) if batch_norm else None

    def __call__(self, x: Images) -> Images:
        """The features of ``x``."""
        return pooled(activate(self.conv(x), self.norm), self.pool)


class DepthwiseSeparable(nnx.Module):
    """A convolution of each channel alone, then a 1x1 convolution across channels.

    A relu stands after both, each after its batch norm where there is one, as in MobileNetV1
    (Howard et al. 2017, https://arxiv.org/abs/1704.04861). The factorisation is that of
    Chollet 2017 (https://arxiv.org/abs/1610.02357), who leaves the first relu out.

    Args:
        in_features: Channels of the input.
        out_features: Channels of the output.
        kernel_size: Side of the square depthwise kernel in pixels.
        strides: Stride of the depthwise convolution along both spatial axes.
        padding: "SAME", "VALID", one int for all edges, or (low, high) per spatial axis.
        batch_norm: Normalise before each relu; the convolutions then have no bias.
        pool: Side of the squares to take the maximum of at the end, or None.
        rngs: The random streams; "params" is used.

    Example:
        >>> model = DepthwiseSeparable(8, 16, strides=2, rngs=nnx.Rngs(0))
        >>> model(jax.numpy.ones((2, 14, 14, 8))).shape
        (2, 7, 7, 16)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: int = 3,
        *,
        strides: int = 1,
        padding: Padding = "SAME",
        batch_norm: bool = False,
        pool: int | None = None,
        rngs: nnx.Rngs,
    ) -> None:
        self.pool = pool
        options = {"strides": strides, "padding": padding, "use_bias": not batch_norm}
        self.depthwise = depthwise(in_features, kernel_size, rngs, **options)
        self.depthwise_norm = norm(in_features, rngs) if batch_norm else None
        self.pointwise = conv(in_features, out_features, 1, rngs, use_bias=not batch_norm)
        self.pointwise_norm = norm(out_features, rngs) if batch_norm else None

    def __call__(self, x: Images) -> Images:
        """The features of ``x``."""
        x = activate(self.depthwise(x), self.depthwise_norm)
        return pooled(activate(self.pointwise(x), self.pointwise_norm), self.pool)


class BatchNorm(nnx.BatchNorm):
    """`flax.nnx.BatchNorm`, in training with one factor and one summand for each channel.

    The same arguments, variables and, up to rounding, values. Flax subtracts the mean first; that
    difference is stored for the backward pass, which then sums over all images once more than it
    has to. Here the mean goes into what is added (Ioffe and Szegedy 2015, algorithm 2 does so for
    inference, https://arxiv.org/abs/1502.03167), and the gradient is one of ``x`` and of sums.

    Flax's own code runs in evaluation, on complex numbers, and with a ``mask``, an ``axis_name``,
    ``use_fast_variance=False`` or an ``axis`` that is not the last.

    Example:
        >>> model = BatchNorm(3, rngs=nnx.Rngs(0))
        >>> x = jax.numpy.arange(12.0).reshape(4, 3)
        >>> model(x).shape
        (4, 3)
        >>> print(model.mean[...])
        [0.045 0.055 0.065]
    """

    def __call__(
        self,
        x: Float[Array, "*batch channel"],
        use_running_average: bool | None = None,
        *,
        mask: Bool[Array, "..."] | None = None,
    ) -> Float[Array, "*batch channel"]:
        """The normalised ``x``; in training the running statistics move."""
        kept = self.use_running_average if use_running_average is None else use_running_average
        simple = self.use_fast_variance and self.axis_name is None and mask is None
        last = self.axis in (-1, x.ndim - 1) and x.shape[-1] == self.num_features
        if kept is not False or not simple or not last or jnp.iscomplexobj(x):
            return super().__call__(x, use_running_average, mask=mask)
        variables = (self.mean, self.var, self.scale, self.bias)
        values = [None if variable is None else variable[...] for variable in variables]
        x, _, _, scale, bias = self.promote_dtype((x, *values), dtype=self.dtype)
        dtype = self.dtype or jnp.result_type(*(v for v in (x, scale, bias) if v is not None))
        wide = x.astype(jnp.promote_types(self.dtype or x.dtype, jnp.float32))
        batch = tuple(range(x.ndim - 1))
        mean, square = wide.mean(batch), lax.square(wide).mean(batch)
        var = jnp.maximum(0.0, square - lax.square(mean))  # rounding may go below 0
        for running, new in ((self.mean, mean), (self.var, var)):
            moved = self.momentum * running[...] + (1 - self.momentum) * new
            running[...] = lax.stop_gradient(moved)
        multiplied = lax.rsqrt(var + self.epsilon) * (1 if scale is None else scale)
        added = (0 if bias is None else bias) - mean * multiplied
        return (wide * multiplied + added).astype(dtype)


def conv(
    in_features: int, out_features: int, kernel_size: int, rngs: nnx.Rngs, **options: Any
) -> nnx.Conv:
    size, form = (kernel_size, kernel_size), _tuned.conv_general_dilated
    options = {"kernel_init": HE, "conv_general_dilated": form, **options}
    return nnx.Conv(in_features, out_features, size, rngs=rngs, **options)


def bare_conv(
    in_features: int, features: int, kernel_size: int, rngs: nnx.Rngs, strides: int = 1
) -> nnx.Conv:
    """A convolution before batch norm: no bias, and torchvision's symmetric padding."""
    options = {"strides": strides, "padding": kernel_size // 2, "use_bias": False}
    return conv(in_features, features, kernel_size, rngs, **options)


def depthwise(features: int, kernel_size: int, rngs: nnx.Rngs, **options: Any) -> nnx.Conv:
    return conv(features, features, kernel_size, rngs, feature_group_count=features, **options)


def norm(features: int, rngs: nnx.Rngs) -> BatchNorm:
    return BatchNorm(features, momentum=0.9, epsilon=1e-5, rngs=rngs)


def activate(x: Images, norm: nnx.BatchNorm | None) -> Images:
    return jax.nn.relu(x if norm is None else norm(x))


def pooled(x: Images, pool: int | None) -> Images:
    return x if pool is None else _tuned.max_pool(x, pool)


def check_dropout(dropout: float) -> None:
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout: {dropout} is not in [0, 1); 0 turns it off")
