"""Tables and plots of `experiments.quantization`."""

from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from matplotlib.figure import Figure

import jaxaccel as jx
from experiments import common
from experiments.quantization_peers import ONNXRUNTIME, ONNXRUNTIME_LATER
from experiments.quantization_peers import QWIX as QWIX_ROWS
from experiments.quantization_rows import HARD, LATER, ROWS

Runs: TypeAlias = list[dict[str, Any]]
OURS, QWIX = "int8", "Qwix static"
# The points of accuracy that a row may cost, by network or everywhere.
TARGETS: dict[str, dict[str, float]] = {
    OURS: {"MobileNet": 0.4, "": 0.2},
    "int4 weights": {"": 0.6},
    "int4 weights, small in 8": {"": 0.6},
    "QAT": {"": 0.1},
}
# (name of the claim, the one that should be better, the one it is held against)
CLAIMS = (
    ("QAT over the same training in float32", "QAT", "trained on"),
    ("QAT of shifts over the same training", "QAT, shifts", "trained on"),
    ("QAT over int8", "QAT", OURS),
    ("int8 over Qwix static", OURS, QWIX),
    ("int8 over onnxruntime", OURS, "onnxruntime"),
    ("dynamic over Qwix dynamic", "int8, dynamic", "Qwix dynamic"),
    ("mse over min-max calibration", OURS, "int8, minmax"),
    ("equalized over not", "int8, equalized", OURS),
    ("AdaRound over nearest", "int8, AdaRound", OURS),
    ("AdaRound over nearest, shifts", "int8, shifts, AdaRound", "int8, shifts"),
    ("equalized over not, shifts", "int8, shifts, equalized", "int8, shifts"),
    ("small kernels in 8 bits over all in 4", "int4 weights, small in 8", "int4 weights"),
    ("int4 in groups over per channel", "int4 weights", "int4 weights, per channel"),
)


def write(stem: Path, runs: Runs, about: str, findings: common.Findings) -> None:
    """Print the tables; write them beside their figures and the pictures."""
    names = dict.fromkeys(run["network"] for run in runs)
    found = {name: [run for run in runs if run["network"] == name] for name in names}
    head = f"{about}; {machines(found)}"
    results = {
        "about": head,
        "targets": {name: targets(name, each) for name, each in found.items()},
        "claims": {name: claims(each) for name, each in found.items()},
        "runs": found,
    }
    common.write(stem, partial(page, found, head), results, findings, measured(runs))
    plot(stem.with_suffix(".png"), found)
    plot_layers(stem.with_name(f"{stem.name}-layers.png"), found)


def machines(found: dict[str, Runs]) -> str:
    """Those that the networks were trained on."""
    return "; ".join(common.machines(run for runs in found.values() for run in runs))


def measured(runs: Runs) -> list[str]:
    """Those, and the ones that the layers were looked at on."""
    return common.machines([*runs, *(run["sensitivity"] for run in runs if "sensitivity" in run)])


def words(results: dict[str, Any]) -> list[str]:
    """Of each network the targets, and int8 against the peers."""
    said = []
    shown = lambda one: f"{signed(one['points'], one['half_width'])} points"
    for name, every in results["targets"].items():
        met = (f"{t['row']} {shown(t)} (target {t['target']:+.1f}: {t['said']})" for t in every)
        said += [f"{name}, from float32: {'; '.join(met)}."] if every else []
    for name, every in results["claims"].items():
        peers = [c for c in every if c["claim"].startswith("int8 over")]
        said += [f"{name}: {c['claim']}, {shown(c)}: {c['said']}." for c in peers]
    return said


def rows(runs: Runs) -> list[str]:
    """Of any seed, in the order of the tables."""
    known = [*ROWS, *LATER, *QWIX_ROWS, *ONNXRUNTIME, *ONNXRUNTIME_LATER]
    return [row for row in known if any(row in run["rows"] for run in runs)]


def values(runs: Runs, row: str, what: str = "accuracy") -> dict[int, float]:
    """By seed, for those that have it."""
    return {run["seed"]: run["rows"][row][what] for run in runs if row in run["rows"]}


def apart(runs: Runs, row: str, than: str = "float32") -> list[float]:
    """Points of accuracy by which a row is above another, for each seed that has both."""
    one, other = values(runs, row), values(runs, than)
    return [one[seed] - other[seed] for seed in one if seed in other]


def mean(numbers: Iterable[float]) -> tuple[float, float]:
    """With half of the 95% interval; nan for a single seed."""
    found = [*numbers]
    return jx.measure.interval(found)[:2] if len(found) > 1 else (found[0], np.nan)


