"""A graph run again on arrays of which some labels are gone."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_derivatives import SymbolicZero

from jaxaccel import _graph
from jaxaccel._axes import OPAQUE, Axes, Axis, Free, Labels
from jaxaccel._graph import Graph, Node, is_float
from jaxaccel._labels import Labelling
from jaxaccel._rewritten import rerun
from jaxaccel._rules import Cut, cotangent, rule_of


class Shrunk:
    """Runs the nodes of a labelled graph without the dropped labels.

    Args:
        labelling: the labels of the graph; `dropped` may not meet its pins.
        dropped: labels that are gone.

    Raises:
        ValueError: a dropped label is pinned.
    """

    def __init__(self, labelling: Labelling, dropped: Sequence[int] | np.ndarray) -> None:
        self.labelling = labelling
        gone = labelling.roots(np.asarray(dropped, int))
        self._dropped = np.zeros(len(labelling), bool)
        self._dropped[gone] = True
        for root in gone:
            if root in labelling.pinned:
                raise ValueError(f"a dropped channel is pinned: {labelling.pinned[root]}")
        self._kept: dict[int, np.ndarray | None] = {}
        self._known: dict[Node, bool] = {}

    def kept(self, axis: Axis) -> np.ndarray | None:
        """The indices of an axis that are left, None where all are."""
        ids = None if axis is OPAQUE else getattr(axis, "ids", None)
        if ids is None:
            return None
        if id(ids) not in self._kept:
            here = ~self._dropped[self.labelling.roots(ids)]
            self._kept[id(ids)] = None if here.all() else np.flatnonzero(here)
        return self._kept[id(ids)]

    def shape(self, axes: Axes) -> tuple[Any, ...]:
        kept = [self.kept(axis) if isinstance(axis, Labels) else None for axis in axes]
        return tuple(n if k is None else len(k) for n, k in zip(axes.shape, kept, strict=True))

    def run(self, graph: Graph, arguments: Sequence[Any]) -> list[Any]:
        """The results of a body for arguments without the dropped indices."""
        results = _graph.run(graph, arguments, self._node)
        outputs = self.labelling.outputs[graph]
        return [self._fit(value, axes) for value, axes in zip(results, outputs, strict=True)]

    def _node(self, node: Node, operands: list[Any]) -> Sequence[Any] | None:
        if not self._touched(node):
            return None
        used = self.labelling.operands[node]
        kept = [[self.kept(axis) for axis in axes] for axes in used]
        operands = [self._fit(value, axes) for value, axes in zip(operands, used, strict=True)]
        if node.bodies:
            return self._call(node, operands)
        made_axes = self.labelling.results[node]
        left = [[self.kept(axis) for axis in axes] for axes in made_axes]
        shapes = [self.shape(axes) for axes in made_axes]
        try:
            results = list(rule_of(node.name).resize(node, operands, Cut(kept, left, shapes)))
        except Exception as error:
            error.add_note(f"in the rule of {node.name!r}, at {node.source}, for {shapes}")
            raise
        made = [jnp.shape(result) for result in results]
        if made != shapes:
            raise ValueError(
                f"{node.name} at {node.source} made shapes {made} where its rule promises "
                f"{shapes}; its rule is wrong (see jx.check_rule)"
            )
        return results

    def _touched(self, node: Node) -> bool:
        """Whether anything is gone from its operands, its results or the nodes inside."""
        if node not in self._known:
            around = [*self.labelling.operands[node], *self.labelling.results[node]]
            inside = (inner for body in node.bodies for inner in body.nodes)
            self._known[node] = any(
                self.kept(axis) is not None for axes in around for axis in axes
            ) or any(map(self._touched, inside))
        return self._known[node]

    def _fit(self, value: Any, axes: Axes) -> Any:
        """What was computed whole, cut for this use."""
        for k, axis in enumerate(axes):
            kept = self.kept(axis)
            if kept is None or not isinstance(axis, Free):
                continue
            first = 0 if axis.uniform or not len(kept) else kept[0]
            if axis.uniform or len(kept) == 0 or len(kept) == kept[-1] - first + 1:
                value = lax.slice_in_dim(value, first, first + len(kept), axis=k)
            else:
                value = jnp.take(value, kept, axis=k, mode="clip")
        return value

    def _call(self, node: Node, operands: list[Any]) -> list[Any]:
        bodies = [lambda *args, body=body: self.run(body, args) for body in node.bodies]
        if node.name == "custom_jvp_call":
            return _custom_jvp(self, node, bodies[0], operands)
        if node.name == "custom_vjp_call":
            return _custom_vjp(self, node, bodies[0], operands)
        return rerun(node, operands, bodies)

    def derived(
        self, graph: Graph, axes: Sequence[Axes], wanted: Sequence[Axes]
    ) -> Callable[[Sequence[Any]], list[Any]]:
        """Another graph, shrunk alike: these axes of this one are those of its in- and outputs."""
        inner = _Derivative()
        dropped = [np.zeros(0, int)]

        def copied(axis: Axis, size: Any) -> Axis:
            kept = self.kept(axis)
            if not isinstance(axis, Labels) and kept is None:
                return Free(axis.uniform) if isinstance(axis, Free) else OPAQUE
            ids = inner.new(size)
            if kept is not None:
                dropped.append(np.delete(ids, kept))
            return Labels(ids, np.broadcast_to(getattr(axis, "zero", False), size))

        def copy(outside: Axes) -> Axes:
            own = map(copied, outside, outside.shape)
            return Axes(tuple(own), outside.shape, outside.constant, None)

        made = inner.inside(graph, [copy(outside) for outside in axes])
        for out, outside in zip(made, map(copy, wanted), strict=True):
            for one, other in zip(out, outside, strict=True):
                inner.same(one, other)
        gone = np.concatenate(dropped)
        inner.decide(gone)
        shrunk = Shrunk(inner, gone)
        return lambda arguments: shrunk.run(graph, arguments)


class _Derivative(Labelling):
    """A derivative is wanted at the smaller sizes only: nothing is masked, nothing divides by 0."""

    def __init__(self) -> None:
        super().__init__()
        self.in_derivative = True

    def singular(self, operand: Axes, k: int, where: np.ndarray) -> None:
        pass


def _custom_jvp(shrunk: Shrunk, node: Node, body: Callable, operands: list[Any]) -> list[Any]:
    """A traced custom rule cannot be bound at other shapes: its own jvp is traced and shrunk."""
    used = shrunk.labelling.operands[node]
    called = jax.custom_jvp(lambda *args: tuple(body(*args)))

    def jvp(primals: Sequence[Any], tangents: Sequence[Any]) -> Any:
        active = [
            i
            for i, (atom, tangent) in enumerate(zip(node.inputs, tangents, strict=True))
            if is_float(atom) and not isinstance(tangent, SymbolicZero)
        ]
        graph = _graph.jvp_graph(node, active)
        made = shrunk.labelling.results[node]
        moving = [made[i] for i, out in enumerate(node.outputs) if is_float(out)]
        run = shrunk.derived(graph, [*used, *(used[i] for i in active)], [*made, *moving])
        results = run([*primals, *(tangents[i] for i in active)])
        outputs, moved = results[: len(node.outputs)], iter(results[len(node.outputs) :])
        none = lambda out: np.zeros(out.shape, jax.dtypes.float0)
        pairs = zip(node.outputs, outputs, strict=True)
        return tuple(outputs), tuple(next(moved) if is_float(v) else none(o) for v, o in pairs)

    called.defjvp(jvp, symbolic_zeros=True)
    return list(called(*operands))


def _custom_vjp(shrunk: Shrunk, node: Node, body: Callable, operands: list[Any]) -> list[Any]:
    """The same for a custom vjp; its backward pass begins by computing the residuals again."""
    labelling = shrunk.labelling
    active = [i for i, atom in enumerate(node.inputs) if is_float(atom)]
    results = [i for i, out in enumerate(node.outputs) if is_float(out)]
    axes = [*labelling.operands[node], *(cotangent(labelling.results[node][i]) for i in results)]
    called = jax.custom_vjp(lambda *args: tuple(body(*args)))

    def backward(args: Sequence[Any], cotangents: Sequence[Any]) -> Any:
        graph = _graph.vjp_graph(node, active, results)
        run = shrunk.derived(graph, axes, [axes[i] for i in active])
        made = iter(run([*args, *(cotangents[i] for i in results)]))
        return tuple(next(made) if is_float(atom) else None for atom in node.inputs)

    called.defvjp(lambda *args: (tuple(body(*args)), args), backward)
    return list(called(*operands))
