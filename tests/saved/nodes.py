"""A tree with every kind of node and leaf that an artefact may hold."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

import jaxaccel as jx


def every_node():
    """The same each time."""
    kernel = {"kernel": jnp.asarray(np.arange(20.0, dtype="float32").reshape(5, 4) - 9)}
    names = ("float32", "float16", "bfloat16", "int8", "uint8", "int32", "bool", "complex64")
    return {
        "dtypes": {name: jnp.asarray(np.arange(3).astype(name)) for name in names},
        "float8": jnp.asarray(np.arange(3).astype(ml_dtypes.float8_e4m3fn)),
        "empty": jnp.zeros((0, 2)),
        "list": [jnp.float32(1), None, (jnp.int32(2),), []],
        "numbers": {7: jax.random.key(7)},
        "8 bits": jx.quantize.weights(kernel, bits=8),
        "4 bits": jx.quantize.weights(kernel, bits=4),
    }


def with_nodes(params, x):
    """Them, and what the arguments decide."""
    return {"nodes": params, "sum": x.sum() + params["list"][0]}
