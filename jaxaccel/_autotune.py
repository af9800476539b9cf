"""`jx.autotune`: convolutions, poolings and small products in the form that is fastest here."""

import functools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.core

from jaxaccel._choices import Choices, digest
from jaxaccel._forms import Op, candidates, plain, rule
from jaxaccel._forms_report import Report, Row, Whole
from jaxaccel._graph import Graph, Node, Value
from jaxaccel._progress import bar
from jaxaccel._recipe import with_step
from jaxaccel._rewritten import flat_graph
from jaxaccel._timing import Timed, synthetic, timed
from jaxaccel._tuned import formed, has_forms, op_of, tuned

# A form is taken if it is faster by more than what two timings of the same code differ.
_WORTH = 0.97
_ROUNDS_OF_WHOLE = 9
_RULES_ALONE = ContextVar("rules_alone", default=False)
_JIT_TRACER = "DynamicJaxprTracer"  # its name is all that the public API tells of it


def autotune(
    fn: Callable,
    *,
    mode: Literal["measure", "rules"] = "measure",
    cache: str | os.PathLike | None = None,
    progress: bool = True,
) -> "Autotuned":
    """The same function, its convolutions and poolings in the form that is fastest here.

    Every convolution, max or average pooling, matrix product that sums over 2 to 8 numbers, and
    gradient of these is timed in several equivalent forms, for its exact shapes, dtypes and
    parameters, on random numbers, when it is first compiled; so are max pooling of int8, and
    convolutions and products of int8 summed in int32. A form whose result differs by more than
    rounding, of integers at all, is not taken. Then the whole function is timed against the
    original; where it is not faster, its calls run as they were. What was found is kept on disk
    and is not timed again on the same machine with the same versions and settings.

    `fn` may be a forward function that is differentiated afterwards, or a whole training step.
    Forms are chosen when a call is lowered, for every derivative by itself, so that `jax.grad`,
    `jax.jvp`, `jax.vmap` and all their compositions work as on `fn`. Where the result is
    differentiated or batched, and under `jax.jit` where several devices are visible, single calls
    are timed but not the whole, which is not what will run; one that `jax.jit` wraps directly is
    timed as it stands. A function with a `while` loop or with side effects is never run for that.

    Nothing is timed, and rules decide, with ``mode="rules"``, where there is more than one
    process, and for a computation on more than one device: all hosts must choose alike.

    Args:
        fn: any JAX function of pytrees of arrays.
        mode: "measure", or "rules" to decide without timing: for ahead-of-time compilation,
            export and several hosts.
        cache: folder for what was timed; ``$JAXACCEL_CACHE``, else ``~/.cache/jaxaccel``.
        progress: draw a bar while timing takes longer than a moment.

    Returns:
        A function with a `report` of each choice and its gain.

    Raises:
        ValueError: for another mode.
        TypeError: where `fn` cannot be called; when called, where an argument is no array.

    Example:
        >>> import jax.numpy as jnp
        >>> layout = ("NHWC", "HWIO", "NHWC")
        >>> def depthwise(kernel, x):
        ...     return jax.lax.conv_general_dilated(
        ...         x, kernel, (1, 1), "SAME", dimension_numbers=layout, feature_group_count=8)
        >>> fast = jax.jit(autotune(depthwise, mode="rules"))
        >>> fast(jnp.ones((3, 3, 1, 8)), jnp.ones((1, 5, 5, 8))).shape
        (1, 5, 5, 8)
    """
    if mode not in ("measure", "rules"):
        raise ValueError(f'mode: {mode!r} is neither "measure" nor "rules"')
    if not callable(fn):
        raise TypeError(f"fn: {fn!r} cannot be called; give a function of arrays")
    return Autotuned(fn, mode, Choices(cache), progress)


@contextmanager
def rules_alone() -> Iterator[None]:
    """While it lasts nothing is timed for being called."""
    token = _RULES_ALONE.set(True)
    try:
        yield
    finally:
        _RULES_ALONE.reset(token)


