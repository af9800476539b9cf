"""Any JAX function as a graph that can be read, cut and run again.

The only file that touches jaxprs, and the only one that knows the versions of JAX apart. A graph
is a jaxpr whose every call has its own copy of the called body: a value or a node can be a key.
"""

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.core
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
from jax.extend import source_info_util
from jaxtyping import Array

Literal = jex.Literal
TUNED = "tuned_"  # before the name of the primitive that an op with a tuner stands for
EXPORTED = "call_exported"  # a function without a graph


class Value:
    """One traced array; `aval` has its shape, dtype, sharding and weak type."""

    __slots__ = ("aval",)

    def __init__(self, aval: Any) -> None:
        self.aval: Any = aval

    @property
    def shape(self) -> tuple[Any, ...]:
        return getattr(self.aval, "shape", ())


Atom: TypeAlias = Value | Literal


def shape_of(atom: Atom) -> tuple[Any, ...]:
    return atom.shape if isinstance(atom, Value) else np.shape(atom.val)


Body: TypeAlias = Callable[..., Sequence[Array]]
# run(node, operands) -> results, or None to have the node run as it was traced.
Rule: TypeAlias = Callable[["Node", list[Array]], Sequence[Array] | None]

# Primitives that call their body once, with their operands.
_CALLS = {
    "jit": "jaxpr",
    "closed_call": "call_jaxpr",
    "eval_jaxpr": "call_jaxpr",  # JAX 0.11's name for closed_call
    "remat2": "jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
}


@dataclass(eq=False, slots=True)
class Node:
    """One equation: `outputs` are `primitive` of `inputs` under the static `params`.

    An op that chooses its form is the op it stands for, with a `tuner`. `run` may be told to
    bind another primitive, or changed parameters.
    """

    name: str
    params: dict[str, Any]
    inputs: list[Atom]
    outputs: list[Value]
    run: Callable[..., list[Array]]
    bodies: tuple["Graph", ...] = ()
    info: Any = None
    effects: bool = False
    tuner: Any = None

    @property
    def source(self) -> str:
        """The line that made it: "models/net.py:31 (__call__)"."""
        return "" if self.info is None else source_of(self.info)


def source_of(info: Any) -> str:
    """The line that made an equation, from its source info."""
    place, _, function = source_info_util.summarize(info).partition(" ")
    path, *position = place.split(":")
    line = ":".join(["/".join(path.split("/")[-2:]), *position[:1]])
    return f"{line} {function}".strip()


@dataclass(eq=False, slots=True)
class Graph:
    """Nodes in the order they run, from `inputs` and `constants` to `outputs`."""

    inputs: list[Value]
    nodes: list[Node]
    outputs: list[Atom]
    constants: dict[Value, Any] = field(default_factory=dict)


def leaf_paths(tree: Any, root: str = "") -> dict[str, Any]:
    """``{"conv1/kernel": leaf}`` in tree order, below `root`."""
    found = {}
    for keys, leaf in leaves_with_keys(tree):
        path = "/".join(filter(None, (root, *keys)))
        if path in found:
            raise ValueError(f"{path}: the path of two leaves; rename a key that has a slash")
        found[path] = leaf
    return found


def leaves_with_keys(tree: Any) -> Iterator[tuple[list[str], Any]]:
    """In tree order; a Flax NNX variable is a leaf by its own name, not by that of its value."""
    nnx = sys.modules.get("flax.nnx")  # where it is not imported there are no variables
    variable = lambda node: nnx is not None and isinstance(node, nnx.Variable)
    for path, node in jax.tree_util.tree_leaves_with_path(tree, is_leaf=variable):
        for below, leaf in jax.tree_util.tree_leaves_with_path(node):
            keys = (*path, *(below[1:] if variable(node) else below))
            text = jax.tree_util.keystr(keys, simple=True, separator="/")
            yield [key for key in text.split("/") if key], leaf


