"""What `experiments.quantization` reports beside accuracies: of the layers, of the programs."""

import re
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import nnx

import jaxaccel as jx
from experiments import common, mnist, peer_networks
from experiments.quantization_peers import plain_module, qwix, qwix_module
from experiments.quantization_rows import POWER, Candidate, Images, Trial, compiled
from jaxaccel.quantize._layers import Layer
from jaxaccel.quantize._report import Report

IMAGES = 256  # of the test set, that go through each layer
MAX_DROP = 0.1  # points on validation images, that `mixed` may cost


def images_of(trial: Trial) -> Images:
    return common.scaled(trial.splits.test.image[:IMAGES])


def noise(trial: Trial) -> dict[str, dict[str, float]]:
    """Decibels of signal to noise of each layer's result, by tool.

    The result as a real number, behind bias and batch norm, before the relu and before it is
    rounded for the next layer; in the whole quantized network against the whole float network.
    """
    images = images_of(trial)
    real = outputs(plain_module(trial), images)
    found = {
        "int8": own(jx.quantize.int8(*trial.whole, trial.batches), images),
        "Qwix static": outputs(qwix_module(trial, static=True), images),
    }
    return {
        tool: {path: decibels(values[path], real[path]) for path in real}
        for tool, values in found.items()
    }


def decibels(found: np.ndarray, real: np.ndarray) -> float:
    """Of the signal to the noise; the number of a difference below float32's own for none."""
    wide = np.asarray(real, np.float64)
    signal, noise = np.square(wide).sum(), np.square(found - wide).sum()
    return float(10 * np.log10(signal / max(noise, 1e-30 * signal)))


def outputs(module: Any, images: Images) -> dict[str, np.ndarray]:
    """Of each convolution and dense layer, behind its batch norm, by the path of its kernel."""
    seen: dict[str, Any] = {}
    for path, layer in peer_networks._layers(module):
        _watch(layer, None if isinstance(layer, nnx.BatchNorm) else f"{path}/kernel", seen)
    graph, state = nnx.split(module)

    def run(state: Any, images: Images) -> dict[str, Any]:
        seen.clear()
        nnx.merge(graph, state)(images)
        return dict(seen)

    ran = jax.jit(run)(state, images)
    return {path: np.asarray(ran[path]) for path in seen}


def _watch(layer: Any, place: str | None, seen: dict[str, Any]) -> None:
    """Puts what a layer gives to its place, or to that of the layer before it."""
    kind = type(layer)

    def call(self: Any, *args: Any, **options: Any) -> Any:
        out = kind.__call__(self, *args, **options)
        seen[place or [*seen][-1]] = out
        return out

    layer.__class__ = type(kind.__name__, (kind,), {"__call__": call})


def own(pair: Candidate, images: Images) -> dict[str, np.ndarray]:
    """The same of `jx.quantize.int8`, from its accumulators."""
    fn: Any = pair[0]
    segments = [s for s in fn.segments(pair[1], images) if isinstance(s.step, Layer)]
    found = {}
    for row, s in zip(fn.report.rows, segments, strict=True):
        bias = 0 if s.constants.bias is None else np.asarray(s.constants.bias)
        step = 1 if s.grid is None else s.grid.scale
        real = np.asarray(s.accumulator, np.float64) + bias
        found[row.where] = real * np.asarray(s.constants.multiplier) * step
    return found


def programs(trial: Trial) -> dict[str, Any]:
    """How many convolutions and dot products are on integers, as written and as compiled."""
    made = {
        "int8": jx.quantize.int8(*trial.whole, trial.batches),
        "int8, dynamic": jx.quantize.int8(*trial.whole, trial.batches, activations="dynamic"),
        "Qwix static": qwix(static=True)(trial),
    }
    return {name: counted(pair, trial.batches[0]) for name, pair in made.items()}


def counted(pair: Candidate, images: Images) -> dict[str, Any]:
    fn, params = pair
    lowered = jax.jit(fn).lower(params, images)
    found: dict[str, Any] = {
        "StableHLO": stablehlo(lowered.as_text()),
        "compiled": hlo(lowered.compile().as_text()),
    }
    if isinstance(report := getattr(fn, "report", None), Report):
        found["left"] = [[one.where, one.source, one.reason] for one in report.left]
        found["on integers"] = [row.where for row in report.rows]
    return found


def stablehlo(text: str) -> dict[str, int]:
    """By kind and operands' type."""
    found: dict[str, int] = {}
    for line in text.splitlines():
        kind = re.search(r"stablehlo\.(convolution|dot_general)\b", line)
        types = re.search(r": \(tensor<(?:\d+x)*(\w+)>, tensor<(?:\d+x)*(\w+)>\)", line)
        if kind and types:
            name = f"{kind[1].partition('_')[0]} {types[1]} {types[2]}"
            found[name] = found.get(name, 0) + 1
    return found


def hlo(text: str | None) -> dict[str, int]:
    """The same, types from the lines that make the operands."""
    made = dict(re.findall(r"(%[\w.-]+)(?: =|:) \(?(\w+)\[", text or ""))
    found: dict[str, int] = {}
    for kind, a, b in re.findall(
        r" (convolution|dot)\((?:\w+\[[^%]*)?(%[\w.-]+), (?:\w+\[[^%]*)?(%[\w.-]+)\)", text or ""
    ):
        name = f"{kind} {made.get(a, '?')} {made.get(b, '?')}"
        found[name] = found.get(name, 0) + 1
    return found


def sensitivity(trial: Trial) -> dict[str, Any]:
    """What each kernel alone in 8 bits costs on validation images, and what `mixed` leaves."""
    job = mnist.Job(trial.splits, 1, trial.seed, progress=False)
    found: dict[str, Any] = {"machine": common.machine_line(), "max_drop": MAX_DROP, "layers": {}}

    def evaluate(fn: Any, params: Any) -> float:
        score = validated(job, mnist.Network("", fn, params, "", []))
        report = getattr(fn, "report", None)
        alone = report.rows if isinstance(report, Report) else ()
        if len(alone) == 1:
            found["layers"][alone[0].where] = score
        found.setdefault("original", score)  # the first call
        jax.clear_caches()
        return score

    options: dict[str, Any] = {"max_drop": MAX_DROP, "calibration": "minmax", **POWER}
    small, _ = jx.quantize.mixed(*trial.whole, trial.batches, evaluate, **options)
    left = [one.where for one in small.report.left]
    return found | {"left": left, "on integers": len(small.report.rows)}


def validated(job: mnist.Job, network: mnist.Network) -> float:
    """Accuracy in percent on the validation images."""
    run = compiled((network.fn, network.params))
    right = count = 0
    for batch in job.validation:
        hits = run(common.scaled(batch["image"])).argmax(-1) == batch["label"]
        right += int((hits & batch["mask"]).sum())
        count += int(batch["mask"].sum())
    return 100 * right / count


FACTS: dict[str, Callable[[Trial], Any]] = {"noise": noise, "programs": programs}
LATER: dict[str, Callable[[Trial], Any]] = {"sensitivity": sensitivity}
FIRST_SEED = ("programs", "sensitivity")
