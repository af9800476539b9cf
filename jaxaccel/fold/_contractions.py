"""Where the channels of a convolution or a dot product stand in its operands and its result."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array

from jaxaccel._graph import Node, Value
from jaxaccel.fold._view import Labels, View


class Contraction(NamedTuple):
    """A node linear in `data` and in `kernel`; output channel j is axis `outs[j]` of the kernel.

    Input channel k is axis `ins[k]` of the kernel and axis `places[k]` of the data.
    """

    node: Node
    data: Value
    kernel: Value
    labels: Labels  # of the result: the output channels
    outs: tuple[int, ...]
    places: tuple[int, ...]
    ins: tuple[int, ...]
    groups: int = 1
    padded: bool = False

    @property
    def sizes(self) -> tuple[Any, ...]:
        return tuple(self.kernel.shape[axis] for axis in self.outs)


def contraction(view: View, node: Node) -> Contraction | None:
    """The node as a contraction of data with a kernel that depends on parameters alone."""
    if node.name not in ("conv_general_dilated", "dot_general"):
        return None
    first, second = node.inputs
    if not isinstance(first, Value) or not isinstance(second, Value):
        return None
    if node.name == "conv_general_dilated":
        known = view.knows(second) and not view.knows(first)
        return _conv(node, first, second) if known else None
    if view.knows(first) == view.knows(second):
        return None
    return _dot(node, 0 if view.knows(first) else 1)


def _conv(node: Node, data: Value, kernel: Value) -> Contraction:
    numbers, p = node.params["dimension_numbers"], node.params
    padded = any(any(pair) for pair in p["padding"]) or any(d != 1 for d in p["lhs_dilation"])
    labels = tuple(0 if i == numbers.out_spec[1] else None for i in range(len(data.shape)))
    # With several batch groups an input channel meets only a part of the outputs.
    whole = 2 if p["batch_group_count"] == 1 else 1
    outs, ins, places = numbers.rhs_spec[:1], numbers.rhs_spec[1:whole], numbers.lhs_spec[1:whole]
    groups = p["feature_group_count"]
    return Contraction(node, data, kernel, labels, outs, places, ins, groups, padded)


def _dot(node: Node, side: int) -> Contraction:
    contracted, batch = node.params["dimension_numbers"]
    kernel, data = node.inputs[side], node.inputs[1 - side]
    assert isinstance(kernel, Value)
    assert isinstance(data, Value)
    bound = {*contracted[side], *batch[side]}
    free = tuple(i for i in range(len(kernel.shape)) if i not in bound)
    others = (None,) * (len(data.shape) - len(bound))
    own = tuple(range(len(batch[side]), len(batch[side]) + len(free)))
    both = (*own, *others) if side == 0 else (*others, *own)
    return Contraction(
        node,
        data,
        kernel,
        (*range(len(batch[side])), *both),
        (*batch[side], *free),
        (*batch[1 - side], *contracted[1 - side]),
        (*batch[side], *contracted[side]),
    )


def spread(x: Array, places: tuple[int, ...], rank: int) -> Array:
    """`x` with its axes at `places` of an array that has size 1 along all others."""
    order = sorted(range(len(places)), key=places.__getitem__)
    x = x if order == list(range(len(places))) else x.transpose(order)
    sizes = dict(zip(sorted(places), x.shape, strict=True))
    return x.reshape([sizes.get(axis, 1) for axis in range(rank)])


def over_outputs(c: Contraction, x: Array) -> Array:
    """A coefficient per output channel, to be multiplied with the kernel."""
    return spread(jnp.broadcast_to(x, c.sizes), c.outs, len(c.kernel.shape))


def over_inputs(c: Contraction, x: Array) -> Array:
    """A coefficient per input channel, to be multiplied with the kernel."""
    rank = len(c.kernel.shape)
    x = jnp.broadcast_to(x, [c.data.shape[place] for place in c.places])
    if c.groups == 1:
        return spread(x, c.ins, rank)
    outputs = c.sizes[0]
    per_output = jnp.repeat(x.reshape(c.groups, -1), outputs // c.groups, axis=0)
    return spread(per_output, (*c.outs, *c.ins), rank)


def response(c: Contraction, kernel: Array, x: Array) -> Array:
    """The result, per output channel, where the data is `x` per input channel."""
    products = jnp.moveaxis(kernel * over_inputs(c, x), c.outs, range(len(c.outs)))
    return products.reshape(*products.shape[: len(c.outs)], -1).sum(-1)
