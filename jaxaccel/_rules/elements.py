"""Integers known while tracing: what a gather's indices are, followed through the graph."""

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxaccel._axes import Axes
from jaxaccel._graph import Node

_FEW = 1 << 16


def few_integers(value: Any) -> np.ndarray | None:
    """The elements of a constant, where they are integers or booleans and not many."""
    dtype = getattr(value, "dtype", np.dtype(type(value)))
    if jnp.issubdtype(dtype, jax.dtypes.extended) or np.size(value) > _FEW:
        return None
    return np.asarray(value) if np.dtype(dtype).kind in "iub" else None


def known_elements(node: Node, operands: Sequence[Axes]) -> np.ndarray | None:
    """The elements of the node's result, where those of all operands are known."""
    if node.name not in _FUNCTIONS or any(x.elements is None for x in operands):
        return None
    shape, dtype = node.outputs[0].shape, node.outputs[0].aval.dtype  # pyright: ignore
    if dtype.kind not in "iub" or prod(shape) > _FEW or len(operands) > 3:
        return None
    with np.errstate(all="ignore"):
        result = _FUNCTIONS[node.name](node, *(x.elements for x in operands))
    return np.asarray(result).reshape(shape).astype(dtype)


def _broadcast(node: Node, x: np.ndarray) -> np.ndarray:
    shape, places = node.outputs[0].shape, node.params["broadcast_dimensions"]
    aligned = [x.shape[places.index(k)] if k in places else 1 for k in range(len(shape))]
    return np.broadcast_to(x.reshape(aligned), shape)


def _same(node: Node, x: np.ndarray) -> np.ndarray:
    return x


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "lt": lambda node, a, b: a < b,
    "add": lambda node, a, b: a + b,
    "sub": lambda node, a, b: a - b,
    "mul": lambda node, a, b: a * b,
    "select_n": lambda node, which, *cases: np.choose(which.astype(int), cases),
    "reshape": lambda node, x: x.transpose(node.params["dimensions"] or range(x.ndim)),
    "transpose": lambda node, x: x.transpose(node.params["permutation"]),
    "broadcast_in_dim": _broadcast,
    **dict.fromkeys(("convert_element_type", "squeeze", "copy"), _same),
}
