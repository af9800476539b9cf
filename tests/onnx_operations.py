"""Single operations, and the kernels that they read, in the forms that JAX gives them."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

LAYOUT = ("NHWC", "HWIO", "NHWC")
W = np.random.default_rng(0).normal(size=(6, 6)).astype(np.float32) / 3
K = np.random.default_rng(1).normal(size=(3, 3, 3, 4)).astype(np.float32) / 4
conv = lambda x, k, *args, **kw: lax.conv_general_dilated(
    x, k, *args, dimension_numbers=LAYOUT, **kw
)
first = lambda x: jnp.clip(jnp.abs(x[:, 0]) * 3, 0, 5).astype(jnp.int32)
pool = lambda x, *args, **kw: lax.reduce_window(x, -jnp.inf, lax.max, *args, **kw)
VECTORS = {
    "scan": lambda w, x: lax.scan(lambda c, t: (jnp.tanh(c @ w + t), c), x * 0, jnp.stack([x, x])),
    "reverse scan": lambda w, x: lax.scan(
        lambda c, t: (jnp.tanh(c @ w + t), c), x, jnp.arange(4.0), reverse=True
    ),
    "while": lambda w, x: lax.while_loop(lambda s: s.max() > 0.1, lambda s: s * 0.5, x),
    "cond": lambda w, x: lax.cond(x.sum() > 0, lambda x: x @ w, lambda x: x - 1, x),
    "switch": lambda w, x: lax.switch(first(x)[0], [lambda x: x, lambda x: x @ w, jnp.sin], x),
    "remainders": lambda w, x: (jnp.mod(x, 0.3), (first(x) - 3) % 2, lax.rem(x, x * 0 + 0.4)),
    "outer": lambda w, x: jnp.einsum("bi,bj->bij", x, x),
    "outer of kernels": lambda w, x: jnp.einsum("bi,jk->bijk", x, w),
    "kernel first": lambda w, x: jnp.einsum("ij,bj->ib", w, x),
    "kernel of two axes": lambda w, x: jnp.einsum("bij,jik->bk", x.reshape(-1, 2, 3),
                                                  w.reshape(3, 2, 6)),
    "vector": lambda w, x: x @ w[0],
    "batched": lambda w, x: jnp.einsum("bhi,bhj->bij", x.reshape(-1, 2, 3), x.reshape(-1, 2, 3)),
    "of integers": lambda w, x: first(x) @ jnp.ones((1, 2), jnp.int32)
    if x.ndim == 1 else jnp.einsum("b,bi->i", first(x), first(x)[:, None] * jnp.arange(3)),
    "slices": lambda w, x: (x[:, ::2], x[-1], x[:, 1:3], x[1:]),
    "reshapes around a limit": lambda w, x: (
        jnp.maximum(x.reshape(-1, 2, 3), w[None, None, 0, :3]).reshape(-1, 6),
        *(lambda y: (y, y.reshape(-1, 6) + 1))(jnp.maximum(x.reshape(-1, 2, 3), 0)),
    ),
    "shuffles": lambda w, x: (
        *(x.reshape(-1, n, 6 // n).swapaxes(1, 2).reshape(-1, 6) for n in (1, 2, 3, 6)),
        jnp.pad(x, [(0, 0), (0, 2)]).reshape(-1, 2, 2, 2).transpose(0, 3, 2, 1).reshape(-1, 8),
        x.reshape(-1, 6, 1).swapaxes(1, 2).reshape(-1, 6) @ w,
    ),
    "rounded": lambda w, x: [
        f(y) for f in (lax.round, jnp.round) for y in (x, jnp.floor(x) + 0.5, 1e6 * x)
    ],
    "order": lambda w, x: (
        jax.vmap(lambda row: jnp.ravel(row.reshape(2, 3), order="F"))(x),
        lax.reshape((w @ w)[:2, :3], (6,), dimensions=(1, 0)),
    ),
    "edges": lambda w, x: (
        *(jnp.pad(x @ w, ((0, 0), (1, 2)), mode=mode) for mode in ("edge", "reflect", "wrap")),
        jnp.concatenate([x[:, :0], x, x[:, 6:]], 1),
        (x[:, :0] @ w[:0]) + x,
    ),
    "sums along one axis": lambda w, x: (
        lax.reduce_window(x, 0.0, lax.add, (1, 3), (1, 2), "SAME"),
        lax.reduce_window(x[0], -jnp.inf, lax.max, (3,), (1,), "SAME"),
    ),
    "reversed": lambda w, x: (lax.rev(x @ w, (1,)), lax.rev(x, (0,))),
    "stack and tile": lambda w, x: (jnp.stack([x, -x], 1), jnp.tile(x, (2, 3))),
    "broadcast": lambda w, x: jnp.broadcast_to(x[:, None], (x.shape[0], 3, 6)) + w[:3],
    "interior": lambda w, x: lax.pad(x, 1.5, [(0, 0, 0), (2, -1, 2)]),
    "clips": lambda w, x: (jnp.clip(x, -0.5, 0.3), jnp.minimum(x, 0.2), jnp.maximum(0.1, x),
                           jax.nn.relu6(x * 9), jnp.maximum(x, w[0]), jnp.minimum(first(x), 2)),
    "random, but fixed": lambda w, x: x + jax.random.uniform(jax.random.key(0), (6,))[None],
    "a mean over the batch": lambda w, x: x.std(0),
    "softmax": lambda w, x: jax.nn.softmax(x @ w),
    "argmax": lambda w, x: (jnp.argmax(x, 1), lax.top_k(x, 3), jnp.sort(x, 1)),
    "remat": lambda w, x: jax.checkpoint(lambda x: jnp.tanh(x @ w))(x),
    "grad": lambda w, x: jax.grad(lambda x: jnp.tanh(x @ w).sum())(x),
    "cumsum": lambda w, x: jnp.cumsum(x, 1),
}  # fmt: skip
IMAGES = {
    "strides, dilation, uneven": lambda k, x: (
        conv(x, k, (2, 2), ((0, 1), (2, 1))), conv(x, k, (1, 1), "SAME", rhs_dilation=(2, 2))
    ),
    "upsampled": lambda k, x: lax.conv_transpose(
        x, k, (2, 2), "SAME", dimension_numbers=LAYOUT
    ),
    "one axis": lambda k, x: lax.conv_general_dilated(
        x[:, 0], k[0], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
    ),
    "three axes": lambda k, x: lax.conv_general_dilated(
        x[:, None], k[None], (1, 1, 1), "SAME", dimension_numbers=("NDHWC", "DHWIO", "NDHWC")
    ),
    "mixed layouts": lambda k, x: lax.conv_general_dilated(
        x, k, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "CWNH")
    ),
    "groups": lambda k, x: conv(x, k[:, :, :1, :3], (1, 1), "SAME", feature_group_count=3),
    "largest": lambda k, x: (
        pool(x, (1, 3, 3, 1), (1, 2, 2, 1), "SAME"),
        pool(x.transpose(0, 3, 1, 2), (1, 1, 2, 2), (1, 1, 2, 2), "VALID"),
        pool(x, (1, 2, 2, 1), (1, 1, 1, 1), "VALID", window_dilation=(1, 2, 2, 1)),
        pool(x[:, 0], (1, 2, 1), (1, 2, 1), "VALID"),
    ),
    "smallest": lambda k, x: lax.reduce_window(
        x, jnp.inf, lax.min, (1, 2, 2, 1), (1, 2, 2, 1), "SAME"
    ),
    "wide edges": lambda k, x: jnp.maximum(
        pool(x, (1, 2, 2, 1), (1, 2, 2, 1), ((0, 0), (2, 2), (2, 2), (0, 0))), -9
    ),
    "sums of channels": lambda k, x: (
        lax.reduce_window(x, 0.0, lax.add, (1, 1, 1, 3), (1, 1, 1, 1), "SAME"),
        lax.reduce_window(
            conv(x, k, (1, 1), "SAME"), 0.0, lax.add, (1, 2, 2, 3), (1, 2, 1, 1), "SAME"
        ),
    ),
    "sums": lambda k, x: lax.reduce_window(x, 0.0, lax.add, (1, 3, 3, 1), (1, 2, 2, 1), "SAME"),
    "layouts": lambda k, x: (
        jnp.concatenate([conv(x, k, (1, 1), "SAME"), x], -1)[:, ::-1, 1:],
        jnp.swapaxes(conv(x, k, (1, 1), "SAME"), 1, 3).max(1),
        conv(x, k, (1, 1), "SAME") + x[..., :1],
        jnp.pad(conv(x, k, (1, 1), "SAME"), ((0, 0), (1, 0), (0, 2), (3, 0))),
        jnp.split(conv(x, k, (1, 1), "SAME"), 2, -1),
    ),
}  # fmt: skip