class Autotuned:
    """What `autotune` returns."""

    def __init__(self, fn: Callable, mode: str, choices: Choices, progress: bool) -> None:
        functools.update_wrapper(self, fn)
        self._fn, self._progress = fn, progress
        self.recipe = with_step(fn, "autotune")
        self._tuner = Measured(choices, mode == "measure")

    def __repr__(self) -> str:
        """The original function."""
        return f"<jx.autotune of {getattr(self._fn, '__name__', self._fn)!s}>"

    @property
    def report(self) -> Report:
        """What was chosen in the calls so far, and what it gained."""
        return Report(tuple(self._tuner.used.values()), self._tuner.whole)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The result of `fn`."""
        graph, leaves, out_tree = flat_graph(self._fn, args, kwargs)
        run = self._chosen(graph, leaves)
        return jax.tree.unflatten(out_tree, run(graph, leaves))

    def _chosen(self, graph: Graph, leaves: Sequence[Any]) -> Callable:
        """How to run this call: tuned, or as it was traced."""
        own = lambda graph, leaves: tuned(graph, leaves, self._tuner)
        if not (self._tuner.measures and _stands_alone(graph, leaves)) or _RULES_ALONE.get():
            return own
        nodes = list(_tunable(graph))
        ops = {op.key: op for op in map(op_of, nodes)}.values()
        with bar(self._progress, "autotune", len(ops) + 1) as tick:
            for op in ops:
                self._tuner.form(op)
                tick()
            forms = [self._tuner.form(op) for op in ops]
            changes = any(form != _plain(op) for op, form in zip(ops, forms, strict=True))
            changes = changes or any(node.tuner for node in nodes)
            left = Left(self._tuner, frozenset(op_of(n).key for n in nodes), _ruled(nodes))
            as_given = lambda graph, leaves: tuned(graph, leaves, left)
            faster = changes and (not _can_be_run(graph) or self._faster(graph, forms, as_given))
        self._tuner.choices.save()
        return own if faster else as_given

    def _faster(self, graph: Graph, forms: Sequence[str], as_given: Callable) -> bool:
        """Whether the whole function gains; it is timed on random numbers."""
        avals = [value.aval for value in graph.inputs]
        key = f"whole {digest(_described(graph), list(map(str, avals)), forms)}"
        row = self._tuner.choices.get(key)
        if row is None or not _complete(row, {"plain", "tuned"}):
            given = lambda *leaves: as_given(graph, leaves)
            own = lambda *leaves: tuned(graph, leaves, self._tuner)
            # Not compared: what an optimizer makes of a random state may be no number.
            both = {"plain": given, "tuned": own}
            found = timed(both, synthetic(avals), _ROUNDS_OF_WHOLE, terms=None)
            form = min(found.seconds, key=lambda name: found.seconds[name], default="plain")
            row = {"form": form, "seconds": found.seconds, "dropped": found.dropped}
            self._tuner.choices.set(key, row)
        seconds = row["seconds"]
        self._tuner.whole = Whole(seconds.get("plain"), seconds.get("tuned"), row["dropped"])
        return row["form"] == "tuned"


class Measured:
    """Chooses by time; equal only to itself."""

    def __init__(self, choices: Choices, measures: bool) -> None:
        self.choices, self.measures = choices, measures and jax.process_count() == 1
        self.used: dict[str, Row] = {}
        self.whole: Whole | None = None

    def choose(self, op: Op, platform: str, devices: int) -> str:
        """As `Tuner` says."""
        here = self.measures and devices == 1 and platform == _platform()
        if not (here and _is_static(op.shapes)):
            name = rule(op, platform)
            if candidates(op, platform):
                self.used[op.key] = Row(op, name, {}, {})
            return name
        known = self.choices.get(op.key) is not None
        name = self.form(op)
        if not known:
            self.choices.save()
        return name

    def form(self, op: Op) -> str:
        """The fastest form; timed if it was not before."""
        possible = _possible(op)
        if len(possible) == 1:
            return possible[0]
        row = self.choices.get(op.key)
        if row is None or not _complete(row, {*possible}):
            row = _measured(op)
            self.choices.set(op.key, row)
        self.used[op.key] = Row(op, row["form"], row["seconds"], row["dropped"])
        return row["form"]


@dataclass(frozen=True)
class Left:
    """Leaves these calls as they were; what derives from them is chosen as ever."""

    tuner: Measured
    keys: frozenset[str]
    ruled: frozenset[str]  # those that rules decided before

    def choose(self, op: Op, platform: str, devices: int) -> str:
        """As `Tuner` says."""
        if op.key not in self.keys:
            return self.tuner.choose(op, platform, devices)
        return (rule if op.key in self.ruled else plain)(op, platform)


def _ruled(nodes: Sequence[Node]) -> frozenset[str]:
    return frozenset(op_of(node).key for node in nodes if node.tuner)


def _platform() -> str:
    """By the name that things are lowered for."""
    return {"cpu": "cpu", "gpu": "cuda"}.get(jax.default_backend(), jax.default_backend())


def _plain(op: Op) -> str:
    return plain(op, _platform())


def _possible(op: Op) -> list[str]:
    """The form that the others must equal, XLA's own where it has a usable one; and the others."""
    first, platform = _plain(op), _platform()
    return [first, *(name for name in candidates(op, platform) if name != first)]