def targets(name: str, runs: Runs) -> list[dict[str, Any]]:
    found = []
    for row, limits in TARGETS.items():
        allowed = limits.get(name, limits[""])
        if row in rows(runs):
            points, half = mean(apart(runs, row))
            met = "met" if points >= -allowed else "missed"
            if np.isnan(half):
                met = f"{met}, one seed"
            elif met == "met" and points - half < -allowed:
                met = "met by the mean, not by the whole interval"
            found.append({"row": row, "points": points, "half_width": half,
                          "target": -allowed, "said": met})  # fmt: skip
    return found


def claims(runs: Runs) -> list[dict[str, Any]]:
    found = []
    for claim, one, other in CLAIMS:
        if apart(runs, one, other):
            points, half = mean(apart(runs, one, other))
            said = "better" if points > half else "worse" if points < -half else ""
            found.append({"claim": claim, "pair": f"{one} - {other}", "points": points,
                          "half_width": half, "said": said or "no difference shown"})  # fmt: skip
    return found


def signed(points: float, half: float) -> str:
    if np.isnan(half):
        return f"{points:+.2f}"
    return f"{points:+.2f} ± {half:.2f}"


def page(found: dict[str, Runs], head: str, style: Any) -> str:
    """All tables, and below them what they mean."""
    parts = [target_table(found, style)]
    for name, runs in found.items():
        seeds = ", ".join(str(run["seed"]) for run in runs)
        parts += [f"{name}, {runs[0]['settings']['epochs']} epochs; seeds {seeds}."]
        parts += [accuracy_table(runs, style), claim_table(runs, style)]
    parts += [noise_table(found, style), program_table(found, style)]
    parts += [*left_words(found), *sensitivity_words(found)]
    parts.append(
        "Points: differences of accuracy, paired by seed, with their 95% interval. Same class: of "
        "all test images, as float32. SNR: of the logits against float32's. Shifts: all scales "
        "are powers of two. Trained on: one more epoch in float32, the control of QAT, which has "
        "the same. Hard: the same function with the ranges of one tensor's channels 1000-fold "
        "apart, min-max calibration; MobileNet has none, since a relu6 passes no factor on. Per "
        "layer: the result of each convolution or dot product behind its bias and batch norm, in "
        "the whole quantized network against the float one. Compiled: an s8 that XLA:CPU widens "
        "to s32 before its own convolution is s32 there."
    )
    return common.paragraphs(head, *parts)


def target_table(found: dict[str, Runs], style: Any) -> str:
    lines = [
        (name, t["row"], signed(t["points"], t["half_width"]), f"{t['target']:+.1f}", t["said"])
        for name, runs in found.items()
        for t in targets(name, runs)
    ]
    columns = ("network", "variant", "points from float32", "target: at least", "")
    return jx.measure.table(columns, lines, style)


def accuracy_table(runs: Runs, style: Any) -> str:
    lines = []
    for row in rows(runs):
        accuracy, half = mean(values(runs, row).values())
        means = (values(runs, row, what).values() for what in ("agreement", "decibels"))
        same, ratio = (mean(each)[0] for each in means)
        points = signed(*mean(apart(runs, row)))
        lines.append(
            (row, signed(accuracy, half)[1:], points if row != "float32" else "",
             f"{same:.2f}", f"{ratio:.1f}" if ratio < 100 else "", len(apart(runs, row)))
        )  # fmt: skip
    columns = ("variant", "accuracy, %", "points from float32", "same class, %", "SNR, dB",
               "seeds")  # fmt: skip
    return jx.measure.table(columns, lines, style)


def claim_table(runs: Runs, style: Any) -> str:
    lines = [
        (c["claim"], c["pair"], signed(c["points"], c["half_width"]), c["said"])
        for c in claims(runs)
    ]
    return jx.measure.table(("claim", "pair", "points", "verdict"), lines, style)


def noises(runs: Runs, tool: str) -> dict[str, float]:
    """Decibels of each layer, mean of the seeds."""
    found = [run["noise"][tool] for run in runs if "noise" in run]
    return {path: float(np.mean([one[path] for one in found])) for path in found[0]}


def noise_table(found: dict[str, Runs], style: Any) -> str:
    lines = []
    for name, runs in found.items():
        if any("noise" in run for run in runs):
            ours, theirs = noises(runs, OURS), noises(runs, QWIX)
            below = [path for path in ours if ours[path] <= theirs[path]]
            both = (f"{f(one.values()):.1f}" for one in (ours, theirs) for f in (low, middle))
            over = low([ours[path] - theirs[path] for path in ours])
            said = "met" if not below else f"missed in {len(below)} layers"
            lines.append((name, len(ours), *both, f"{over:+.1f}", said))
    columns = ("network", "layers", "int8: least dB", "median", "Qwix static: least", "median",
               "least difference", "every layer above Qwix's")  # fmt: skip
    return jx.measure.table(columns, lines, style) if lines else ""


def low(numbers: Iterable[float]) -> float:
    return min(numbers)


