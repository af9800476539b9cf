"""Slices, where jax.numpy gathers: what ``x[:, ::2]`` is traced to while a size is a symbol."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import lax

from jaxaccel._graph import Atom, Graph, Node, Value, graph_of, needed, run, shape_of, values_of


class Sliced(NamedTuple):
    """A graph, and the nodes in it that are slices now."""

    graph: Graph
    made: set[Node]


def sliced(graph: Graph) -> Sliced:
    """The graph with slices for gathers whose indices are known and evenly spaced.

    A call runs as it was traced: only who goes into its body meets the slices there.
    """
    nodes: list[Node] = []
    made, known = set[Node](), set(graph.constants)
    for node in graph.nodes:
        bodies = [sliced(body) for body in node.bodies]
        found = _slices(graph, node, known)
        sized = node.effects or node.name == "dim_as_value"  # which no inputs tell
        if not sized and known.issuperset(values_of(node.inputs)):
            known.update(node.outputs)
        if any(body.made for body in bodies):
            node = replace(node, bodies=tuple(body.graph for body in bodies))
        nodes += found or [node]
        made.update(found, *(body.made for body in bodies))
    return Sliced(replace(graph, nodes=nodes), made)


def _slices(graph: Graph, node: Node, known: set[Value]) -> list[Node]:
    """The nodes for a gather of a symbolic shape; none for others."""
    if node.name != "gather" or not is_symbolic(shape_of(node.inputs[0])):
        return []
    operand, indices = node.inputs
    if not known.issuperset(values_of([indices])) or is_symbolic(shape_of(indices)):
        return []
    window = _window(shape_of(operand), _numbers(graph, indices), node.params)
    return [] if window is None else _spliced(window, operand, node)


def check_sizes(graph: Graph) -> None:
    """Raises a ValueError for a reshape that only some sizes allow, which JAX leaves for later."""
    for node in graph.nodes:
        if node.name == "reshape":
            before, shape = shape_of(node.inputs[0]), node.outputs[0].shape
            if is_symbolic(before) and prod(before) != prod(shape):
                raise ValueError(f"reshape ({node.source}) makes {before} {shape}")
        for body in node.bodies:
            check_sizes(body)


def is_symbolic(shape: Sequence[Any]) -> bool:
    """Whether one of the sizes is no number."""
    return any(type(size) is not int for size in shape)


def _numbers(graph: Graph, indices: Atom) -> np.ndarray:
    alone = needed(Graph([], graph.nodes, [indices], graph.constants))
    with jax.ensure_compile_time_eval():
        return np.asarray(run(alone, [])[0])


class _Window(NamedTuple):
    """What a slice cuts out, and which of its axes go."""

    starts: list[Any]
    limits: list[Any]
    strides: list[int]
    squeezed: list[int]


def _window(shape: Sequence[Any], indices: np.ndarray, params: Mapping[str, Any]) -> _Window | None:
    """None where the gather is no slice, or has its axes in another order."""
    numbers, sizes = params["dimension_numbers"], params["slice_sizes"]
    rank = indices.ndim - 1 + len(numbers.offset_dims)
    along = [axis for axis in range(rank) if axis not in numbers.offset_dims]
    whole = [axis for axis in range(len(shape)) if axis not in numbers.collapsed_slice_dims]
    place = dict(zip(whole, numbers.offset_dims, strict=False))  # in the result, by axis
    found = _Window([0] * len(shape), list(sizes), [1] * len(shape), [])
    for column, axis in enumerate(numbers.start_index_map):
        steps = _steps(indices[..., column])
        if steps is None or is_symbolic((shape[axis], sizes[axis])):
            return None
        first, last, stride, walked = steps
        if first < 0 or last + sizes[axis] > shape[axis] or (walked is not None and axis in place):
            return None
        if walked is not None:
            place[axis] = along[walked]
        found.starts[axis], found.limits[axis] = first, last + sizes[axis]
        found.strides[axis] = stride
    kept = sorted(place)
    found.squeezed.extend(axis for axis in range(len(shape)) if axis not in place)
    in_order = [place[axis] for axis in kept] == list(range(rank))
    return found if in_order and not numbers.operand_batching_dims else None


def _steps(column: np.ndarray) -> tuple[int, int, int, int | None] | None:
    """First and last index, what lies between two, and along which axis; None where uneven."""
    column = column.astype(np.int64)  # of unsigned ones differences would wrap
    varying = [k for k in range(column.ndim) if np.ptp(column, axis=k).any()]
    first, last = int(column.min()), int(column.max())
    if not varying:
        return first, last, 1, None
    (axis, *others) = varying
    line = np.moveaxis(column, axis, -1).reshape(-1, column.shape[axis])[0]
    stride = int(line[1] - line[0])
    if others or stride < 1 or (np.diff(line) != stride).any():
        return None
    return first, last, stride, axis


def _spliced(window: _Window, operand: Atom, node: Node) -> list[Node]:
    """The slice in the gather's place."""
    starts, limits, strides, squeezed = window
    cut = lambda x: lax.squeeze(lax.slice(x, starts, limits, strides), squeezed)
    graph, _ = graph_of(cut, operand.aval)  # pyright: ignore
    own = {graph.inputs[0]: operand, graph.outputs[0]: node.outputs[0]}
    return [
        replace(
            one,
            inputs=[own.get(x, x) for x in one.inputs],  # pyright: ignore
            outputs=[own.get(x, x) for x in one.outputs],  # pyright: ignore
            info=node.info,
        )
        for one in graph.nodes
    ]
