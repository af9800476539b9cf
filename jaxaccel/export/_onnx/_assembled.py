"""A lowered graph as a checked model: its names, its inputs and results, its weights."""

from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from typing import Any

import jax.dtypes
import jax.numpy as jnp
import numpy as np

from jaxaccel._graph import Graph, Value, values_of
from jaxaccel.export._onnx._converted import converted, first_line
from jaxaccel.export._onnx._lowered import Lowered
from jaxaccel.export._onnx._ops import OPERATION
from jaxaccel.export._onnx._tidy import tidied

_LARGEST = 2**31 - 2**24  # what protobuf can hold, with room for the nodes
_IR_VERSION = 10  # which onnxruntime reads since 1.18


def assembled(made: Lowered, inputs: Mapping[str, Any], results: Sequence[str], opset: int) -> Any:
    """The model.

    Args:
        made: the graph.
        inputs: its arguments by their names, as shapes.
        results: the names of its outputs.
        opset: of ONNX.

    Raises:
        NotImplementedError: for a primitive that cannot be written.
        ValueError: it would be too large, or onnx finds something wrong with it.
    """
    weights = list(_weights(made.graph))
    arrays = [np.asarray(made.graph.constants[value]) for value in weights]
    size = sum(array.nbytes for array in arrays)
    if size > _LARGEST:
        raise ValueError(
            f"params: {size:,} bytes, and a file of ONNX holds at most 2 GiB; make them smaller, "
            "by jx.prune or jx.quantize.int8"
        )
    model = converted(made.graph, weights, inputs, opset)
    names = [made.names.get(value, "constant") for value in weights]
    outputs = [atom.aval for atom in made.graph.outputs]  # pyright: ignore
    tidied(
        model.graph,
        list(zip(names, arrays, strict=True)),
        [_info(name, aval) for name, aval in inputs.items()],
        [_info(name, aval) for name, aval in zip(results, outputs, strict=True)],
    )
    model.ir_version, model.producer_name = _IR_VERSION, "jaxaccel"
    model.producer_version = version("jaxaccel")
    return _checked(model, opset)


def _info(name: str, aval: Any) -> Any:
    from onnx import helper

    sizes = [size if type(size) is int else str(size) for size in aval.shape]
    return helper.make_tensor_value_info(
        name, helper.np_dtype_to_tensor_dtype(np.dtype(aval.dtype)), sizes
    )


def _checked(model: Any, opset: int) -> Any:
    import onnx

    try:
        onnx.checker.check_model(model, full_check=True)
    except Exception as error:  # onnx has three kinds, of no common class of its own
        raise ValueError(
            f"fn: onnx does not accept what jax2onnx made of it: {first_line(error)}; a newer "
            f"opset than {opset} may have it"
        ) from error
    return model


def _weights(graph: Graph) -> Iterator[Value]:
    """The constants but for indices, by which jax2onnx decides what to write."""
    shown = {v for node in graph.nodes if node.name != OPERATION for v in values_of(node.inputs)}
    for value, array in graph.constants.items():
        dtype = jnp.result_type(array)
        key = jnp.issubdtype(dtype, jax.dtypes.prng_key)
        index = dtype.name in ("bool", "int32", "uint32") and value in shown
        if np.ndim(array) and not key and not index:
            yield value
