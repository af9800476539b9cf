"""Tables and plots of `experiments.benchmark`, from its records alone."""

from pathlib import Path
from typing import Any

import numpy as np

import jaxaccel as jx
from experiments import common

Row = dict[str, Any]
Record = dict[str, Any]

HEADLINE = (
    *("case", "precision", "jaxaccel, ms", "images/s", "times plain Flax", "times the best peer"),
    *("best peer", "times the best int8 peer", "target", "met"),
)
DETAILS = (
    *("case", "candidate", "mode", "check", "ms", "quartiles", "images/s", "of plain's speed"),
    *("GFLOP/s", "of the limit", "first call, s", "compile, s"),
)
MARKERS = {
    "plain Flax": "x",
    "jaxaccel": "*",
    "jaxaccel, rules": "P",
    "torch": "o",
    "torch.compile": "s",
    "onnxruntime": "^",
    "openvino": "D",
    "onnxruntime, int8": "v",
    "openvino, int8": "d",
}


def timed(record: Record, family: str, precision: str) -> list[Row]:
    """The rows that were timed of a family: plain, jaxaccel or peer."""
    wanted = (family, precision)
    return [r for r in record["rows"] if "seconds" in r and (r["family"], r["precision"]) == wanted]


def ours(record: Record, precision: str = "float32") -> Row | None:
    """jaxaccel's headline: what `jx.autotune` chose by measuring."""
    found = [r for r in timed(record, "jaxaccel", precision) if "rules" not in r["candidate"]]
    return found[0] if found else None


def best(rows: list[Row]) -> Row | None:
    """The one with the lowest median time."""
    return min(rows, key=lambda row: np.median(row["seconds"]), default=None)


def times(own: Row | None, other: Row | None) -> list[float] | None:
    """How many times as fast `own` is, round by round: lower quartile, median, upper quartile."""
    if own is None or other is None:
        return None
    ratios = np.divide(other["seconds"], own["seconds"])
    return [float(value) for value in np.percentile(ratios, (25, 50, 75))]


def verdict(record: Record, precision: str = "float32") -> dict[str, Any]:
    """What the headline says of a case."""
    own = ours(record, precision)
    plain = best(timed(record, "plain", "float32"))
    peer = best(timed(record, "peer", precision))
    found = {
        "own": own,
        "peer": peer and peer["candidate"],
        "plain_times": times(own, plain),
        "peer_times": times(own, peer),
        "int8_times": times(own, best(timed(record, "peer", "int8"))),
    }
    targets = record["targets"] if precision == "float32" else {}
    met = {
        kind: bool(found[f"{kind}_times"] and found[f"{kind}_times"][1] >= target)
        for kind, target in targets.items()
    }
    return found | {"targets": targets, "met": met}


def said(met: dict[str, bool]) -> str:
    """Of targets: all met, or those that are not."""
    missed = [name for name, reached in met.items() if not reached]
    if not met:
        return "-"
    return f"no: {', '.join(missed)}" if missed else "yes"


def words(records: list[Record]) -> list[str]:
    """Over all cases: the speed against plain Flax and the peers, and the targets."""
    found = [(r["case"], verdict(r, precision)) for r in records for precision in precisions(r)]
    sentences = []
    for kind, whom in (
        ("plain", "plain Flax"),
        ("peer", "the best peer"),
        ("int8", "the best int8 peer (itself in float32)"),
    ):
        speeds = [times[1] for _, one in found if (times := one[f"{kind}_times"])]
        if speeds:
            sentences.append(
                f"jaxaccel is {min(speeds):.2f} to {max(speeds):.2f} times as fast as {whom}: "
                f"faster in {sum(speed > 1 for speed in speeds)} of {len(speeds)} cases."
            )
    low = [(case, one) for case, one in found if not all(one["met"].values())]
    missed = [f"{case} ({target_words(one)})" for case, one in low]
    asked = sum(bool(one["met"]) for _, one in found)
    sentences.append(
        f"Targets are met in {asked - len(missed)} of {asked} cases that have them"
        f"{'; missed in ' if missed else ''}{', '.join(missed)}."
    )
    return sentences


def target_words(found: dict[str, Any]) -> str:
    """The targets that are missed."""
    low = [kind for kind, met in found["met"].items() if not met]
    times = {kind: (found[f"{kind}_times"] or [0, 0])[1] for kind in low}  # 0: not timed
    return ", ".join(f"{kind}: {times[kind]:.2f} of {found['targets'][kind]:g}" for kind in low)


