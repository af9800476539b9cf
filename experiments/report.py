"""The main job's report: report.html (self-contained), report.md, plots and results.json."""

import base64
import html
import statistics
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

import jaxaccel as jx
from experiments import common
from jaxaccel._graph import leaf_paths

Rows = list[dict[str, Any]]
COLUMNS = (
    "network",
    "accuracy",
    "MACs",
    "parameters",
    "non-zero",
    "bytes",
    "zlib bytes",
    "ms, batch 1",
    "ratio",
    "ms, batch 128",
    "ratio",
)
# A ratio whose quartiles reach into this band is called unchanged.
SAME = (0.95, 1.05)


class Samples(NamedTuple):
    """Test images with what the last network says of them."""

    images: np.ndarray
    labels: np.ndarray
    predictions: np.ndarray


def samples(fn: Callable, params: Any, test: jx.data.Arrays, count: int = 24) -> Samples:
    """The first test images, half of them mistakes where there are as many."""
    images, labels = test.image[:2000], test.label[:2000]
    predictions = np.asarray(jax.jit(fn)(params, common.scaled(images)).argmax(-1))
    wrong = np.flatnonzero(predictions != labels)[: count // 2]
    right = np.flatnonzero(predictions == labels)[: count - len(wrong)]
    chosen = np.concatenate([right, wrong])
    return Samples(images[chosen], labels[chosen], predictions[chosen])


def table(rows: Rows, style: str = "text") -> str:
    """One line per network; ratios are to the first."""
    lines = [
        (
            row["name"],
            f"{row['accuracy']:.4f}",
            *(f"{row[key]:,}" for key in ("macs", "parameters", "nonzero", "bytes")),
            f"{row['compressed_bytes']:,}",
            *(f"{row[key]:.3f}" for key in ("ms_1", "ratio_1", "ms_128", "ratio_128")),
        )
        for row in rows
    ]
    return jx.measure.table(COLUMNS, lines, style)  # pyright: ignore[reportArgumentType]


def shapes(before: Any, after: Any) -> list[tuple[str, str, str]]:
    """The kernels that pruning made smaller, each with both of its shapes."""
    pairs = zip(leaf_paths(before).items(), jax.tree.leaves(after), strict=True)
    written = lambda leaf: "x".join(map(str, leaf.shape))
    return [
        (path, written(leaf), written(small))
        for (path, leaf), small in pairs
        if leaf.ndim > 1 and leaf.shape != small.shape
    ]


def shape_table(facts: dict[str, Any], style: str = "text") -> str:
    """What `shapes` found, as a table."""
    return jx.measure.table(("kernel", "distilled", "pruned"), facts["shapes"], style)  # pyright: ignore[reportArgumentType]


def verdicts(rows: Rows) -> list[str]:
    """What each network bought and what it did not, against the teacher and the one before it."""
    texts = [f"{rows[0]['name']}: {rows[0]['method']}. The baseline of all ratios."]
    for before, row in pairwise(rows):
        texts.append(f"{row['name']}: {row['method']}. {_verdict(rows[0], row)}")
        if row["name"] != "student":
            texts[-1] += f" Against {before['name']}: {_verdict(before, row)}"
    return texts


def _verdict(base: dict[str, Any], row: dict[str, Any]) -> str:
    points = 100 * (row["accuracy"] - base["accuracy"])
    parts = [f"accuracy {points:+.2f} points"]
    for key, name in (("macs", "MACs"), ("bytes", "bytes"), ("compressed_bytes", "zlib bytes")):
        parts.append(_factor(name, base[key] / row[key]))
    parts += [_speed(base, row, size) for size in (1, 128)]
    return "; ".join(parts) + "."


def _factor(name: str, factor: float) -> str:
    if SAME[0] <= factor <= SAME[1]:
        return f"{name} unchanged"
    return f"{factor:.1f}x fewer {name}" if factor > 1 else f"{1 / factor:.1f}x more {name}"


def _speed(base: dict[str, Any], row: dict[str, Any], size: int) -> str:
    key, where = f"rounds_ms_{size}", f"at batch {size}"
    ratios = [own / other for own, other in zip(row[key], base[key], strict=True)]
    low, ratio, high = statistics.quantiles(ratios, n=4)
    if low <= SAME[1] and high >= SAME[0]:
        return f"no faster {where} ({ratio:.2f} of the time)"
    if ratio < 1:
        return f"{1 / ratio:.1f}x faster {where}"
    return f"{ratio:.1f}x slower {where}"


def write(
    folder: Path, rows: Rows, shown: Samples, facts: dict[str, Any], findings: common.Findings
) -> None:
    """Every file of the report."""
    common.write_json(folder / "results.json", {**facts, "networks": rows}, findings)
    figures = {
        "tradeoff.png": _tradeoff(rows, facts),
        "training.png": _training(rows),
        "predictions.png": _predictions(shown),
    }
    for name, figure in figures.items():
        figure.savefig(folder / name, dpi=130, bbox_inches="tight", pad_inches=0.15)
    (folder / "report.md").write_text(_markdown(rows, facts, list(figures)))
    (folder / "report.html").write_text(_html(folder, rows, facts, list(figures)))


def _summary(facts: dict[str, Any]) -> str:
    return (
        f"{facts['dataset']}: {facts['sizes']}. {facts['epochs']} epochs a network, seed "
        f"{facts['seed']}, {facts['seconds']} s in all. {common.machine_line()}. One run is one "
        "sample: experiments.accuracy gives intervals over seeds. Ratio: time over the first "
        "row's, measured interleaved. MACs: half of the compiler's FLOPs for one image; for int8 "
        "they include what brings every sum back to 8 bits, in the form that is run."
    )


def _markdown(rows: Rows, facts: dict[str, Any], figures: list[str]) -> str:
    said = "\n".join(f"- {text}" for text in verdicts(rows))
    images = "\n".join(f"![{name}]({name})" for name in figures)
    tables = table(rows, "markdown"), shape_table(facts, "markdown")
    parts = ["# Digits, compressed", _summary(facts), *tables, said, images]
    return "\n\n".join(parts) + "\n"


STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:72rem;margin:2rem auto;padding:0 1rem}"
    "table{border-collapse:collapse;display:block;overflow-x:auto}"
    "td,th{padding:.3rem .7rem;border-bottom:1px solid #ccc;text-align:right;white-space:nowrap}"
    "td:first-child,th:first-child{text-align:left}img{max-width:100%}"
)


