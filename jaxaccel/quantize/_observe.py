"""What the values of a program range over: collected as it runs on real batches.

Nothing but a few numbers for each grid is kept. In loops they are carried along and out.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Int32

from jaxaccel._graph import Node, Value, loop, run
from jaxaccel._rewritten import rerun
from jaxaccel.quantize._layers import Bounds
from jaxaccel.quantize._program import Program

BINS = 2048


class Range(NamedTuple):
    """The smallest and the largest number, and whether all were finite."""

    low: Float32[Array, ""]
    high: Float32[Array, ""]
    finite: Bool[Array, ""]


class Counts(NamedTuple):
    """How many numbers lie in each of `BINS` equal parts of a range."""

    counts: Int32[Array, "bins"]


Seen: TypeAlias = dict[int, Any]


def ranges(program: Program, arguments: Sequence[Any]) -> tuple[list[Array], Seen]:
    """The outputs, and the `Range` of each grid."""
    nothing = Range(jnp.float32(jnp.inf), jnp.float32(-jnp.inf), jnp.bool_(True))
    return _Observer(_range, _wider, lambda grid: nothing).outputs(program, arguments)


def histograms(
    program: Program, arguments: Sequence[Any], limits: Mapping[int, tuple[float, float]]
) -> tuple[list[Array], Seen]:
    """The outputs, and the `Counts` of each grid within its limits."""
    nothing = Counts(jnp.zeros(BINS, jnp.int32))
    count = lambda grid, x: _counts(x, *limits[grid])
    add = lambda a, b: jax.tree.map(jnp.add, a, b)
    return _Observer(count, add, lambda grid: nothing).outputs(program, arguments)


def _range(grid: int, x: Array) -> Range:
    wide = x.astype(jnp.float32)
    finite = jnp.isfinite(wide).all()
    return Range(jnp.min(wide, initial=jnp.inf), jnp.max(wide, initial=-jnp.inf), finite)


def _wider(a: Range, b: Range) -> Range:
    return Range(
        jnp.minimum(a.low, b.low), jnp.maximum(a.high, b.high), jnp.logical_and(a.finite, b.finite)
    )


def _counts(x: Array, low: float, high: float) -> Counts:
    share = (x.astype(jnp.float32).ravel() - low) * (BINS / (high - low) if high > low else 0.0)
    places = jnp.clip(share.astype(jnp.int32), 0, BINS - 1)
    return Counts(jnp.zeros(BINS, jnp.int32).at[places].add(1))


class _Observer:
    """Runs programs as they were traced; `see` looks at a value of a grid."""

    def __init__(
        self,
        see: Callable[[int, Array], Any],
        merge: Callable[[Any, Any], Any],
        nothing: Callable[[int], Any],
    ) -> None:
        self._see, self._merge, self._nothing = see, merge, nothing

    def outputs(self, program: Program, arguments: Sequence[Any]) -> tuple[list[Array], Seen]:
        seen = self._empty(program)

        def note(value: Value, x: Array) -> None:
            grid = program.watched.get(value)
            if grid is not None:
                x = jnp.clip(x, *program.bounds.get(value, Bounds()))
                seen[grid] = self._merge(seen[grid], self._see(grid, x))

        def rule(node: Node, operands: list[Array]) -> Sequence[Array]:
            if node in program.bodies:
                results, inner = self._entered(program, node, operands)
                seen.update({grid: self._merge(seen[grid], x) for grid, x in inner.items()})
            else:
                results = node.run(operands)
            for value, x in zip(node.outputs, results, strict=True):
                note(value, x)
            return results

        graph = program.view.graph
        for value, x in zip(graph.inputs, arguments, strict=True):
            note(value, x)
        return run(graph, arguments, rule), seen

    def _empty(self, program: Program) -> Seen:
        grids = {grid for one in program.all for grid in one.watched.values()}
        return {grid: self._nothing(grid) for grid in sorted(grids)}

    def _entered(
        self, program: Program, node: Node, operands: Sequence[Array]
    ) -> tuple[list[Array], Seen]:
        """A loop; what is seen in it is one more thing that it carries."""
        bodies = program.bodies[node]
        empty: Seen = {}
        for body in bodies:
            empty |= self._empty(body)
        if node.name == "cond":
            return self._branch(node, operands, bodies, empty)
        consts, body_consts, carry = loop(node)
        if not carry:  # nothing to carry it with: a scan without a state
            return self._stateless(node, operands, bodies[0], empty)
        widened: list[Any] = [*operands]
        widened[consts + body_consts] = (operands[consts + body_consts], empty)
        if node.name == "while":
            called = [_tested(node, consts), self._carried(bodies[0], body_consts)]
        else:
            called = [self._carried(bodies[0], consts)]
        (state, seen), *rest = rerun(node, widened, called)
        return [state, *rest], seen

    def _carried(self, body: Program, place: int) -> Callable[..., list[Any]]:
        """The body, where the operand at `place` is a pair with what was seen so far."""

        def called(*args: Any) -> list[Any]:
            (state, seen), plain = args[place], list(args)
            plain[place] = state
            (state, *rest), new = self.outputs(body, plain)
            merged = {grid: self._merge(seen[grid], new[grid]) for grid in seen}
            return [(state, merged), *rest]

        return called

    def _stateless(
        self, node: Node, operands: Sequence[Array], body: Program, empty: Seen
    ) -> tuple[list[Array], Seen]:
        consts, _, _ = loop(node)

        def step(seen: Seen, x: Any) -> tuple[Seen, Any]:
            outputs, new = self.outputs(body, [*operands[:consts], *x])
            return {grid: self._merge(seen[grid], new[grid]) for grid in seen}, tuple(outputs)

        kept = {name: node.params[name] for name in ("length", "reverse", "unroll")}
        seen, ys = jax.lax.scan(step, empty, tuple(operands[consts:]), **kept)
        return list(ys), seen

    def _branch(
        self, node: Node, operands: Sequence[Array], bodies: Sequence[Program], empty: Seen
    ) -> tuple[list[Array], Seen]:
        def called(body: Program) -> Callable[..., Any]:
            def branch(*args: Any) -> list[Any]:
                outputs, seen = self.outputs(body, args)
                return [*outputs, empty | seen]

            return branch

        *results, seen = rerun(node, operands, [called(body) for body in bodies])
        return results, seen


def _tested(node: Node, place: int) -> Callable[..., list[Any]]:
    """The condition of a while loop, which does not read what was seen."""

    def called(*args: Any) -> list[Any]:
        plain = list(args)
        plain[place] = args[place][0]
        return run(node.bodies[0], plain)

    return called