def precisions(record: Record) -> list[str]:
    """Those that have a line of their own in the headline."""
    found = [r["precision"] for r in record["rows"] if r["family"] == "jaxaccel"]
    return list(dict.fromkeys(found))


def headline(records: list[Record]) -> list[tuple]:
    """A line for each case, against plain Flax and the best peer."""
    lines = []
    for record in records:
        for precision in precisions(record):
            found = verdict(record, precision)
            own = found["own"]
            ms = np.median(own["seconds"]) * 1e3 if own else None
            speeds = (f"{ms:.2f}", f"{1e3 * record['batch'] / ms:,.0f}") if ms else (None, None)
            asked = [f"{name} {target:g}" for name, target in found["targets"].items()]
            lines.append(
                (
                    *(record["case"], precision, *speeds),
                    *(_spread(found["plain_times"]), _spread(found["peer_times"])),
                    *(found["peer"] or "-", _spread(found["int8_times"], missing="-")),
                    *(", ".join(asked) or "-", said(found["met"])),
                )
            )
    return lines


def _spread(values: list[float] | None, missing: str | None = None) -> str | None:
    return "{1:.2f} ({0:.2f}-{2:.2f})".format(*values) if values else missing


def details(records: list[Record], limits: dict[str, Any]) -> list[tuple]:
    """A line for each candidate, also for those that were not timed."""
    return [_detail(record, row, limits) for record in records for row in record["rows"]]


def _detail(record: Record, row: Row, limits: dict[str, Any]) -> tuple:
    names = (record["case"], row["candidate"], row["mode"] or "-", check(row))
    if "seconds" not in row:
        return *names, *[None] * (len(DETAILS) - len(names))
    low, middle, high = np.percentile(row["seconds"], (25, 50, 75)) * 1e3
    speed = times(row, best(timed(record, "plain", "float32")))
    compiled = row["compile_s"]
    return (
        *names,
        *(f"{middle:.2f}", f"{low:.2f}-{high:.2f}", f"{1e3 * record['batch'] / middle:,.0f}"),
        *(f"{speed[1]:.2f}" if speed else None, f"{rate(record, row):.1f}"),
        f"{rate(record, row) / roof(record, row, limits):.1%}",
        *(f"{row['first_s']:.2f}", "-" if compiled is None else f"{compiled:.2f}"),
    )


def check(row: Row) -> str:
    """What became of the comparison with plain Flax."""
    if row["status"] == "failed":
        return f"failed: {row['error']}"
    same = "" if row["agreement"] is None else f", same class {row['agreement']:.0%}"
    if row["candidate"] == "plain Flax":
        return "reference"
    return f"{row['status']}: differs by {row['difference']:.0e}{same}"


def rate(record: Record, row: Row) -> float:
    """GFLOP/s, by the FLOPs of the plain form."""
    return 1e-9 * record["flops"] / float(np.median(row["seconds"]))


def intensity(record: Record) -> float:
    """FLOP per byte of arguments and results."""
    return record["flops"] / record["bytes"]


def roof(record: Record, row: Row, limits: dict[str, Any]) -> float:
    """GFLOP/s that the machine's own limits allow."""
    gflops = limits["gflops"]
    peak = gflops.get(row["precision"], gflops["float32"])[0]
    return min(peak, intensity(record) * limits["gigabytes"][0])


def limit_line(limits: dict[str, Any]) -> str:
    """The measured limits in words."""
    peaks = [
        f"{dtype} products {value:,.0f} GFLOP/s ({how})"
        for dtype, (value, how) in limits["gflops"].items()
    ]
    value, how = limits["gigabytes"]
    return f"The machine's limits: {', '.join(peaks)}; copies {value:.1f} GB/s ({how})."


def plots(records: list[Record], limits: dict[str, Any], folder: Path) -> None:
    """The roofline, and the speed over the best peer."""
    _roofline(records, limits, folder / "benchmark-roofline.png")
    _bars(records, folder / "benchmark-peers.png")


