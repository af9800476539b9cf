"""Attention, recurrence, scans and gates."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from tests.models import Case, from_nnx
from tests.networks.vision import Built, conv, normals


class Block(nnx.Module):
    """Pre-norm transformer block."""

    def __init__(self, width: int, heads: int, depth: int, hidden: int, rngs: nnx.Rngs) -> None:
        self.norm1, self.norm2 = nnx.LayerNorm(width, rngs=rngs), nnx.LayerNorm(width, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(
            heads, width, qkv_features=heads * depth, decode=False, rngs=rngs
        )
        self.hidden = nnx.Linear(width, hidden, rngs=rngs)
        self.out = nnx.Linear(hidden, width, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        x = x + self.attention(self.norm1(x))
        return x + self.out(jax.nn.gelu(self.hidden(self.norm2(x))))


class ViT(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.patches = conv(3, 12, 4, rngs, strides=4)
        self.token = nnx.Param(jax.random.normal(rngs.params(), (1, 1, 12)))
        self.position = nnx.Param(jax.random.normal(rngs.params(), (1, 5, 12)))
        self.blocks = nnx.List([Block(12, 2, 5, 16, rngs), Block(12, 3, 7, 20, rngs)])
        self.norm, self.head = nnx.LayerNorm(12, rngs=rngs), nnx.Linear(12, 4, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        x = self.patches(x).reshape(x.shape[0], 4, 12)
        token = jnp.broadcast_to(self.token[...], (x.shape[0], 1, 12))
        x = jnp.concatenate([token, x], 1) + self.position[...]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


def one_pass_norm(x: Array, scale: Array, bias: Array) -> Array:
    mean = x.mean(-1, keepdims=True)
    variance = jnp.square(x).mean(-1, keepdims=True) - jnp.square(mean)
    return (x - mean) * jax.lax.rsqrt(variance + 1e-5) * scale + bias


def two_pass_norm(x: Array, scale: Array, bias: Array) -> Array:
    centred = x - x.mean(-1, keepdims=True)
    variance = jnp.square(centred).mean(-1, keepdims=True)
    return centred * jax.lax.rsqrt(variance + 1e-5) * scale + bias


def fused_qkv() -> Built:
    """One kernel for queries, keys and values of two heads of depth 4."""
    params = normals(
        {
            "embed": (48, 10),
            "position": (4, 10),
            "scale": (10,),
            "bias": (10,),
            "qkv": (10, 24),
            "qkv_bias": (24,),
            "out": (8, 10),
            "out_bias": (10,),
            "up": (10, 12),
            "up_bias": (12,),
            "down": (12, 10),
            "head": (10, 3),
            "head_bias": (3,),
        }
    )

    def fn(params: Any, x: Array) -> Array:
        b = x.shape[0]
        x = x.reshape(b, 2, 4, 2, 4, 3).transpose(0, 1, 3, 2, 4, 5).reshape(b, 4, 48)
        x = x @ params["embed"] + params["position"]
        y = one_pass_norm(x, params["scale"], params["bias"])
        qkv = (y @ params["qkv"] + params["qkv_bias"]).reshape(b, 4, 3, 2, 4)
        q, k, v = (qkv[:, :, i] for i in range(3))
        weights = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k) / 2)
        y = jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(b, 4, 8)
        x = x + y @ params["out"] + params["out_bias"]
        x = x + jax.nn.gelu(x @ params["up"] + params["up_bias"]) @ params["down"]
        return x.mean(1) @ params["head"] + params["head_bias"]

    return fn, params


def elman() -> Built:
    params = normals(
        {"inputs": (5, 7), "hidden": (7, 7), "bias": (7,), "head": (7, 3), "head_bias": (3,)}
    )

    def fn(params: Any, x: Array) -> Array:
        def step(h: Array, x: Array) -> tuple[Array, None]:
            return jnp.tanh(x @ params["inputs"] + h @ params["hidden"] + params["bias"]), None

        h, _ = jax.lax.scan(step, jnp.zeros((x.shape[0], 7)), x.swapaxes(0, 1))
        return h @ params["head"] + params["head_bias"]

    return fn, params


class Recurrent(nnx.Module):
    def __init__(self, cell: Any, hidden: int, rngs: nnx.Rngs) -> None:
        self.rnn: Any = nnx.RNN(cell(4, hidden, rngs=rngs), rngs=rngs)
        self.head = nnx.Linear(hidden, 3, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        return self.head(self.rnn(x)[:, -1])


def stacked() -> Built:
    """Three residual layers of one shape, run by a scan over their stacked parameters."""
    layers = normals({"up": (3, 6, 24), "up_bias": (3, 24), "down": (3, 24, 6), "bias": (3, 6)})
    params = normals({"embed": (5, 6), "head": (6, 2), "head_bias": (2,)}, 1) | {"layers": layers}

    def fn(params: Any, x: Array) -> Array:
        def step(x: Array, layer: dict[str, Array]) -> tuple[Array, None]:
            hidden = jnp.tanh(x @ layer["up"] + layer["up_bias"])
            return x + hidden @ layer["down"] + layer["bias"], None

        x, _ = jax.lax.scan(step, x @ params["embed"], params["layers"])
        return x @ params["head"] + params["head_bias"]

    return fn, params


def gated() -> Built:
    params = normals(
        {
            "embed": (5, 8),
            "value": (8, 12),
            "value_bias": (12,),
            "gate": (8, 12),
            "gate_bias": (12,),
            "out": (12, 8),
            "head": (8, 3),
            "head_bias": (3,),
        }
    )

    def fn(params: Any, x: Array) -> Array:
        x = x @ params["embed"]
        gate = jax.nn.silu(x @ params["gate"] + params["gate_bias"])
        x = x + ((x @ params["value"] + params["value_bias"]) * gate) @ params["out"]
        return x @ params["head"] + params["head_bias"]

    return fn, params


def linear_attention() -> Built:
    params = normals(
        {
            "embed": (5, 8),
            "query": (8, 4),
            "query_bias": (4,),
            "key": (8, 4),
            "key_bias": (4,),
            "value": (8, 7),
            "value_bias": (7,),
            "out": (7, 8),
            "head": (8, 3),
            "head_bias": (3,),
        }
    )

    def fn(params: Any, x: Array) -> Array:
        x = x @ params["embed"]
        q = jax.nn.elu(x @ params["query"] + params["query_bias"]) + 1
        k = jax.nn.elu(x @ params["key"] + params["key_bias"]) + 1
        v = x @ params["value"] + params["value_bias"]
        summary = jnp.einsum("bnd,bne->bde", k, v)
        total = jnp.einsum("bnd,bd->bn", q, k.sum(1))
        y = jnp.einsum("bnd,bde->bne", q, summary) / total[..., None]
        x = x + y @ params["out"]
        return x.mean(1) @ params["head"] + params["head_bias"]

    return fn, params


def two_pass() -> Built:
    """Layer norm whose variance sums what is not zero where a channel is."""
    params = normals(
        {
            "embed": (5, 8),
            "embed_bias": (8,),
            "scale": (8,),
            "bias": (8,),
            "hidden": (8, 11),
            "hidden_bias": (11,),
            "head": (11, 3),
            "head_bias": (3,),
        }
    )

    def fn(params: Any, x: Array) -> Array:
        x = x @ params["embed"] + params["embed_bias"]
        x = two_pass_norm(x, params["scale"], params["bias"])
        x = jnp.tanh(x @ params["hidden"] + params["hidden_bias"])
        return x @ params["head"] + params["head_bias"]

    return fn, params


CASES = [
    Case("vit", from_nnx(ViT), (2, 8, 8, 3)),
    Case("fused_qkv", fused_qkv, (2, 8, 8, 3)),
    Case("elman", elman, (2, 6, 5)),
    Case("lstm", from_nnx(Recurrent, nnx.OptimizedLSTMCell, 6), (2, 5, 4)),
    Case("gru", from_nnx(Recurrent, nnx.GRUCell, 9), (2, 5, 4)),
    Case("stacked", stacked, (2, 5)),
    Case("gated", gated, (2, 5)),
    Case("linear_attention", linear_attention, (2, 6, 5)),
    Case("two_pass", two_pass, (2, 5)),
]