def _html(folder: Path, rows: Rows, facts: dict[str, Any], figures: list[str]) -> str:
    said = "".join(f"<li>{html.escape(text)}</li>" for text in verdicts(rows))
    images = "".join(
        f'<p><img alt="{name}" src="data:image/png;base64,{_base64(folder / name)}"></p>'
        for name in figures
    )
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>Digits, compressed</title>'
        f"<style>{STYLE}</style><h1>Digits, compressed</h1><p>{html.escape(_summary(facts))}</p>"
        f"{_html_table(table(rows, 'markdown'))}{_html_table(shape_table(facts, 'markdown'))}"
        f"<ul>{said}</ul>{images}</html>\n"
    )


def _html_table(markdown: str) -> str:
    head, _, *lines = [line.strip("| ").split("|") for line in markdown.splitlines()]
    row = lambda kind, cells: "".join(f"<{kind}>{html.escape(c.strip())}</{kind}>" for c in cells)
    body = "".join(f"<tr>{row('td', line)}</tr>" for line in lines)
    return f"<table><tr>{row('th', head)}</tr>{body}</table>"


def _base64(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()


def _tradeoff(rows: Rows, facts: dict[str, Any]) -> Figure:
    figure = Figure(figsize=(11, 4.4))
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, key, label in (
        (left, "compressed_bytes", "parameters after zlib, kB"),
        (right, "ms_128", "latency of a batch of 128, ms"),
    ):
        for i, row in enumerate(rows):
            x = row[key] / 1000 if key.endswith("bytes") else row[key]
            # Open markers of different shapes: networks often lie on top of each other.
            look = {"marker": "osD^v"[i % 5], "facecolor": "none", "edgecolor": f"C{i}"}
            axes.scatter(x, 100 * row["accuracy"], s=90, linewidth=2, label=row["name"], **look)
        axes.set_xlim(left=0)
        axes.set_xlabel(label)
        axes.grid(alpha=0.3)
    left.set_ylabel("test accuracy, %")
    right.legend(title="network", loc="best")
    figure.suptitle(f"{facts['dataset']}, {common.machine_line()}", fontsize=10)
    figure.tight_layout()
    return figure


def _training(rows: Rows) -> Figure:
    figure = Figure(figsize=(11, 3.6))
    axes = figure.subplots()
    for row in rows:
        if curve := row["validation_curve"]:
            epochs, values = range(1, len(curve) + 1), [100 * a for a in curve]
            axes.plot(epochs, values, marker=".", label=row["name"])  # a line of one point is none
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel="epoch", ylabel="validation accuracy, %")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    return figure


def _predictions(shown: Samples) -> Figure:
    figure = Figure(figsize=(11, 3.2))
    grid = figure.subplots(2, (len(shown.labels) + 1) // 2, squeeze=False)
    for axes in grid.flat:
        axes.axis("off")
    for axes, image, label, said in zip(grid.flat, *shown, strict=False):
        axes.imshow(image.squeeze(), cmap="gray")
        right = label == said
        text = f"{said}" if right else f"{said}, is {label}"
        axes.set_title(text, color="black" if right else "crimson", fontsize=9)
    figure.suptitle("what the int8 network says of test images; mistakes in red", fontsize=10)
    return figure
