"""Random networks for hypothesis: branches, residuals, concatenations, reshapes, groups, gates."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st
from jax import lax

Network = tuple[Callable, dict[str, Any], tuple[int, ...]]
_LAYOUT = ("NHWC", "HWIO", "NHWC")
ACTIVATIONS = {
    "relu": jax.nn.relu,
    "tanh": jnp.tanh,
    "silu": jax.nn.silu,
    "sigmoid": jax.nn.sigmoid,
    "gelu": jax.nn.gelu,
    "softplus": jax.nn.softplus,
}


class _Program:
    """Steps ``(params, x) -> x`` on images, and the parameters they read."""

    def __init__(self, draw: Callable, channels: int) -> None:
        self.draw = draw
        self.channels = channels
        self.params: dict[str, np.ndarray] = {}
        self.random = np.random.default_rng(draw(st.integers(0, 999)))

    def new(self, *shape: int, scale: float = 1.0) -> str:
        name = f"p{len(self.params)}"
        values = self.random.normal(size=shape) * scale
        self.params[name] = values.astype(np.float32)
        return name

    def conv(self, groups: int = 1) -> Callable:
        into, out = self.channels, self.draw(st.integers(1, 4)) * groups
        if groups == into:
            out = into * self.draw(st.integers(1, 2))
        side = self.draw(st.sampled_from([1, 3]))
        name = self.new(
            side, side, into // groups, out, scale=(side * side * into / groups) ** -0.5
        )
        self.channels = out
        return lambda p, x: lax.conv_general_dilated(
            x, p[name], (1, 1), "SAME", dimension_numbers=_LAYOUT, feature_group_count=groups
        )

    def grouped(self) -> Callable:
        divisors = [g for g in range(1, self.channels + 1) if self.channels % g == 0]
        return self.conv(self.draw(st.sampled_from(divisors)))

    def bias(self) -> Callable:
        name = self.new(self.channels)
        return lambda p, x: x + p[name][None, None, None]

    def norm(self) -> Callable:
        mean, scale, shift = (self.new(self.channels) for _ in range(3))
        var = self.new(self.channels)
        self.params[var] = np.abs(self.params[var]) + 0.1

        def apply(p: Any, x: Any) -> Any:
            wide = lambda name: p[name][None, None, None]
            return (x - wide(mean)) * (wide(scale) * lax.rsqrt(wide(var) + 1e-5)) + wide(shift)

        return apply

    def activation(self) -> Callable:
        often = [name for name in ("relu", "tanh", "silu", "gelu") for _ in range(2)]
        function = ACTIVATIONS[self.draw(st.sampled_from([*often, "sigmoid", "softplus"]))]
        return lambda p, x: function(x)

    def residual(self) -> Callable:
        channels, inner = self.channels, [self.conv(), self.activation()]
        name = self.new(1, 1, self.channels, channels, scale=0.5)
        self.channels = channels

        def apply(p: Any, x: Any) -> Any:
            h = inner[1](p, inner[0](p, x))
            return x + jnp.einsum("bhwi,io->bhwo", h, p[name][0, 0])

        return apply

    def branches(self) -> Callable:
        channels = self.channels
        first = self.conv()
        width, self.channels = self.channels, channels
        second = self.conv()
        self.channels += width
        return lambda p, x: jnp.concatenate([first(p, x), second(p, x)], -1)

    def halves(self) -> Callable:
        cut = self.draw(st.integers(1, max(1, self.channels - 1)))
        return lambda p, x: jnp.concatenate([jnp.sin(x[..., cut:]), x[..., :cut]], -1)

    def shuffle(self) -> Callable:
        groups = 2 if self.channels % 2 == 0 else 1

        def apply(p: Any, x: Any) -> Any:
            split = x.reshape(*x.shape[:3], groups, -1)
            return jnp.swapaxes(split, -1, -2).reshape(x.shape)

        return apply

    def gate(self) -> Callable:
        name = self.new(self.channels, self.channels)
        return lambda p, x: x * jax.nn.sigmoid(x.mean((1, 2)) @ p[name])[:, None, None]

    def pool(self) -> Callable:
        window = (1, 2, 2, 1)
        return lambda p, x: lax.reduce_window(x, -jnp.inf, lax.max, window, (1, 1, 1, 1), "SAME")

    def softmax(self) -> Callable:
        return lambda p, x: jax.nn.softmax(x, -1)

    def center(self) -> Callable:
        return lambda p, x: x - x.mean(-1, keepdims=True)

    def columns(self) -> Callable:
        name = self.new(self.channels, self.channels, scale=self.channels**-0.5)

        def apply(p: Any, x: Any) -> Any:
            step = lambda h, row: (jnp.tanh(h @ p[name] + row), h)
            rows = x.mean(1).swapaxes(0, 1)
            last, _ = lax.scan(step, jnp.zeros_like(rows[0]), rows)
            return x * last[:, None, None]

        return apply


STEPS = [
    *("conv", "conv", "grouped", "bias", "norm", "activation", "activation", "residual"),
    *("conv", "norm", "activation", "residual", "branches", "shuffle", "gate", "pool"),
    *("branches", "halves", "shuffle", "gate", "pool", "softmax", "center", "columns"),
]


@st.composite
def networks(draw: Callable, max_steps: int = 6) -> Network:
    """``(fn, params, shape of the images)``: some steps, then a dense layer."""
    program = _Program(draw, draw(st.integers(1, 3)))
    shape = (2, 3, 4, program.channels)
    names = draw(st.lists(st.sampled_from(STEPS), min_size=1, max_size=max_steps))
    steps = [program.conv(), *(getattr(program, name)() for name in names)]
    flat = draw(st.booleans())
    head = program.new((12 if flat else 1) * program.channels, 3, scale=0.3)

    def fn(params: Any, x: Any) -> Any:
        for step in steps:
            x = step(params, x)
        x = x.reshape(x.shape[0], -1) if flat else x.mean((1, 2))
        return x @ params[head]

    return fn, {name: jnp.asarray(v) for name, v in program.params.items()}, shape
