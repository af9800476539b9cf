"""How the rules of primitives are tested: what each axis must be, and as many classes as free."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import jaxaccel as jx
from jaxaccel._axes import Labels
from jaxaccel._graph import Graph
from jaxaccel._labels import label
from jaxaccel._trace import trace


def shape(*sizes: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, "float32")


def case(
    name: str,
    fn: Callable,
    operands: Sequence[Any],
    *wanted: Any,
    classes: int | None = None,
) -> Any:
    """A case of `check`: operands are arrays, or tuples for shapes.

    `wanted` has for each operand what its axes are: "free", "whole" or a part of the reason why
    they are pinned; one word stands for all axes. `classes` is the number of sets of indices that
    can go on their own.
    """
    given = [shape(*x) if isinstance(x, tuple) else x for x in operands]
    return pytest.param(fn, given, wanted, classes, id=name)


def check(fn: Callable, operands: Sequence[Any], wanted: Sequence[Any], classes: int | None = None):
    found = jx.check_rule(fn, *operands)
    every = [_each(w, words) for w, words in zip(wanted, found.axes, strict=True)]
    short = [tuple(map(_short, words, want)) for words, want in zip(found.axes, every, strict=True)]
    assert short == every, f"wanted {every}, found\n{found}"
    if classes is not None:
        free = free_classes(fn, operands)
        assert free == classes, f"{free} sets of indices can go on their own, wanted {classes}"


def _each(wanted: Any, words: Sequence[str]) -> tuple[str, ...]:
    return (wanted,) * len(words) if isinstance(wanted, str) else wanted


def _short(word: str, want: str) -> str:
    """The part of the reason that was wanted, else all of it."""
    return want if word.startswith("pinned: ") and want in word else word


def free_classes(fn: Callable, operands: Sequence[Any]) -> int:
    traced = trace(lambda *args: jax.tree.leaves(fn(*args)), *operands)
    floats = [i for i, x in enumerate(operands) if jnp.issubdtype(x.dtype, jnp.inexact)]
    labelling, inputs = label(traced, floats, keep_outputs=False)
    ids = [axis.ids for axes in inputs for axis in axes if isinstance(axis, Labels)]
    roots = {root for axis in ids for root in labelling.roots(axis)}
    return len(roots - labelling.pinned.keys())


def names(fn: Callable, operands: Sequence[Any]) -> set[str]:
    """The primitives that `fn` runs, in its bodies too."""
    return set(_names(trace(lambda *args: jax.tree.leaves(fn(*args)), *operands).graph))


def _names(graph: Graph) -> Iterator[str]:
    for node in graph.nodes:
        yield node.name
        for body in node.bodies:
            yield from _names(body)