def middle(numbers: Iterable[float]) -> float:
    return float(np.median([*numbers]))


def program_table(found: dict[str, Runs], style: Any) -> str:
    """How many convolutions and dot products of each program are on integers."""
    lines = []
    for name, runs in found.items():
        for tool, one in next((run["programs"] for run in runs if "programs" in run), {}).items():
            layers = str(len(one["on integers"])) if "on integers" in one else ""
            left = str(len(one["left"])) if "left" in one else ""
            counts = (counted(one[where]) for where in ("StableHLO", "compiled"))
            lines.append((name, tool, layers, left, *counts))
    columns = ("network", "program", "layers on integers", "left", "StableHLO", "compiled")
    return jx.measure.table(columns, lines, style) if lines else ""


def counted(found: dict[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(found.items()))


def left_words(found: dict[str, Runs]) -> Iterable[str]:
    for name, runs in found.items():
        left = next((run["programs"][OURS]["left"] for run in runs if "programs" in run), [])
        reasons = {f"{where} ({reason})": None for where, _, reason in left}
        if reasons:
            yield f"{name}, left in floating point: {', '.join(reasons)}."


def sensitivity_words(found: dict[str, Runs]) -> Iterable[str]:
    for name, runs in found.items():
        one = next((run["sensitivity"] for run in runs if "sensitivity" in run), None)
        if one:
            left = ", ".join(one["left"]) or "none"
            yield (
                f"{name}, mixed (powers of two, min-max, at most {one['max_drop']} points on "
                f"validation images, first seed; {one['machine']}): {one['on integers']} layers "
                f"on integers; left in floating point: {left}."
            )


def plot(path: Path, found: dict[str, Runs]) -> None:
    """Points from float32, by row."""
    figure = Figure(figsize=(1.5 + 4 * len(found), 6), layout="constrained")
    panels = figure.subplots(1, len(found), sharex=True, sharey=True, squeeze=False)[0]
    shown = [row for row in rows(next(iter(found.values()))) if row not in ("float32", *HARD)]
    for axes, (name, runs) in zip(panels, found.items(), strict=True):
        for place, row in enumerate(shown):
            if row not in rows(runs):
                continue
            each = apart(runs, row)
            points, half = mean(each)
            axes.errorbar(points, place, xerr=half, fmt="o", capsize=4, color="C0")
            axes.scatter(each, [place] * len(each), s=12, color="C1", alpha=0.7, zorder=3)
        axes.axvline(0, color="black", linewidth=0.8)
        axes.set_xscale("symlog", linthresh=1)
        marks = [-10, -3, -1, -0.5, 0, 0.5, 1]
        axes.set_xticks(marks, [str(mark) if mark % 1 == 0 else "" for mark in marks])
        axes.set_xlim(-25, 1)
        axes.set_yticks(range(len(shown)), shown)
        axes.set_xlabel("points of test accuracy from float32")
        axes.set_title(name, fontsize=10)
        axes.grid(alpha=0.3, axis="x")
    panels[0].invert_yaxis()
    figure.suptitle(
        "cluttered digits: mean and 95% interval (blue), each seed (orange); linear up to 1\n"
        f"{machines(found)}",
        fontsize=8,
    )
    figure.savefig(path, dpi=130)


def plot_layers(path: Path, found: dict[str, Runs]) -> None:
    """Above the noise of each layer, below what it costs alone in 8 bits."""
    figure = Figure(figsize=(1.5 + 4.5 * len(found), 7), layout="constrained")
    for axes, (name, runs) in zip(figure.subplots(2, len(found), squeeze=False).T,
                                  found.items(), strict=True):  # fmt: skip
        one = runs[0].get("sensitivity")
        axes[1].set_visible(one is not None)
        if "noise" not in runs[0]:
            continue
        order = [*noises(runs, OURS)]
        for tool in (OURS, QWIX):
            axes[0].plot([noises(runs, tool)[p] for p in order], "o-", markersize=3, label=tool)
        axes[0].set_title(f"{name}: all layers in 8 bits", fontsize=10)
        axes[0].set_ylabel("signal to noise of the layer, dB")
        axes[0].legend()
        if one:
            drops = {path: one["original"] - score for path, score in one["layers"].items()}
            axes[1].bar(range(len(order)), [drops.get(path, 0) for path in order])
        axes[1].set_title("that layer alone in 8 bits: powers of two, min-max", fontsize=10)
        axes[1].set_ylabel("drop of validation accuracy, points")
        for panel in axes:
            panel.set_xlabel("layer, in the order of the network")
            panel.xaxis.get_major_locator().set_params(integer=True)
            panel.grid(alpha=0.3)
    figure.suptitle(f"cluttered digits; above: mean of the seeds, below: the first seed\n"
                    f"{machines(found)}", fontsize=8)  # fmt: skip
    figure.savefig(path, dpi=130)
