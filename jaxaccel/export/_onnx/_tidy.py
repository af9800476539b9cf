"""A model as engines like it: weights as initializers, biases where they belong, nothing unused."""

from collections import Counter
from collections.abc import Container, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from jaxaccel.export._onnx._converted import OWN, WEIGHT

_OUTPUTS = {"Conv": 0, "Gemm": 1}  # the axis of the kernel that is that of the results


def tidied(
    graph: Any,
    weights: Sequence[tuple[str, np.ndarray]],
    inputs: Sequence[Any],
    results: Sequence[Any],
) -> None:
    """Changes a graph in place.

    Args:
        graph: as jax2onnx made it.
        weights: names and arrays, for its first inputs; a name that is taken gets a number.
        inputs: what its other inputs are to be, whether it reads them or not.
        results: what its results are to be.
    """
    del graph.value_info[:]  # some are wrong once jax2onnx has moved a transpose
    _undo_domains(graph)
    _set_interface(graph, inputs, results)
    _add_weights(graph, weights)
    _Biases(graph).add()
    _drop_unused(graph)


def _undo_domains(graph: Any) -> None:
    for node in graph.node:
        node.domain = "" if node.domain == OWN else node.domain
        for inner in _inside(node):
            _undo_domains(inner)


def _set_interface(graph: Any, inputs: Sequence[Any], results: Sequence[Any]) -> None:
    made = {name: node for node in graph.node for name in node.output}
    found = [out.name for out in graph.output]
    for name, result in zip(found, results, strict=True):
        if name in made and found.count(name) == 1:
            made[name].output[:] = [result.name if x == name else x for x in made[name].output]
            _rename(graph, {name: result.name})
        else:  # an input, a weight or a result that has a name already
            graph.node.add(op_type="Identity", input=[name], output=[result.name])
    for field, infos in ((graph.input, inputs), (graph.output, results)):
        del field[:]
        field.extend(infos)


def _reads(graph: Any) -> Iterator[str]:
    """Every name that a graph reads, or a graph inside of it; and the results."""
    for node in graph.node:
        yield from node.input
        for inner in _inside(node):
            yield from _reads(inner)
    yield from (out.name for out in graph.output)


def _inside(node: Any) -> Iterator[Any]:
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def _add_weights(graph: Any, weights: Sequence[tuple[str, np.ndarray]]) -> None:
    """Equal arrays of one name, such as a kernel that is read twice, are one tensor."""
    from onnx import numpy_helper

    taken = {*_reads(graph), *(value.name for value in graph.input)}
    names: dict[str, str] = {}
    met: dict[str, list[tuple[str, np.ndarray]]] = {}
    for place, (name, array) in enumerate(weights):
        same = [found for found, other in met.get(name, ()) if _equal(array, other)]
        names[WEIGHT.format(place)] = found = same[0] if same else _free(name, taken)
        if not same:
            taken.add(found)
            met.setdefault(name, []).append((found, array))
            graph.initializer.append(numpy_helper.from_array(array, found))
    _rename(graph, names)


def _equal(one: np.ndarray, other: np.ndarray) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype and (
        one.tobytes() == other.tobytes()
    )  # fmt: skip


def _rename(graph: Any, names: Mapping[str, str]) -> None:
    for node in graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        for inner in _inside(node):
            _rename(inner, names)
            for out in inner.output:
                out.name = names.get(out.name, out.name)


def _drop_unused(graph: Any) -> None:
    read = set(_reads(graph))
    kept = [tensor for tensor in graph.initializer if tensor.name in read]
    del graph.initializer[:]
    graph.initializer.extend(kept)


class _Biases:
    """What is added behind a convolution or a product becomes its third operand."""

    def __init__(self, graph: Any) -> None:
        self.graph = graph
        self.tensors = {tensor.name: tensor for tensor in graph.initializer}
        self.vectors: dict[str, str] = {}
        self.uses = Counter(_reads(graph))
        self.makers = {name: node for node in graph.node for name in node.output}

    def add(self) -> None:
        kept = [node for node in self.graph.node if not self._joins(node)]
        del self.graph.node[:]
        self.graph.node.extend(kept)

    def _joins(self, node: Any) -> bool:
        """Whether the node is an addition, and was added to what is before it."""
        if node.op_type != "Add":
            return False
        for data, other in (node.input, node.input[::-1]):
            maker = self.makers.get(data)
            if maker is None or self.uses[data] > 1 or not self._fits(maker, other):
                continue
            maker.input.append(self._vector(other))
            maker.output[0] = node.output[0]
            self.makers[node.output[0]] = maker
            return True
        return False

    def _fits(self, maker: Any, name: str) -> bool:
        """Whether a tensor has one number for each output of a node that has no bias."""
        bias, axis = self.tensors.get(name), _OUTPUTS.get(maker.op_type)
        kernel = self._kernel(maker.input[1]) if axis is not None else None
        if bias is None or kernel is None or len(maker.input) > 2:
            return False
        place = 1 - len(kernel.dims) if axis == 0 else -1  # among the axes of the result
        sizes = [1] * len(kernel.dims)
        sizes[place] = kernel.dims[axis]
        return list(bias.dims) == sizes[len(sizes) - len(bias.dims) :] and len(bias.dims) >= -place

    def _kernel(self, name: str) -> Any:
        """The tensor, or that of the integers from which it is made."""
        made = self.makers.get(name)
        if made is not None and made.op_type == "DequantizeLinear":
            return self.tensors.get(made.input[0])
        return self.tensors.get(name)

    def _vector(self, name: str) -> str:
        """The tensor with one axis; under its own name, if nothing else reads it."""
        tensor = self.tensors[name]
        if name in self.vectors:
            return self.vectors[name]
        if self.uses[name] > 1:
            copied = self.graph.initializer.add()
            copied.CopyFrom(tensor)
            copied.name = _free(f"{name}/vector", self.tensors)
            self.tensors[copied.name] = tensor = copied
            self.vectors[name] = copied.name
        size = max(tensor.dims)
        del tensor.dims[:]
        tensor.dims.append(size)
        return tensor.name


def _free(name: str, taken: Container[str]) -> str:
    """The name, or with a number behind it."""
    found, count = name, 1
    while found in taken:
        found, count = f"{name}_{count}", count + 1
    return found
