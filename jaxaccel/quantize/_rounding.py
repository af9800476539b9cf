"""What rounding does to a layer, and how it is made less: bias correction and AdaRound."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from jaxaccel._graph import Node, run
from jaxaccel.fold._transform import keyed
from jaxaccel.fold._view import Keys
from jaxaccel.quantize import _constants
from jaxaccel.quantize._calibrate import arguments
from jaxaccel.quantize._correction import both
from jaxaccel.quantize._execute import moved_leaf
from jaxaccel.quantize._layers import Layer
from jaxaccel.quantize._qtensor import QTensor
from jaxaccel.quantize._traced import Traced

Visit: TypeAlias = Callable[[Keys, Layer, Array], Array]
_STEPS, _RATE = 400, 0.1  # of Adam, for each layer
_ROWS = 64  # images, or rows of a batch, on which a layer is fitted
_WEIGHT = 30.0  # of the term that draws each number up or down


def _visited(
    traced: Traced, params: PyTree, args: Sequence[Any], visit: Visit
) -> dict[Keys, Array]:
    """Runs the function as it was; `visit` sees what each layer with constants of its own reads."""
    program = traced.plan(params, args)[0].program
    seen: dict[Keys, Array] = {}

    def rule(node: Node, operands: list[Array]) -> None:
        step = program.steps.get(node)
        if isinstance(step, Layer) and step.fixed:
            keys = program.view.leaves[step.kernel.leaf]
            place = 0 if node.inputs[0] is step.contraction.data else 1
            seen[keys] = visit(keys, step, operands[place])

    run(program.view.graph, [*jax.tree.leaves(params), *jax.tree.leaves(args)], rule)
    return seen


def kernels(
    traced: Traced,
    params: PyTree,
    batches: Iterable[Any],
    axes: Mapping[Keys, tuple[int, ...]],
    power: bool,
    rounding: str,
) -> dict[Keys, QTensor]:
    """All kernels in 8 bits, rounded to the nearest or by `adaround`."""
    leaves = keyed(params)
    found = {keys: _constants.kernel(leaves[keys], kept, power) for keys, kept in axes.items()}
    return found if rounding == "nearest" else adaround(traced, params, batches, leaves, found)


def shifts(
    traced: Traced, params: PyTree, batches: Iterable[Any], rounded: Mapping[Keys, QTensor]
) -> dict[Keys, Float[np.ndarray, "..."]]:
    """By how much each layer's result moves on average, per output channel, for a changed kernel.

    Source: Nagel et al. 2019, section 4.2 (https://arxiv.org/abs/1906.04721), measured.
    """

    leaves = keyed(params)
    changes = {keys: _wide(q) - leaves[keys] for keys, q in rounded.items()}

    def visit(changes: Mapping[Keys, Array], keys: Keys, layer: Layer, x: Array) -> Array:
        moved = _result(layer, x, changes[keys])
        labels = layer.contraction.labels
        mean = moved.mean(tuple(i for i, label in enumerate(labels) if label is None))
        order = [label for label in labels if label is not None]
        return mean.transpose(np.argsort(order))

    look = jax.jit(
        lambda params, changes, args: _visited(traced, params, args, partial(visit, changes))
    )
    total: dict[Keys, np.ndarray] = {}
    count = 0
    for batch in batches:
        found = look(params, changes, arguments(batch))
        total = {k: total.get(k, 0) + np.asarray(x, np.float64) for k, x in found.items()}
        count += 1
    return {keys: x / count for keys, x in total.items()}


def _wide(q: QTensor) -> Float[Array, "..."]:
    """As the integers stand for it, whatever the dtype of the parameter."""
    return q.values.astype(jnp.float32) * q.scale


def _result(layer: Layer, x: Array, kernel: Array) -> Float[Array, "..."]:
    """Of a contraction in float32, for another kernel in the shape of the leaf."""
    c = layer.contraction
    whole = moved_leaf(layer.kernel, kernel).astype(jnp.float32)
    operands = both(c, x.astype(jnp.float32), whole)
    return c.node.run(operands, preferred_element_type=np.dtype(np.float32))[0]


def adaround(
    traced: Traced,
    params: PyTree,
    batches: Iterable[Any],
    leaves: Mapping[Keys, Array],
    nearest: Mapping[Keys, QTensor],
) -> dict[Keys, QTensor]:
    """The kernels with each number rounded up or down so that the layer's result moves least.

    Source: Nagel et al. 2020, "Up or down?" (https://arxiv.org/abs/2004.10568).
    """
    args = arguments(next(iter(batches)))
    visit = lambda keys, layer, x: x
    reads = jax.jit(lambda params, args: _visited(traced, params, args, visit))(params, args)
    program = traced.plan(params, args)[0].program
    found = dict(nearest)
    for layer in program.layers:
        keys = program.view.leaves[layer.kernel.leaf]
        if layer.fixed and keys in nearest:
            x = _some(layer, reads.pop(keys), _ROWS)
            found[keys] = _learned(layer, x, leaves[keys], nearest[keys])
    return found


def _some(layer: Layer, x: Array, rows: int) -> Array:
    """The first rows of the data: of its batch, or of the first axis that is not summed over."""
    c = layer.contraction
    if c.node.name == "conv_general_dilated":
        axis = c.node.params["dimension_numbers"].lhs_spec[0]
    else:
        free = [i for i in range(x.ndim) if i not in c.places]
        axis = free[0] if free else None
    return x if axis is None else jax.lax.slice_in_dim(x, 0, min(rows, x.shape[axis]), axis=axis)


def _learned(layer: Layer, x: Array, w: Array, q: QTensor) -> QTensor:
    """One kernel; the layer is linear, so that only the change of its kernel counts."""
    wide = w.astype(jnp.float32) / q.scale
    low = jnp.floor(wide)
    share = jnp.clip(wide - low, 0.01, 0.99)
    import optax  # here alone: what loads quantized parameters needs none

    # Rectified sigmoid: it reaches 0 and 1, and starts at the fraction itself.
    start = jnp.log((share + 0.1) / (1.1 - share))
    size = jnp.mean(jnp.square(_result(layer, x, w))) + 1e-12
    optimizer = optax.adam(_RATE)

    def loss(v: Array, sharpness: Array) -> Array:
        up = jnp.clip(1.2 * jax.nn.sigmoid(v) - 0.1, 0, 1)
        change = (jnp.clip(low + up, -127, 127) - wide) * q.scale
        moved = jnp.mean(jnp.square(_result(layer, x, change)))
        undecided = jnp.mean(1 - jnp.abs(2 * up - 1) ** sharpness)
        return moved / size * 1e3 + _WEIGHT * undecided

    @jax.jit
    def step(v: Array, state: Any, sharpness: Array) -> tuple[Array, Any]:
        updates, state = optimizer.update(jax.grad(loss)(v, sharpness), state, v)
        return optax.apply_updates(v, updates), state  # pyright: ignore[reportReturnType]

    v, state = start, optimizer.init(start)
    for sharpness in np.geomspace(20, 2, _STEPS):
        v, state = step(v, state, jnp.float32(sharpness))
    values = jnp.clip(low + (v > 0), -127, 127).astype(jnp.int8)
    chosen = QTensor(values, q.scale, q.dtype)
    off = lambda one: jnp.mean(jnp.square(_result(layer, x, _wide(one) - w)))
    return chosen if off(chosen) < off(q) else q