def times(op: Op, others: Mapping[str, Callable] | None = None) -> Timed:
    """Of all forms that apply, on random numbers; and of other functions."""
    functions: dict[str, Callable] = {
        name: partial(formed, op.name, name, **op.params) for name in _possible(op)
    }
    avals = [jax.ShapeDtypeStruct(s, d) for s, d in zip(op.shapes, op.dtypes, strict=True)]
    return timed(functions | dict(others or {}), synthetic(avals), terms=op.terms)


def _measured(op: Op) -> dict[str, Any]:
    found, first = times(op), _plain(op)
    if not found.seconds:
        return {"form": first, "seconds": {}, "dropped": found.dropped}
    best = min(found.seconds, key=lambda name: found.seconds[name])
    gains = found.seconds[best] < _WORTH * found.seconds[first]
    return {
        "form": best if gains else first,
        "seconds": found.seconds,
        "dropped": found.dropped,
    }


def _complete(row: Mapping[str, Any], names: Set[str]) -> bool:
    """Whether a row of the file is one of ours, and says of each of these what became of it."""
    seconds, dropped = row.get("seconds"), row.get("dropped")
    return (
        isinstance(seconds, dict)
        and isinstance(dropped, dict)
        and (not seconds or {*seconds, *dropped} == names)
        and row.get("form") in names
        and all(isinstance(value, float) and value > 0 for value in seconds.values())
        and all(isinstance(value, str) for value in dropped.values())
    )


def _tunable(graph: Graph) -> Iterator[Node]:
    """The nodes with forms, in calls and loops too."""
    for node in graph.nodes:
        if has_forms(node):
            yield node
        for body in node.bodies:
            yield from _tunable(body)


def _stands_alone(graph: Graph, leaves: Sequence[Any]) -> bool:
    """Whether this call is neither differentiated nor batched nor on several devices.

    Then what it is traced to is what will run, but for `jax.jit`.
    """
    mesh = jax.sharding.get_abstract_mesh()
    shardings = [getattr(leaf, "sharding", None) for leaf in leaves if is_concrete(leaf)]
    return (
        mesh.empty
        and _on_default_platform()
        and all(map(_is_default, shardings))
        and _is_static(value.shape for value in graph.inputs)
        and all(is_concrete(leaf) or _of_one_device(leaf) for leaf in leaves)
        and all(map(is_concrete, graph.constants.values()))
    )


def _is_default(sharding: Any) -> bool:
    """Whether an array is on one device, of the kind that is timed; None is a NumPy array's."""
    if sharding is None:
        return True
    return [d.platform for d in sharding.device_set] == [jax.devices()[0].platform]


def _on_default_platform() -> bool:
    """Whether `jax.default_device` leaves the kind of device that timings are kept for."""
    config: Any = jax.config
    chosen = config.jax_default_device
    return getattr(chosen, "platform", chosen) in (None, jax.devices()[0].platform)


def _is_static(shapes: Iterable[Sequence[Any]]) -> bool:
    """No size is symbolic."""
    return all(isinstance(size, int) for shape in shapes for size in shape)


def is_concrete(leaf: Any) -> bool:
    return not isinstance(leaf, jax.core.Tracer)


def _of_one_device(tracer: Any) -> bool:
    """Of `jax.jit`, which does not tell a tracer's devices: where there is only one."""
    return type(tracer).__name__ == _JIT_TRACER and jax.device_count() == 1


def _can_be_run(graph: Graph) -> bool:
    """On random numbers: no side effects, and no loop whose end depends on them."""
    return all(
        not node.effects and node.name != "while" and all(map(_can_be_run, node.bodies))
        for node in graph.nodes
    )


def _described(graph: Graph) -> list[Any]:
    """Tells graphs apart by their ops, how these are wired, and the types of their results."""
    numbers: dict[Any, int] = {}
    number = lambda atom: numbers.setdefault(atom, len(numbers)) if isinstance(atom, Value) else -1
    return [
        [
            node.name,
            [number(atom) for atom in (*node.inputs, *node.outputs)],
            [str(value.aval) for value in node.outputs],
            bool(node.tuner),
            op_of(node).key if has_forms(node) else str(node.params.get("length", "")),
            [_described(body) for body in node.bodies],
        ]
        for node in graph.nodes
    ]
