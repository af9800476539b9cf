"""Convolutional networks, one for each way in which channels get coupled."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax

from tests.models import Case, filled, from_nnx

Built = tuple[Callable, Any]


def normals(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> dict[str, Array]:
    return filled({name: jax.ShapeDtypeStruct(s, "float32") for name, s in shapes.items()}, seed)


def conv(inputs: int, outputs: int, size: int, rngs: nnx.Rngs, **options: Any) -> nnx.Conv:
    return nnx.Conv(inputs, outputs, (size, size), rngs=rngs, **options)


class Unit(nnx.Module):
    """Convolution without bias, batch norm, relu unless told otherwise."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        size: int,
        rngs: nnx.Rngs,
        relu: bool = True,
        **options: Any,
    ) -> None:
        self.conv = conv(inputs, outputs, size, rngs, use_bias=False, **options)
        self.norm = nnx.BatchNorm(outputs, rngs=rngs)
        self.relu = relu

    def __call__(self, x: Array) -> Array:
        x = self.norm(self.conv(x))
        return jax.nn.relu(x) if self.relu else x


class UNet(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.down1, self.down2 = Unit(3, 4, 3, rngs), Unit(4, 6, 3, rngs)
        self.bottom = Unit(6, 10, 3, rngs)
        self.raise2 = nnx.ConvTranspose(10, 5, (2, 2), strides=(2, 2), rngs=rngs)
        self.up2 = Unit(5 + 6, 7, 3, rngs)
        self.raise1 = nnx.ConvTranspose(7, 8, (2, 2), strides=(2, 2), rngs=rngs)
        self.up1 = Unit(8 + 4, 9, 3, rngs)
        self.out = conv(9, 2, 1, rngs)

    def __call__(self, x: Array) -> Array:
        skip1 = self.down1(x)
        skip2 = self.down2(nnx.max_pool(skip1, (2, 2), (2, 2)))
        x = self.bottom(nnx.max_pool(skip2, (2, 2), (2, 2)))
        x = self.up2(jnp.concatenate([self.raise2(x), skip2], -1))
        x = self.up1(jnp.concatenate([self.raise1(x), skip1], -1))
        return self.out(x)


class DenseNet(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.stem = conv(3, 8, 3, rngs, use_bias=False)
        self.norms = nnx.List([nnx.BatchNorm(n, rngs=rngs) for n in (8, 12, 16, 20)])
        self.convs = nnx.List([conv(n, 4, 3, rngs, use_bias=False) for n in (8, 12, 16)])
        self.transition = conv(20, 10, 1, rngs, use_bias=False)
        self.last_norm = nnx.BatchNorm(10, rngs=rngs)
        self.head = nnx.Linear(10, 6, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        x = self.stem(x)
        for i in range(3):
            x = jnp.concatenate([x, self.convs[i](jax.nn.relu(self.norms[i](x)))], -1)
        x = self.transition(jax.nn.relu(self.norms[3](x)))
        x = jax.nn.relu(self.last_norm(nnx.avg_pool(x, (2, 2), (2, 2))))
        return self.head(x.mean((1, 2)))


class Inception(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.stem = Unit(3, 6, 3, rngs)
        self.one = conv(6, 4, 1, rngs)
        self.three = nnx.List([conv(6, 5, 1, rngs), conv(5, 7, 3, rngs)])
        self.five = nnx.List([conv(6, 8, 1, rngs), conv(8, 9, 5, rngs)])
        self.pool = conv(6, 10, 1, rngs)
        self.merge = conv(4 + 7 + 9 + 10, 11, 3, rngs)
        self.head = nnx.Linear(11, 2, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        x, relu = self.stem(x), jax.nn.relu
        three = self.three[1](relu(self.three[0](x)))
        five = self.five[1](relu(self.five[0](x)))
        pool = self.pool(nnx.max_pool(x, (3, 3), (1, 1), "SAME"))
        x = relu(jnp.concatenate([self.one(x), three, five, pool], -1))
        return self.head(relu(self.merge(x)).mean((1, 2)))


class ShuffleUnit(nnx.Module):
    def __init__(self, inner: int, rngs: nnx.Rngs) -> None:
        self.expand = Unit(6, inner, 1, rngs)
        self.depthwise = Unit(inner, inner, 3, rngs, relu=False, feature_group_count=inner)
        self.project = Unit(inner, 6, 1, rngs)

    def __call__(self, x: Array) -> Array:
        kept, x = jnp.split(x, 2, -1)
        x = jnp.concatenate([kept, self.project(self.depthwise(self.expand(x)))], -1)
        return x.reshape(*x.shape[:3], 2, 6).swapaxes(3, 4).reshape(*x.shape[:3], 12)


class ShuffleNet(nnx.Module):
    """ShuffleNet v2: the units without stride."""

    def __init__(self, inner: tuple[int, ...], rngs: nnx.Rngs) -> None:
        self.stem = Unit(3, 12, 3, rngs)
        self.units = nnx.List([ShuffleUnit(n, rngs) for n in inner])
        self.last = Unit(12, 9, 1, rngs)
        self.head = nnx.Linear(9, 5, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        x = self.stem(x)
        for unit in self.units:
            x = unit(x)
        return self.head(self.last(x).mean((1, 2)))


class SqueezeExcite(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.stem, self.conv = Unit(3, 8, 3, rngs), conv(8, 12, 3, rngs)
        self.squeeze, self.excite = nnx.Linear(12, 4, rngs=rngs), nnx.Linear(4, 12, rngs=rngs)
        self.head = nnx.Linear(12, 5, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        x = jax.nn.relu(self.conv(self.stem(x)))
        gate = self.excite(jax.nn.relu(self.squeeze(x.mean((1, 2)))))
        x = x * jax.nn.sigmoid(gate)[:, None, None, :]
        return self.head(x.mean((1, 2)))


class Grouped(nnx.Module):
    """A bottleneck of ResNeXt."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.stem, self.reduce = Unit(3, 8, 3, rngs), Unit(8, 16, 1, rngs)
        self.grouped = Unit(16, 24, 3, rngs, feature_group_count=4)
        self.project = Unit(24, 8, 1, rngs, relu=False)
        self.head = nnx.Linear(8, 5, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        x = self.stem(x)
        x = jax.nn.relu(x + self.project(self.grouped(self.reduce(x))))
        return self.head(x.mean((1, 2)))


class Multiplier(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.stem = Unit(3, 5, 3, rngs)
        self.depthwise = conv(5, 10, 3, rngs, feature_group_count=5)
        self.pointwise = conv(10, 7, 1, rngs)
        self.head = nnx.Linear(7, 4, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        x = jax.nn.relu(self.depthwise(self.stem(x)))
        return self.head(jax.nn.relu(self.pointwise(x)).mean((1, 2)))


class Chain(nnx.Module):
    """Residual blocks; the first has a projection."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.stem = Unit(3, 6, 3, rngs)
        self.shortcut = Unit(6, 12, 1, rngs, relu=False)
        sizes = ((6, 9), (12, 10), (12, 11))
        self.first = nnx.List([Unit(n, inner, 3, rngs) for n, inner in sizes])
        self.second = nnx.List([Unit(inner, 12, 3, rngs, relu=False) for _, inner in sizes])
        self.head = nnx.Linear(12, 5, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        x = self.stem(x)
        for i in range(3):
            skip = x if i else self.shortcut(x)
            x = jax.nn.relu(skip + self.second[i](self.first[i](x)))
        return self.head(x.mean((1, 2)))


class Flatten(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.conv1, self.conv2 = conv(3, 4, 3, rngs), conv(4, 6, 3, rngs)
        self.hidden = nnx.Linear(2 * 3 * 6, 9, rngs=rngs)
        self.head = nnx.Linear(9, 5, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        x = nnx.max_pool(jax.nn.relu(self.conv1(x)), (2, 2), (2, 2))
        x = nnx.avg_pool(jnp.tanh(self.conv2(x)), (2, 2), (2, 2))
        return self.head(jax.nn.relu(self.hidden(x.reshape(x.shape[0], -1))))


class GroupNormed(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.conv1, self.conv2 = conv(3, 12, 3, rngs), conv(12, 10, 3, rngs)
        self.norm1 = nnx.GroupNorm(12, num_groups=4, rngs=rngs)
        self.norm2 = nnx.GroupNorm(10, num_groups=2, rngs=rngs)
        self.head = nnx.Linear(10, 4, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        x = jax.nn.relu(self.norm1(self.conv1(x)))
        return self.head(jax.nn.relu(self.norm2(self.conv2(x))).mean((1, 2)))


class Tied(nnx.Module):
    """One square layer applied twice."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.stem, self.shared = conv(3, 8, 3, rngs), nnx.Linear(8, 8, rngs=rngs)
        self.head = nnx.Linear(8, 5, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        x = jax.nn.relu(self.stem(x)).mean((1, 2))
        for _ in range(2):
            x = x + jnp.tanh(self.shared(x))
        return self.head(x)


def nchw() -> Built:
    """Channels first, with layer scale."""
    params = normals(
        {
            "stem": (6, 3, 3, 3),
            "stem_bias": (6, 1, 1),
            "expand": (9, 6, 3, 3),
            "expand_bias": (9, 1, 1),
            "project": (6, 9, 1, 1),
            "layer_scale": (6, 1, 1),
            "head": (6, 4),
            "head_bias": (4,),
        }
    )

    def convolve(x: Array, kernel: Array) -> Array:
        numbers = ("NCHW", "OIHW", "NCHW")
        return lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=numbers)

    def fn(params: Any, x: Array) -> Array:
        x = convolve(x, params["stem"]) + params["stem_bias"]
        y = jax.nn.gelu(convolve(x, params["expand"]) + params["expand_bias"])
        x = x + params["layer_scale"] * convolve(y, params["project"])
        return x.mean((2, 3)) @ params["head"] + params["head_bias"]

    return fn, params


CASES = [
    Case("unet", from_nnx(UNet), (2, 8, 8, 3)),
    Case("densenet", from_nnx(DenseNet), (2, 8, 8, 3)),
    Case("inception", from_nnx(Inception), (2, 8, 8, 3)),
    Case("shuffle_unit", from_nnx(ShuffleNet, (7,)), (2, 8, 8, 3)),
    Case("shuffle_twice", from_nnx(ShuffleNet, (7, 8)), (2, 8, 8, 3)),
    Case("squeeze_excite", from_nnx(SqueezeExcite), (2, 8, 8, 3)),
    Case("grouped", from_nnx(Grouped), (2, 8, 8, 3)),
    Case("multiplier", from_nnx(Multiplier), (2, 8, 8, 3)),
    Case("chain", from_nnx(Chain), (2, 8, 8, 3)),
    Case("flatten", from_nnx(Flatten), (2, 8, 12, 3)),
    Case("group_norm", from_nnx(GroupNormed), (2, 8, 8, 3)),
    Case("tied", from_nnx(Tied), (2, 8, 8, 3)),
    Case("nchw", nchw, (2, 3, 8, 8)),
]
