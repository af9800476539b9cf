"""Small networks of Linen, Haiku, Equinox and Keras."""

import os
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen
from jax import Array

import jaxaccel as jx
from tests.models import Case, filled
from tests.networks.vision import Built


class PlainNet(linen.Module):
    @linen.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        x = linen.Conv(5, (3, 3), use_bias=False)(x)
        x = linen.relu(linen.BatchNorm(use_running_average=not train)(x)).mean((1, 2))
        x = linen.Dropout(0.5, deterministic=not train)(x)
        return linen.Dense(4)(x)


class ResidualNet(linen.Module):
    @linen.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        x = linen.relu(self.unit(6, x, train))
        y = self.unit(6, linen.relu(self.unit(8, x, train)), train)
        x = linen.relu(x + y).reshape(x.shape[0], -1)
        return linen.Dense(4)(linen.Dropout(0.5, deterministic=not train)(x))

    def unit(self, features: int, x: Array, train: bool) -> Array:
        x = linen.Conv(features, (3, 3), use_bias=False)(x)
        return linen.BatchNorm(use_running_average=not train)(x)


def linen_net(module: linen.Module) -> Built:
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.ones((1, 8, 8, 3)))
    return jx.functional(module, filled(shapes))


def haiku_net(averages_only: bool) -> Built:
    """The state of batch norm also holds what only training reads: `hidden` and `counter`."""
    import haiku as hk

    def unit(x: Array, features: int, is_training: bool) -> Array:
        x = hk.Conv2D(features, 3, with_bias=False)(x)
        return hk.BatchNorm(True, True, 0.9)(x, is_training)

    def forward(x: Array, is_training: bool) -> Array:
        x = jax.nn.relu(unit(x, 6, is_training))
        x = x + unit(jax.nn.relu(unit(x, 9, is_training)), 6, is_training)
        return hk.Linear(4)(jax.nn.relu(x).mean((1, 2)))

    net = hk.transform_with_state(forward)
    init = partial(net.init, is_training=True)
    weights, state = jax.eval_shape(init, jax.random.key(0), jnp.ones((2, 8, 8, 3)))
    if averages_only:
        state = {name: {"average": values["average"]} for name, values in state.items()}
    params = filled({"params": weights, "state": state})

    def fn(params: Any, x: Array) -> Array:
        return net.apply(params["params"], params["state"], None, x, False)[0]

    return fn, params


def equinox_net() -> Built:
    import equinox as eqx

    class Net(eqx.Module):
        convs: list[eqx.nn.Conv2d]
        norms: list[eqx.nn.BatchNorm]
        head: eqx.nn.Linear

        def __init__(self, key: Array) -> None:
            keys = jax.random.split(key, 4)
            sizes = ((3, 6), (6, 9), (9, 6))
            self.convs = [
                eqx.nn.Conv2d(n, m, 3, padding=1, key=k)
                for (n, m), k in zip(sizes, keys[:3], strict=True)
            ]
            self.norms = [eqx.nn.BatchNorm(n, "batch", mode="ema") for n in (6, 9, 6)]
            self.head = eqx.nn.Linear(6, 4, key=keys[3])

        def __call__(self, x: Array, state: Any) -> tuple[Array, Any]:
            x, state = self.unit(0, x, state)
            y, state = self.unit(1, jax.nn.relu(x), state)
            y, state = self.unit(2, jax.nn.relu(y), state)
            return self.head(jax.nn.relu(jax.nn.relu(x) + y).mean((1, 2))), state

        def unit(self, i: int, x: Array, state: Any) -> tuple[Array, Any]:
            return self.norms[i](self.convs[i](x), state)

    model, state = eqx.filter_jit(eqx.nn.make_with_state(Net))(jax.random.key(0))
    arrays, static = eqx.partition(eqx.nn.inference_mode(model), eqx.is_array)
    statistics, flags = eqx.partition(state, eqx.is_inexact_array)

    def fn(params: Any, x: Array) -> Array:
        net = eqx.combine(params["model"], static)
        state = eqx.combine(params["state"], flags)
        return jax.vmap(net, in_axes=(0, None), out_axes=(0, None), axis_name="batch")(x, state)[0]

    return fn, filled({"model": arrays, "state": statistics})


def keras_net() -> Built:
    os.environ.setdefault("KERAS_BACKEND", "jax")
    import keras
    from keras import layers

    keras.utils.clear_session()  # or the paths count up from one build to the next
    keras.utils.set_random_seed(0)
    model: Any = keras.Sequential(
        [
            keras.Input((8, 8, 3)),
            layers.Conv2D(6, 3, padding="same"),
            layers.BatchNormalization(),
            layers.ReLU(),
            layers.DepthwiseConv2D(3, padding="same", use_bias=False),
            layers.BatchNormalization(),
            layers.ReLU(),
            layers.Conv2D(9, 1),
            layers.GlobalAveragePooling2D(),
            layers.Dropout(0.5),
            layers.Dense(4),
        ]
    )
    seeds = {v.path: v.value for v in model.non_trainable_variables if "seed" in v.path}
    params = {
        "trainable": {v.path: v.value for v in model.trainable_variables},
        "non_trainable": {
            v.path: v.value for v in model.non_trainable_variables if v.path not in seeds
        },
    }

    def fn(params: Any, x: Array) -> Array:
        fixed = params["non_trainable"] | seeds
        trainable = [params["trainable"][v.path] for v in model.trainable_variables]
        non_trainable = [fixed[v.path] for v in model.non_trainable_variables]
        return model.stateless_call(trainable, non_trainable, x, training=False)[0]

    return fn, filled(params)


CASES = [
    Case("linen_plain", partial(linen_net, PlainNet()), (2, 8, 8, 3)),
    Case("linen_residual", partial(linen_net, ResidualNet()), (2, 8, 8, 3)),
    Case("haiku", partial(haiku_net, True), (2, 8, 8, 3)),
    Case("haiku_state", partial(haiku_net, False), (2, 8, 8, 3)),
    Case("equinox", equinox_net, (2, 3, 8, 8)),
    Case("keras", keras_net, (2, 8, 8, 3)),
]