def _roofline(records: list[Record], limits: dict[str, Any], path: Path) -> None:
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import LogLocator, NullFormatter

    figure = Figure(figsize=(13, 6.2))
    both = figure.subplots(1, 2, sharex=True, sharey=True)
    at = [intensity(record) for record in records]
    ridge = max(peak for peak, _ in limits["gflops"].values()) / limits["gigabytes"][0]
    low, high = 0.5 * min(*at, 0.2 * ridge), 2 * max(*at, ridge)
    for axes, (train, title) in zip(both, ((True, "training"), (False, "inference")), strict=True):
        chosen = [record for record in records if record["train"] is train]
        for n, record in enumerate(chosen):
            _points(axes, record, f"C{n}")
        _roofs(axes, limits, low, high)
        shown = [Line2D([], [], color=f"C{n}", label=r["case"]) for n, r in enumerate(chosen)]
        axes.legend(handles=shown, fontsize=7, loc="upper left")  # above the roof nothing is
        axes.set(title=title, xscale="log", yscale="log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("FLOP per byte of arguments and results, as written in plain Flax")
        axes.grid(alpha=0.3, which="both")
    both[0].set_ylabel("GFLOP/s (those FLOPs over the median time)")
    kinds = dict.fromkeys(r["candidate"] for x in records for r in x["rows"] if "seconds" in r)
    style: dict[str, Any] = {"color": "0.3", "linestyle": "", "markerfacecolor": "none"}
    marks = [Line2D([], [], marker=_marker(kind), label=kind, **style) for kind in kinds]
    figure.legend(handles=marks, ncols=5, loc="lower center", fontsize=8, frameon=False)
    figure.suptitle(common.machine_line(), fontsize=9)
    figure.tight_layout(rect=(0, 0.08, 1, 1))
    figure.savefig(path, dpi=130)


def _points(axes: Any, record: Record, color: str) -> None:
    for row in record["rows"]:
        if "seconds" in row:
            marker = _marker(row["candidate"])
            ours = row["family"] == "jaxaccel"
            look = {"markerfacecolor": color if ours else "none", "markersize": 11 if ours else 7}
            axes.plot(
                intensity(record), rate(record, row), color=color, marker=marker, ls="", **look
            )


def _marker(candidate: str) -> str:
    return MARKERS.get(candidate.removesuffix(", bfloat16"), "h")


def _roofs(axes: Any, limits: dict[str, Any], low: float, high: float) -> None:
    """Slanted where copies are the limit, flat where arithmetic is."""
    x = np.geomspace(low, high, 200)
    bandwidth = limits["gigabytes"][0]
    for dtype, (peak, _) in limits["gflops"].items():
        axes.plot(x, np.minimum(peak, bandwidth * x), color="black", linewidth=1)
        axes.annotate(
            f"{dtype} products, {peak:,.0f} GFLOP/s", (1.2 * peak / bandwidth, peak), (0, -10),
            textcoords="offset points", fontsize=7,
        )  # fmt: skip


def _bars(records: list[Record], path: Path) -> None:
    from matplotlib.figure import Figure

    lines = [(r, precision) for r in records for precision in precisions(r)]
    figure = Figure(figsize=(9, 1.6 + 0.5 * len(lines)))
    axes = figure.subplots()
    largest = 1.0
    for n, (record, precision) in enumerate(lines):
        peer = best(timed(record, "peer", precision))
        plain = best(timed(record, "plain", "float32"))
        for offset, row, color in ((-0.2, ours(record, precision), "C0"), (0.2, plain, "0.7")):
            if (found := times(row, peer)) is not None:
                low, middle, high = found
                error = [[middle - low], [high - middle]]
                axes.barh(n + offset, middle, 0.38, xerr=error, color=color, capsize=2)
                axes.text(high, n + offset, f"  {middle:.2f}", va="center", fontsize=8)
                largest = max(largest, high)
    axes.axvline(1, color="black", linewidth=0.8)
    # Empty bars, so that the legend has both whatever was timed.
    for label, color in (("jaxaccel", "C0"), ("plain Flax", "0.7")):
        axes.barh(0, 0, color=color, label=label)
    axes.set_yticks(range(len(lines)), [_tick(*line) for line in lines], fontsize=8)
    axes.set_ylim(len(lines) - 0.5, -0.5)
    axes.set_xlim(0, 1.15 * largest)
    axes.set_xlabel("speed over the best peer's (1: the same; median and quartiles of rounds)")
    figure.legend(loc="upper right", ncols=2, fontsize=8, frameon=False)
    figure.text(0.01, 0.99, common.machine_line(), fontsize=7, va="top")
    figure.tight_layout(rect=(0, 0, 1, 0.95))
    figure.savefig(path, dpi=130)


def _tick(record: Record, precision: str) -> str:
    peer = best(timed(record, "peer", precision))
    name = peer["candidate"] if peer else "no peer"
    return f"{record['case']}\n{precision}, against {name}"


def page(records: list[Record], limits: dict[str, Any], head: str, note: str, style: Any) -> str:
    """The whole text."""
    table = jx.measure.table
    parts = (
        table(HEADLINE, headline(records), style),
        table(DETAILS, details(records, limits), style),
    )
    return common.paragraphs(head, *parts, limit_line(limits), note)
