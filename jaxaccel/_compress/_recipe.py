"""The steps that made a compressed function, as data, and the same steps again."""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from jaxaccel import _stored
from jaxaccel._autotune import autotune
from jaxaccel._recipe import with_step
from jaxaccel.prune import Plan
from jaxaccel.quantize import dequantize, int8, weights
from jaxaccel.quantize._calibrate import first
from jaxaccel.quantize._traced import folded

Pair: TypeAlias = tuple[Callable, PyTree]
Finetune: TypeAlias = Callable[[Callable, PyTree, Pair], PyTree]
Step: TypeAlias = dict[str, Any]
_FORMAT, _VERSION = "jaxaccel.Recipe", 1


class Setting(NamedTuple):
    """What steps need besides the function: data, a way to train, and whom to follow."""

    batches: Iterable[Any]
    finetune: Finetune | None
    teacher: Pair


def _prune(pair: Pair, step: Step, setting: Setting) -> Pair:
    plan = Plan.from_dict(step["plan"])
    return plan.rewrite(pair[0]), plan.shrink(pair[1])


def _finetune(pair: Pair, step: Step, setting: Setting) -> Pair:
    if setting.finetune is None:
        raise ValueError(
            "finetune: the recipe trains between its steps; pass finetune=, as to jx.compress"
        )
    fn, params = pair
    trained = setting.finetune(fn, params, setting.teacher)
    shapes = lambda tree: jax.tree.map(jnp.shape, tree)
    if jax.tree.structure(trained) != jax.tree.structure(params) or shapes(trained) != shapes(
        params
    ):
        raise ValueError(
            f"finetune: returned {_briefly(trained)}, expected {_briefly(params)}; return the "
            "trained parameters, in the tree that it was given"
        )
    return fn, trained


def _briefly(tree: PyTree) -> str:
    text = str(jax.tree.map(jnp.shape, tree))
    return text if len(text) <= 300 else f"{text[:300]}..."


def _fold(pair: Pair, step: Step, setting: Setting) -> Pair:
    return folded(*pair, first(setting.batches))


def _int8(pair: Pair, step: Step, setting: Setting) -> Pair:
    kernels = step.get("kernels")
    where = None if kernels is None else lambda path, leaf, chosen={*kernels}: path in chosen
    return int8(*pair, setting.batches, where=where, progress=False)


def _weights(pair: Pair, step: Step, setting: Setting) -> Pair:
    fn, params = folded(*pair, first(setting.batches))

    def small(params: PyTree, *args: Any) -> Any:
        return fn(dequantize(params), *args)

    setattr(small, "recipe", with_step(fn, "quantize.weights", bits=step["bits"]))  # noqa: B010
    return small, weights(params, bits=step["bits"])


def _autotune(pair: Pair, step: Step, setting: Setting) -> Pair:
    return autotune(pair[0], mode=step["mode"], progress=False), pair[1]


_KNOWN: Mapping[str, Callable[[Pair, Step, Setting], Pair]] = {
    "prune": _prune,
    "finetune": _finetune,
    "fold.batchnorm": _fold,
    "quantize.int8": _int8,
    "quantize.weights": _weights,
    "autotune": _autotune,
}


def done(pair: Pair, steps: Sequence[Step], setting: Setting) -> Pair:
    """What the steps make of a function and its parameters."""
    for step in steps:
        pair = _KNOWN[step["transform"]](pair, step, setting)
    return pair


@dataclass(frozen=True, eq=False)
class Recipe:
    """The steps from the original to a compressed function; `save` and `load` are JSON.

    Attributes:
        steps: dicts with the name of a `transform` and what it takes: channels that stay, kernels
            on integers, bits, the mode of `jaxaccel.autotune`, and where training stands between.
        engine: on which the result was fastest, for `jaxaccel.export.compile`.
    """

    steps: tuple[Step, ...]
    engine: str = "xla"

    def __str__(self) -> str:
        """One step in a line."""
        lines = [f"{place}. {_words(step)}" for place, step in enumerate(self.steps, 1)]
        return "\n".join([*lines, f"on {self.engine}"])

    def apply(
        self,
        fn: Callable,
        params: PyTree,
        batches: Iterable[Any],
        finetune: Finetune | None = None,
    ) -> Pair:
        """The same steps, on the function that `jaxaccel.compress` was given or one like it.

        Args:
            fn: ``fn(params, *args)``.
            params: of the shapes that the recipe was made for.
            batches: for calibration, as of `jaxaccel.compress`.
            finetune: as of `jaxaccel.compress`; needed where it was given there.

        Returns:
            ``(fn, params)``.

        Raises:
            ValueError: the parameters are not those of the recipe, or it trains and `finetune` is
                None; and as the transforms do.
        """
        return done((fn, params), self.steps, Setting(batches, finetune, (fn, params)))

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, strings and numbers, for ``json.dump``."""
        return {
            "format": _FORMAT,
            "version": _VERSION,
            "engine": self.engine,
            "steps": list(self.steps),
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes it as JSON, whole or not at all."""
        _stored.write(Path(path), self.to_dict())

    @staticmethod
    def load(path: str | os.PathLike[str]) -> "Recipe":
        """The recipe that `save` wrote.

        Raises:
            ValueError: the file is no recipe, of another version, or damaged.
        """
        found = _stored.read(Path(path), "recipe")
        _stored.check(found, path, "recipe", _FORMAT, _VERSION)
        steps, engine = found.get("steps"), found.get("engine")
        if not isinstance(steps, list) or not isinstance(engine, str):
            raise ValueError(f"{path}: damaged: steps must be a list, engine a string")
        for place, step in enumerate(steps):
            _check(step, f"{path}: steps[{place}]")
        return Recipe(tuple(steps), engine)


def _check(step: Any, where: str) -> None:
    """Raises a ValueError where a step is none of ours."""
    name = step.get("transform") if isinstance(step, dict) else None
    if not isinstance(name, str) or name not in _KNOWN:
        raise ValueError(f"{where}: {name!r} is none of {', '.join(map(repr, _KNOWN))}")
    if name == "prune":
        Plan.from_dict(step.get("plan"), f"{where}: plan")
    kernels = step.get("kernels")
    if kernels is not None and not (
        isinstance(kernels, list) and all(isinstance(path, str) for path in kernels)
    ):
        raise ValueError(f"{where}: kernels: must be a list of paths")
    if name == "quantize.weights" and step.get("bits") not in (4, 8):
        raise ValueError(f"{where}: bits: {step.get('bits')!r} must be 4 or 8")
    if name == "autotune" and step.get("mode") not in ("measure", "rules"):
        raise ValueError(f"{where}: mode: {step.get('mode')!r} must be 'measure' or 'rules'")


def _words(step: Step) -> str:
    match step:
        case {"transform": "prune", "plan": {"parameters": [before, after], "macs": [all_, left]}}:
            return (
                f"prune: parameters {before:,} -> {after:,}, multiply-accumulates of the example "
                f"{all_:,} -> {left:,}"
            )
        case {"transform": "quantize.int8", "kernels": list(kernels)}:
            return f"quantize.int8: {len(kernels)} kernels on integers"
        case {"transform": "quantize.weights", "bits": bits}:
            return f"quantize.weights: in {bits} bits"
        case {"transform": "autotune", "mode": mode}:
            return f"autotune: mode {mode!r}"
    return step["transform"]
