"""A graph without what parameters alone decide: computed now, and named after them."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxaccel._dataflow import evaluate, flatten, shuffles
from jaxaccel._graph import Graph, Node, Value, values_of
from jaxaccel._slices import is_symbolic
from jaxaccel.export._onnx._grids import SCALED, scaled
from jaxaccel.export._onnx._moved import Constant
from jaxaccel.export._onnx._ops import NAMED, OPERATION

CUSTOM = ("custom_jvp_call", "custom_vjp_call")
_UNNAMED = "constant"


def settled(graph: Graph, params: Mapping[Value, tuple[str, Any]]) -> Graph:
    """The graph of the other inputs: calls inlined, constants computed, held as `Constant`.

    Args:
        graph: any.
        params: of those inputs that are fixed, the name and the array.
    """
    graph = _with_kernels(shuffles(flatten(_placed(graph), CUSTOM)), params)
    sources = {value: name for value, (name, _) in params.items()}
    sources |= dict.fromkeys(graph.constants, _UNNAMED)
    for node in graph.nodes:
        read = values_of(node.inputs)
        if _computable(node) and all(value in sources for value in read):
            found = [sources[value] for value in read if sources[value] != _UNNAMED]
            sources |= dict.fromkeys(node.outputs, found[0] if found else _UNNAMED)
    rest = [node for node in graph.nodes if any(value not in sources for value in node.outputs)]
    wanted = {value for node in rest for value in values_of(node.inputs)}
    wanted |= set(values_of(graph.outputs))
    arrays = _arrays(graph, params, [value for value in sources if value in wanted])
    constants = {value: _constant(array, sources[value]) for value, array in arrays.items()}
    free = [value for value in graph.inputs if value not in params]
    return replace(graph, inputs=free, nodes=rest, constants=constants)


def _placed(graph: Graph, outer: Any = None) -> Graph:
    """Where a line is not known, as inside of what JAX has compiled before, that of the call."""
    nodes = []
    for node in graph.nodes:
        info = node.info if node.source else outer
        bodies = tuple(_placed(body, info) for body in node.bodies)
        nodes.append(replace(node, info=info, bodies=bodies))
    return replace(graph, nodes=nodes)


def _with_kernels(graph: Graph, params: Mapping[Value, Any]) -> Graph:
    """Where integers with a scale are the kernels of convolutions and products: as one node."""
    integers = {}
    elsewhere = set(values_of(graph.outputs))
    for node in graph.nodes:
        source = node.inputs[0] if node.name == "convert_element_type" else None
        if isinstance(source, Value) and source in params and source.aval.dtype == np.int8:
            integers[node.outputs[0]] = source
        read = values_of(node.inputs)
        if node.name != "conv_general_dilated":  # of which the kernel is not reshaped
            matrices = node.name == "dot_general"
            elsewhere.update(v for v in read if not (matrices and len(v.shape) == 2))

    def kept(node: Node) -> Node:
        if node.name != "mul" or node.outputs[0] in elsewhere or node.inputs[0] not in integers:
            return node
        inputs = [integers[node.inputs[0]], node.inputs[1]]
        run = lambda operands: [scaled(*operands)]
        return replace(node, name=SCALED, inputs=inputs, run=run) if inputs[1] in params else node

    return replace(graph, nodes=list(map(kept, graph.nodes)))


def _computable(node: Node) -> bool:
    """Whether it can be computed now: what is written as an operation of ONNX stays one."""
    symbolic = any(is_symbolic(out.shape) for out in node.outputs)
    return not (symbolic or node.effects or node.name in (OPERATION, NAMED, SCALED, "dim_as_value"))


def _arrays(
    graph: Graph, params: Mapping[Value, tuple[str, Any]], wanted: Sequence[Value]
) -> dict[Value, Any]:
    given = {value: array for value, (_, array) in params.items()}
    found = {value: given.get(value, graph.constants.get(value)) for value in wanted}
    left = [value for value in wanted if found[value] is None]
    if left:
        found |= dict(zip(left, evaluate(graph, given, left), strict=True))
    return found


def _constant(array: Any, name: str) -> Any:
    """A random key, of which ONNX knows nothing, stays what it is."""
    if jnp.issubdtype(jnp.result_type(array), jax.dtypes.prng_key):
        return array
    return Constant(np.asarray(array), name)
