"""Runs a function rounded as `int8` rounds it, and differentiates straight through the rounding."""

from collections.abc import Callable, Iterator, Sequence
from copy import copy
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxaccel._graph import Atom, Graph, Node, Value, run
from jaxaccel._rewritten import custom_jvp, custom_vjp, rerun
from jaxaccel.quantize._arithmetic import HIGHEST, LOWEST
from jaxaccel.quantize._layers import Bounds, Layer
from jaxaccel.quantize._plan import CUSTOM, LOOPS
from jaxaccel.quantize._program import Program, end_of, operands_of, stays_integer


def rounded(
    x: Float[Array, "..."],
    scale: Float[Array, "..."],
    low: int,
    high: int,
    terms: int,
    nearest: Callable[[Array], Array] = jnp.round,
) -> Float[Array, "..."]:
    """``clip(round(x / scale), low, high) * scale``, straight through the rounding.

    The gradient of the scale is that of `terms` numbers, and is brought to that of one weight.
    """
    share, fixed = 1 / np.sqrt(terms * 127), jax.lax.stop_gradient(scale)
    scale = fixed + (scale - fixed) * share  # exactly what it was
    # The largest weight of a channel lies on the bound.
    steps = _clipped(x.astype(jnp.float32) / scale, low, high)
    steps = steps + jax.lax.stop_gradient(nearest(steps) - steps)
    return (steps * scale).astype(x.dtype)


def _clipped(x: Float[Array, "..."], low: float, high: float) -> Float[Array, "..."]:
    """With a gradient of one on the bounds, where that of `jnp.clip` is a half."""
    inside = (x >= low) & (x <= high)
    return jnp.where(inside, x, jnp.clip(jax.lax.stop_gradient(x), low, high))


def _halves_up(x: Float[Array, "..."]) -> Float[Array, "..."]:
    return jnp.floor(x + 0.5)


