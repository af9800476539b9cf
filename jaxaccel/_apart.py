"""A part of a form that XLA may not fuse with what is around it."""

from collections.abc import Callable
from typing import TypeVar

import jax
from jax.experimental.xla_metadata import set_xla_metadata
from jaxtyping import Array

T = TypeVar("T")


def apart(run: Callable[..., T], *operands: Array) -> T:
    """``run(*operands)`` as a call that stays one.

    XLA:CPU of JAX 0.10 drops an ``optimization_barrier`` before it fuses, and then computes a
    shared operand again for each of its uses, or loses vector code inside of a reduction.
    """

    def inlined(*operands: Array) -> T:
        with set_xla_metadata(inlineable="true"):  # the calls inside
            return run(*operands)

    with set_xla_metadata(inlineable="false"):
        return jax.jit(inlined)(*operands)
