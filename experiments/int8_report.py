"""Tables and the plot of `experiments.int8_speed`, from its records alone."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

import jaxaccel as jx
from experiments import common

FLOAT, PLAIN = "float32", "plain"
OURS = ("int8", "int8, fastest", "pruned, int8", "pruned, int8, fastest")


def page(records: list[dict[str, Any]], head: str, style: Any) -> str:
    """The whole text."""
    cases = [record for record in records if "side" not in record]
    chains = [record for record in records if "side" in record]
    parts = [head]
    for kind, found, speed, quality in (
        ("case", cases, "times float32", "same class"),
        ("chain", chains, "times plain", "accuracy, %"),
    ):
        if found:
            columns = (kind, "candidate", "ms", "quartiles", speed, quality, "")
            lines = [line(record, row) for record in found for row in record["rows"]]
            parts += [jx.measure.table(columns, lines, style), *map(said, found)]
    return common.paragraphs(*parts)


def line(record: dict[str, Any], row: dict[str, Any]) -> tuple[object, ...]:
    """A candidate in a case or a chain."""
    names = record["name"], row["candidate"]
    quality = f"{row['accuracy']:.2f}" if "accuracy" in row else None
    if "agreement" in row and quality is None:
        quality = f"{row['agreement']:.0%}"
    if "seconds" not in row:
        return (*names, None, None, None, quality, f"failed: {row['error']}")
    low, middle, high = 1e3 * np.percentile(row["seconds"], (25, 50, 75))
    reference = record["rows"][0]["candidate"]
    speed = spread(times(record, row["candidate"], reference))
    return (*names, f"{middle:.2f}", f"{low:.2f}-{high:.2f}", speed, quality, row["mode"])


def times(record: dict[str, Any], own: str, other: str) -> np.ndarray | None:
    """How many times as fast one is as another, round by round: quartiles, the median between."""
    rows = {row["candidate"]: row["seconds"] for row in record["rows"] if "seconds" in row}
    if own not in rows or other not in rows:
        return None
    return np.percentile(np.divide(rows[other], rows[own]), (25, 50, 75))


def spread(values: np.ndarray | None) -> str:
    return "-" if values is None else "{1:.2f} ({0:.2f}-{2:.2f})".format(*values)


def best(record: dict[str, Any]) -> str:
    """The fastest of ours, by its median."""
    rows = [r for r in record["rows"] if "seconds" in r and r["candidate"] in OURS]
    return min(rows, key=lambda row: np.median(row["seconds"]))["candidate"]


def said(record: dict[str, Any]) -> str:
    """The target and the peers, in words."""
    own, reference = best(record), record["rows"][0]["candidate"]
    found = times(record, own, reference)
    assert found is not None
    met = "met" if found[1] >= record["target"] else "missed"
    peers = [
        f"{spread(times(record, own, row['candidate']))} of {row['candidate']}"
        for row in record["rows"]
        if row["candidate"] not in (*OURS, FLOAT, PLAIN, "pruned") and "seconds" in row
    ]
    return (
        f"{record['name']}, {own}: {found[1]:.2f} times as fast as {reference}, target "
        f"{record['target']:g}: {met}; times as fast as the peers: {', '.join(peers) or '-'}."
    )


def words(records: list[dict[str, Any]]) -> list[str]:
    """Over all cases and chains: the speed, the targets, and the peers."""
    sentences = []
    for what, found in (
        (f"int8, times as fast as {FLOAT}", [r for r in records if "side" not in r]),
        (f"Pruned and int8, times as fast as {PLAIN}", [r for r in records if "side" in r]),
    ):
        if found:
            sentences.append(f"{what}: {', '.join(map(speed_words, found))}.")
            peers = peer_words(found)
            sentences += [f"{what.partition(',')[0]}, beside the peers: {peers}."] if peers else []
    return sentences


def speed_words(record: dict[str, Any]) -> str:
    reference = record["rows"][0]["candidate"]
    found = times(record, best(record), reference)
    assert found is not None
    met = "met" if found[1] >= record["target"] else "missed"
    return f"{record['name']} {found[1]:.2f} (target {record['target']:g}, {met})"


def peer_words(records: list[dict[str, Any]]) -> str:
    speeds: dict[str, list[float]] = {}
    for record in records:
        for row in record["rows"]:
            name = row["candidate"]
            found = times(record, best(record), name)
            if name not in (*OURS, FLOAT, PLAIN, "pruned") and found is not None:
                speeds.setdefault(name, []).append(float(found[1]))
    each = (
        f"{min(own):.2f} to {max(own):.2f} times as fast as {name}, faster in "
        f"{sum(speed > 1 for speed in own)} of {len(own)}"
        for name, own in speeds.items()
    )
    return "; ".join(each)


def plot(path: Path, records: list[dict[str, Any]]) -> None:
    """A panel for each record, a bar for each candidate."""
    columns = 3
    rows = -(-len(records) // columns)
    figure = Figure(figsize=(5 * columns, 2.6 * rows), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes, record in zip(panels, records, strict=False):
        reference = record["rows"][0]["candidate"]
        shown = [row["candidate"] for row in record["rows"] if "seconds" in row]
        for place, name in enumerate(shown):
            found = times(record, name, reference)
            assert found is not None
            low, middle, high = found
            color = "C0" if name in OURS else "C7" if name in (FLOAT, PLAIN, "pruned") else "C1"
            error = [[middle - low], [high - middle]]
            axes.barh(place, middle, xerr=error, color=color, capsize=3)
            axes.text(high, place, f"  {middle:.2f}", va="center", fontsize=7)
        axes.set_yticks(range(len(shown)), shown, fontsize=7)
        axes.set_xlim(0, 1.15 * axes.get_xlim()[1])
        axes.axvline(record["target"], color="C3", linewidth=1, linestyle="--")
        axes.invert_yaxis()
        axes.set_title(f"{record['name']}, batch {record['batch']}", fontsize=9)
        axes.set_xlabel(f"times as fast as {reference}", fontsize=8)
    for axes in panels[len(records) :]:
        axes.set_visible(False)
    figure.suptitle(
        f"int8 (blue), peers (orange), float32 (grey), target (red): median and quartiles\n"
        f"{common.machine_line()}",
        fontsize=9,
    )
    figure.savefig(path, dpi=110)