class Rounded:
    """A graph, with those values rounded to their grids that are in 8 bits of `int8`.

    A function with a derivative of its own keeps it: the rounding of its results comes behind it.
    What else is rounded in it does not change that derivative, so that its steps have none.
    """

    def __init__(
        self, program: Program, graph: Graph, grids: Sequence[tuple[Array, int]], power: bool
    ) -> None:
        self.program, self.graph, self.grids, self.power = program, graph, grids, power
        steps = [step for step in program.steps.values() if stays_integer(step)]
        self.ends = {end_of(s): s for s in steps if end_of(s) in program.integers}
        self.behind: dict[Value, Value] = {}  # results of such functions: what they are inside
        self._find(graph)
        self.inside = self.ends.keys() - {*self.behind.values()}
        self.rounded = self.inside | self.behind.keys()

    def __call__(self, *arguments: Any) -> list[Any]:
        """The results."""
        return self._run(self.graph, arguments)

    def _find(self, graph: Graph) -> None:
        readers, found = self.program.view.readers, {*self.behind.values()}
        for node in graph.nodes:
            if node.name in LOOPS or not node.bodies:
                continue
            (body,) = node.bodies
            if node.name in CUSTOM:
                own = {value for inner in _deep(body) for value in inner.outputs}
                for out, atom in zip(node.outputs, body.outputs, strict=True):
                    value = _made(body, atom)
                    last = all(own.isdisjoint(r.outputs) for r in readers.get(value, []))
                    if value in self.ends and value not in found and last:
                        self.behind[out] = value
            self._find(body)

    def _run(self, graph: Graph, arguments: Sequence[Any]) -> list[Any]:
        values: dict[Value, Any] = dict(graph.constants)
        values.update(zip(graph.inputs, arguments, strict=True))
        read = lambda atom: values[atom] if isinstance(atom, Value) else atom.val
        for node in graph.nodes:
            results = self._results(node, self._read(node, [read(atom) for atom in node.inputs]))
            values.update(
                (value, self._end(value, x)) for value, x in zip(node.outputs, results, strict=True)
            )
        return [read(atom) for atom in graph.outputs]

    def _flat(self, node: Node) -> Node | None:
        """The node as the program has it; none for a call."""
        return self.program.view.makers.get(node.outputs[0]) if node.outputs else None

    def _rounds(self, node: Node) -> list[int]:
        """The places of the operands that are rounded as they are read."""
        flat = self._flat(node)
        step = None if flat is None else self.program.steps.get(flat)
        if flat is None or step is None or not self.program.runs(step):
            return []
        held = [x for x in operands_of(step) if x in self.program.integers and x not in self.ends]
        return [place for place, atom in enumerate(flat.inputs) if atom in held]

    def _read(self, node: Node, operands: list[Any]) -> list[Any]:
        for place in self._rounds(node):
            flat = self._flat(node)
            assert flat is not None
            operands[place] = self._on_grid(flat.inputs[place], operands[place], jnp.round)
        return operands

    def _end(self, value: Value, x: Any) -> Any:
        """A result of a node, rounded, halves as `int8` does there."""
        end = self.behind.get(value, value if value in self.inside else None)
        if end is None:
            return x
        shifted = self.power or not isinstance(self.ends[end], Layer)
        return self._on_grid(end, x, _halves_up if shifted else jnp.round)

    def _on_grid(self, value: Any, x: Array, nearest: Callable[[Array], Array]) -> Array:
        scale, zero = self.grids[self.program.integers[value]]
        x = _clipped(x, *self.program.bounds.get(value, Bounds()))
        return rounded(x, scale, LOWEST - zero, HIGHEST - zero, prod(x.shape[1:]), nearest)

    def _touches(self, node: Node) -> bool:
        """Whether something is rounded inside of a call or a loop."""
        if node.name in LOOPS:
            flat = self._flat(node)
            bodies = () if flat is None else self.program.bodies.get(flat, ())
            return any(one.steps for body in bodies for one in body.all)
        return any(
            self._rounds(inner)
            or not self.rounded.isdisjoint(inner.outputs)
            or self._touches(inner)
            for body in node.bodies
            for inner in body.nodes
        )

    def _results(self, node: Node, operands: list[Any]) -> Sequence[Any]:
        if not self._touches(node):
            return node.run(operands)
        if node.name in LOOPS:
            return self._loop(node, operands)
        (graph,) = node.bodies
        if node.name in CUSTOM:
            return self._custom(node, operands)
        if node.name == "remat2":
            return rerun(node, operands, [lambda *args: self._run(graph, args)])
        return self._run(graph, operands)

    def _loop(self, node: Node, operands: list[Any]) -> list[Any]:
        flat, graphs = self._flat(node), list(node.bodies)
        assert flat is not None
        first = [graphs.pop(0)] if node.name == "while" else []
        called: list[Callable[..., list[Any]]] = [
            lambda *args, graph=graph: run(graph, args) for graph in first
        ]
        called += [
            Rounded(program, graph, self.grids, self.power)
            for program, graph in zip(self.program.bodies[flat], graphs, strict=True)
        ]
        return rerun(node, operands, called)

    def _custom(self, node: Node, operands: list[Any]) -> list[Any]:
        held = copy(self)
        held.grids = [(jax.lax.stop_gradient(scale), zero) for scale, zero in self.grids]
        body = lambda *args: held._run(node.bodies[0], args)
        if node.name == "custom_vjp_call":
            return custom_vjp(node, operands, body, run)

        def derivative(graph: Graph, arguments: Sequence[Any]) -> list[Any]:
            moved = run(graph, arguments)[len(node.outputs) :]
            return [*body(*arguments[: len(node.inputs)]), *moved]

        return custom_jvp(node, operands, body, derivative)


def _deep(graph: Graph) -> Iterator[Node]:
    for node in graph.nodes:
        yield node
        for body in node.bodies:
            yield from _deep(body)


def _made(graph: Graph, atom: Atom) -> Any:
    """The value inside of the calls that make it."""
    for node in graph.nodes:
        if node.bodies and node.name not in LOOPS and atom in node.outputs:
            (body,) = node.bodies
            return _made(body, body.outputs[node.outputs.index(atom)])  # pyright: ignore
    return atom