def aval_of(path: str, leaf: Any) -> Any:
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return leaf
    if hasattr(leaf, "shape") and hasattr(leaf, "dtype") and hasattr(leaf, "update"):
        return leaf  # an aval already
    try:
        return jax.typeof(leaf)
    except TypeError:
        kind = f" of dtype {leaf.dtype}" if isinstance(leaf, np.ndarray) else ""
        raise TypeError(
            f"{path or 'params'}: expected an array, got {type(leaf).__name__}{kind}; "
            "fn takes pytrees of arrays (close over anything else)"
        ) from None


def graph_of(fn: Callable, *avals: Any) -> tuple[Graph, Any]:
    """The graph of ``fn(*avals)``, as it is traced, and the tree of its result."""
    closed, shapes = jax.make_jaxpr(fn, return_shape=True)(*avals)
    return _graph(closed), jax.tree.structure(shapes)


def _graph(closed: Any) -> Graph:
    """The graph of a jaxpr, with values and nodes of its own."""
    jaxpr = getattr(closed, "jaxpr", closed)
    values: dict[Any, Value] = {}

    def new(var: Any) -> Value:
        values[var] = Value(var.aval)
        return values[var]

    def read(atom: Any) -> Atom:
        return atom if isinstance(atom, Literal) else values[atom]

    consts = getattr(closed, "consts", ())
    constants = {new(v): c for v, c in zip(jaxpr.constvars, consts, strict=True)}
    inputs = [new(v) for v in jaxpr.invars]
    nodes = [
        _node(eqn, [read(v) for v in eqn.invars], [new(v) for v in eqn.outvars])
        for eqn in jaxpr.eqns
    ]
    return Graph(inputs, nodes, [read(v) for v in jaxpr.outvars], constants)


def _node(eqn: Any, inputs: list[Atom], outputs: list[Value]) -> Node:
    params = dict(eqn.params)
    tuner = params.pop("tuner", None) if eqn.primitive.name.startswith(TUNED) else None
    name = eqn.primitive.name.removeprefix(TUNED) if tuner else eqn.primitive.name

    def run(operands: Sequence[Array], other: Any = None, **changed: Any) -> list[Array]:
        primitive = other or eqn.primitive
        bound = primitive.get_bind_params((params if other else eqn.params) | changed)
        with ExitStack() as stack:
            _enter(eqn, stack)
            result = primitive.bind(*operands, **bound)
        return list(result) if primitive.multiple_results else [result]

    bodies = tuple(_graph(jaxpr) for jaxpr in _bodies(name, params))
    info, effects = eqn.source_info, bool(eqn.effects)
    return Node(name, params, inputs, outputs, run, bodies, info, effects, tuner)


def _enter(eqn: Any, stack: ExitStack) -> None:
    """What runs here is traced with the source line and scope of the original equation."""
    info = eqn.source_info
    names = source_info_util.current_name_stack() + info.name_stack
    stack.enter_context(source_info_util.user_context(info.traceback, name_stack=names))
    stack.enter_context(eqn.ctx.manager)


def _bodies(name: str, params: Mapping[str, Any]) -> Sequence[Any]:
    if name in _CALLS:
        return (params[_CALLS[name]],)
    if name == "scan":
        return (params["jaxpr"],)
    if name == "while":
        return (params["cond_jaxpr"], params["body_jaxpr"])
    return params["branches"] if name == "cond" else ()


def primitives(params: Mapping[str, Any]) -> Iterator[str]:
    """The names of what the jaxprs among the parameters of an equation hold, however deep."""
    for value in jax.tree.leaves(dict(params)):
        for eqn in getattr(getattr(value, "jaxpr", value), "eqns", ()):
            yield eqn.primitive.name
            yield from primitives(eqn.params)


def needed(graph: Graph, outputs: Sequence[Atom] | None = None) -> Graph:
    """The graph without dead code: what its outputs (or the given ones) and effects need."""
    outputs = graph.outputs if outputs is None else list(outputs)
    alive = set(values_of(outputs))
    nodes = []
    for node in reversed(graph.nodes):
        if node.effects or not alive.isdisjoint(node.outputs):
            nodes.append(node)
            alive.update(values_of(node.inputs))
    constants = {v: c for v, c in graph.constants.items() if v in alive}
    return Graph(graph.inputs, nodes[::-1], list(outputs), constants)


