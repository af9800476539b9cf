"""A lowered graph as a model of ONNX, by jax2onnx, of which only the primitives of lax are used."""

import importlib
import logging
import pkgutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from traceback import walk_tb
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxaccel._graph import Graph, Node, Value, run, source_of
from jaxaccel.export._onnx._ops import OPERATION

# Of which onnxruntime has no kernel yet, or of which it has one in newer opsets alone.
_TOO_NEW = ("bitcast_convert_type", "cumprod", "fft")
WEIGHT = "jaxaccel_weight_{}"
OWN = (
    "jaxaccel"  # the domain of our operations while jax2onnx, which removes some wrongly, has them
)
_PLUGINS = ("jax2onnx.plugins.jax.lax", "jax2onnx.plugins.jax.core")


def check_installed() -> None:
    """Raises an ImportError that says what to install."""
    for name in ("onnx", "jax2onnx"):
        try:
            with _silent():
                importlib.import_module(name)
        except ImportError as error:
            raise ImportError(
                f"jx.export.onnx needs {name}: pip install 'jaxaccel[export]'"
            ) from error


@cache
def _primitives() -> Any:
    """The registry of jax2onnx, with the plugins of lax and our own.

    All of its plugins would take 8 s to import, and would replace `jax.numpy.cumsum` for good.
    """
    with _silent():
        for name in _PLUGINS:
            package = importlib.import_module(name)
            for module in pkgutil.iter_modules(package.__path__, f"{name}."):
                importlib.import_module(module.name)
        from jax2onnx.plugins.plugin_system import PLUGIN_REGISTRY

        _register()
    return PLUGIN_REGISTRY


def _register() -> None:
    from jax2onnx.plugins.plugin_system import PrimitiveLeafPlugin, register_primitive

    class Operation(PrimitiveLeafPlugin):
        def lower(self, ctx: Any, eqn: Any) -> None:
            _write(ctx, eqn)

    register_primitive(jaxpr_primitive=OPERATION, component=OPERATION)(Operation)


def _write(ctx: Any, eqn: Any) -> None:
    """One operation of our own, as a node."""
    import onnx_ir as ir

    params, (out,) = eqn.params, eqn.outvars
    arrays = map(ctx.get_value_for_var, eqn.invars)
    inputs = [next(arrays) if sizes is None else _sizes(ctx, sizes) for sizes in params["inputs"]]
    made = getattr(ctx.builder, params["name"])(
        *inputs, _outputs=[ctx.fresh_name(params["name"])], **dict(params["attributes"])
    )
    made.producer().domain = OWN
    made.type = ir.TensorType(ir.DataType.from_numpy(np.dtype(out.aval.dtype)))
    made.shape = ir.Shape([n if type(n) is int else str(n) for n in out.aval.shape])
    ctx.bind_value_for_var(out, made)


def _sizes(ctx: Any, sizes: Sequence[int]) -> Any:
    array = np.asarray(sizes, np.int64)
    return ctx.builder.add_initializer_from_array(name=ctx.fresh_name("sizes"), array=array)


@contextmanager
def _silent() -> Iterator[None]:
    """Neither warnings of what is imported, nor a handler that logging would leave behind."""
    root, quiet = logging.getLogger(), logging.NullHandler()
    root.addHandler(quiet)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        root.removeHandler(quiet)


@contextmanager
def _only_lax() -> Iterator[None]:
    """jax2onnx does not import the rest of its plugins."""
    from jax2onnx.plugins import plugin_system as system

    before = system._already_imported_plugins
    system._already_imported_plugins = True
    try:
        yield
    finally:
        system._already_imported_plugins = before


def check_supported(node: Node) -> None:
    """Raises where a node cannot be written.

    Raises:
        NotImplementedError: the message names it, and the line that made it.
    """
    where = at(node.name, node.source)
    if node.name not in _primitives() or node.name in _TOO_NEW:
        raise NotImplementedError(f"{where}: cannot be written for ONNX; {_FIX}")


def check_dtypes(node: Node) -> None:
    """Raises where engines have no kernels.

    Raises:
        NotImplementedError: the message names the node, and the line that made it.
    """
    if any(getattr(out.aval, "dtype", None) == jnp.bfloat16 for out in node.outputs):
        raise NotImplementedError(
            f"{at(node.name, node.source)}: is of bfloat16, which engines do not compute in by "
            "ONNX; cast parameters and arguments to float32 or float16"
        )


def at(name: str, source: str) -> str:
    """How an error names a primitive, and the line that made it if that is known."""
    return f"{name} ({source})" if source else name


_FIX = "leave it out of fn, or write it in terms of other operations"


def converted(
    graph: Graph,
    weights: Sequence[Value],
    inputs: Mapping[str, Any],
    opset: int,
) -> Any:
    """The model of a lowered graph; some of its constants are inputs of it, as `WEIGHT` names them.

    Raises:
        NotImplementedError: for a primitive that cannot be written.
    """
    import jax2onnx

    _primitives()

    def flat(*arrays: Any) -> list[Any]:
        given = dict(zip(weights, arrays, strict=False))
        return run(replace(graph, constants=graph.constants | given), arrays[len(weights) :])

    arrays = [graph.constants[value] for value in weights]
    specs = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (*arrays, *inputs.values())]
    names = [*(WEIGHT.format(i) for i in range(len(weights))), *inputs]
    with _silent(), _only_lax():
        try:
            return jax2onnx.to_onnx(flat, specs, opset=opset, input_names=names)
        except Exception as error:
            raise _refusal(error) from error


def _refusal(error: Exception) -> Exception:
    """What jax2onnx says, with the primitive and the line where it stands."""
    found = [frame.f_locals.get("eqn") for frame, _ in walk_tb(error.__traceback__)]
    found = [eqn for eqn in found if hasattr(eqn, "primitive") and hasattr(eqn, "source_info")]
    if not found or isinstance(error, jax.errors.InconclusiveDimensionOperation):
        return error
    eqn: Any = found[-1]
    where = at(eqn.primitive.name, source_of(eqn.source_info))
    return NotImplementedError(f"{where}: jax2onnx cannot write it: {first_line(error)}; {_FIX}")


def first_line(error: Exception) -> str:
    """What an error says, in short."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0] if text else ''}"


def only_example(why: str) -> str:
    """The error for a function that is not for every batch size."""
    return (
        f"fn works for the example but not for every batch size: {why}; pass batch_axes=None to "
        "export it for the sizes of the example alone"
    )