def values_of(atoms: Iterable[Atom]) -> list[Value]:
    return [atom for atom in atoms if isinstance(atom, Value)]


def run(graph: Graph, arguments: Sequence[Any], rule: Rule | None = None) -> list[Any]:
    """Runs the graph; where `rule` gives results, they stand for the node's own."""
    values: dict[Value, Any] = dict(graph.constants)
    values.update(zip(graph.inputs, arguments, strict=True))

    def read(atom: Atom) -> Any:
        return atom.val if isinstance(atom, Literal) else values[atom]

    for node in graph.nodes:
        operands = [read(atom) for atom in node.inputs]
        results = rule(node, operands) if rule else None
        results = node.run(operands) if results is None else results
        values.update(zip(node.outputs, results, strict=True))
    return [read(atom) for atom in graph.outputs]


def is_float(atom: Atom) -> bool:
    return jnp.issubdtype(atom.aval.dtype, jnp.inexact)  # pyright: ignore


class Loop(NamedTuple):
    """How many operands of a scan, a while or a cond are what."""

    consts: int = 0  # a while: those of its condition
    body_consts: int = 0  # a while only
    carry: int = 0


def loop(node: Node) -> Loop:
    """The split of the operands of a scan or while; JAX 0.10 and 0.11 store it differently."""
    if node.name == "while":
        consts, body_consts = node.params["cond_nconsts"], node.params["body_nconsts"]
        return Loop(consts, body_consts, len(node.inputs) - consts - body_consts)
    (body,) = node.bodies
    carry = _same_rank(node.outputs, body.outputs)
    scanned = len(node.inputs) - _same_rank(node.inputs, body.inputs)
    return Loop(len(node.inputs) - carry - scanned, 0, carry)


def _same_rank(outside: Iterable[Atom], inside: Iterable[Atom]) -> int:
    """How many values of a scan have no scanned axis; a scanned one has one rank more outside."""
    pairs = zip(outside, inside, strict=True)
    return sum(len(shape_of(a)) == len(shape_of(b)) for a, b in pairs)


def jvp_graph(node: Node, active: Sequence[int]) -> Graph:
    """The graph of ``(*operands, *tangents of the active operands) -> (*outputs, *tangents)``."""

    def jvp(*args: Any) -> Any:
        called, primals = _of_active(node, args[: len(node.inputs)], active)
        outputs, moved = jax.jvp(called, primals, args[len(node.inputs) :])
        return *outputs, *(t for t in moved if t.dtype != jax.dtypes.float0)

    avals = [atom.aval for atom in node.inputs]
    return graph_of(jvp, *avals, *(avals[i].to_tangent_aval() for i in active))[0]


def vjp_graph(node: Node, active: Sequence[int], results: Sequence[int]) -> Graph:
    """The graph of ``(*operands, *cotangents of the results) -> cotangents of the active``."""

    def vjp(*args: Any) -> Any:
        called, primals = _of_active(node, args[: len(node.inputs)], active)
        wanted = lambda *values: tuple(called(*values)[i] for i in results)
        return jax.vjp(wanted, *primals)[1](args[len(node.inputs) :])

    avals = [atom.aval for atom in node.inputs]
    outs = [node.outputs[i].aval.to_tangent_aval() for i in results]
    return graph_of(vjp, *avals, *outs)[0]


def _of_active(
    node: Node, operands: Sequence[Any], active: Sequence[int]
) -> tuple[Callable[..., tuple[Any, ...]], tuple[Any, ...]]:
    """The node as a function of its active operands, and these."""

    def called(*values: Any) -> tuple[Any, ...]:
        full = list(operands)
        for place, value in zip(active, values, strict=True):
            full[place] = value
        return tuple(node.run(full))

    return called, tuple(operands[i] for i in active)
