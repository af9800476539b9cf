"""Optimizer x width x depth x augmentation: accuracy and training time.

    python -m experiments.optimizers

Each cell trains on the same images in the same order for the same number of steps, from the same
seeds, one-cycle cosine; the test set is read once per network. Each optimizer has one learning
rate, the best on validation images of rates that double from a usual one, at width 12 and depth 6
without augmentation: up to 0.4 for SGD and Adagrad and 0.02 for Adam, where accuracy still rose.

2 cores (AMD EPYC), jax 0.10.2, 3 seeds a cell: experiments/results/optimizers.md.
"""

import itertools
import time
from collections import Counter
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import optax
from flax import nnx
from matplotlib.figure import Figure

import jaxaccel as jx
from experiments import common, mnist, networks

OPTIMIZERS = {
    "SGD": (lambda schedule: optax.sgd(schedule, momentum=0.9, nesterov=True), 0.4),
    "Adam": (optax.adam, 0.02),
    "Adagrad": (optax.adagrad, 0.4),
}
WIDTHS = (8, 12)  # channels of the first convolution; the further ones grow in proportion
DEPTHS = (4, 6)  # convolutions
GROWTH = (1, 4 / 3, 2, 8 / 3, 4, 16 / 3)
COLUMNS = ("optimizer", "width", "depth", "augmented", "parameters", "accuracy, %", "95%", "s")


def augmentation() -> Any:
    return jx.augment.random_rotation(15, "bilinear")


def cell(splits: jx.data.Splits, setting: tuple, epochs: int, seed: int) -> tuple[float, float]:
    """Test accuracy in percent and seconds of training, compilation left out."""
    optimizer, width, depth, augmented = setting
    make, rate = OPTIMIZERS[optimizer]
    train = jx.data.device_loader(splits.train, 64, seed=seed, drop_last=True)
    schedule = optax.cosine_onecycle_schedule(epochs * len(train), rate)
    acc = jx.Accelerator(
        network(splits, width, depth, seed),
        make(schedule),
        augment=augmentation() if augmented else None,
        seed=seed,
    )
    seconds = sum(epoch.seconds for epoch in acc.fit(train, epochs, progress=False)[1:])
    test = jx.data.device_loader(splits.test, 256, shuffle=False)
    return 100 * acc.evaluate(test).accuracy, seconds * epochs / max(epochs - 1, 1)


def network(splits: jx.data.Splits, width: int, depth: int, seed: int) -> nnx.Module:
    widths = tuple(round(width * factor) for factor in GROWTH[:depth])
    channels, classes = splits.train.image.shape[-1], int(splits.train.label.max()) + 1
    return networks.Finder(classes, channels, widths=widths, rngs=nnx.Rngs(seed))


def row(splits: jx.data.Splits, setting: tuple, epochs: int, seeds: range) -> dict[str, Any]:
    found = [cell(splits, setting, epochs, seed) for seed in seeds]
    accuracies, seconds = zip(*found, strict=True)
    mean, half = jx.measure.interval(accuracies)[:2]
    _, params = jx.functional(network(splits, setting[1], setting[2], 0))
    return {
        "optimizer": setting[0],
        "width": setting[1],
        "depth": setting[2],
        "augmented": setting[3],
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "accuracy": mean,
        "half_width": half,
        "accuracies": accuracies,
        "seconds": sorted(seconds)[len(seconds) // 2],
    }


def line(found: dict[str, Any]) -> tuple:
    return (
        found["optimizer"],
        found["width"],
        found["depth"],
        "yes" if found["augmented"] else "no",
        f"{found['parameters']:,}",
        f"{found['accuracy']:.2f}",
        f"± {found['half_width']:.2f}",
        f"{found['seconds']:.1f}",
    )


def findings(results: dict[str, Any]) -> list[str]:
    rows = results["rows"]
    cells: dict[tuple, list[dict[str, Any]]] = {}
    for row in rows:
        cells.setdefault((row["width"], row["depth"], row["augmented"]), []).append(row)
    ranked = [sorted(cell, key=lambda row: -row["accuracy"]) for cell in cells.values()]
    told = sum(
        first["accuracy"] - first["half_width"] > second["accuracy"] + second["half_width"]
        for first, second, *_ in ranked
    )
    best = max(rows, key=lambda row: row["accuracy"])
    means = {(row["optimizer"], row["width"], row["depth"], row["augmented"]): row["accuracy"]
             for row in rows}  # fmt: skip
    gains = [means[(*cell, True)] - means[(*cell, False)] for *cell, turned in means if turned]
    return [
        f"The highest mean in {len(cells)} cells of width, depth and augmentation: "
        f"{counted(cell[0] for cell in ranked)}; the interval of the next is apart in {told}. The "
        f"lowest: {counted(cell[-1] for cell in ranked)}.",
        f"The best: {best['optimizer']}, width {best['width']}, depth {best['depth']}, "
        f"{best['accuracy']:.2f} ± {best['half_width']:.2f}%.",
        f"Augmentation changes the mean by {min(gains):+.2f} to {max(gains):+.2f} points; it is "
        f"higher in {sum(gain > 0 for gain in gains)} of {len(gains)} pairs.",
    ]


def counted(rows: Iterable[dict[str, Any]]) -> str:
    found = Counter(row["optimizer"] for row in rows).most_common()
    return ", ".join(f"{name} in {count}" for name, count in found)


def plot(path: Path, rows: list[dict[str, Any]], title: str) -> None:
    figure = Figure(figsize=(9, 4))
    axes = figure.subplots(1, 2, sharey=True)
    for panel, augmented in zip(axes, (False, True), strict=True):
        for i, optimizer in enumerate(OPTIMIZERS):
            own = [r for r in rows if (r["optimizer"], r["augmented"]) == (optimizer, augmented)]
            x = [j + 0.15 * (i - 1) for j in range(len(own))]
            y, error = [r["accuracy"] for r in own], [r["half_width"] for r in own]
            panel.errorbar(x, y, error, fmt="o", capsize=4, label=optimizer)
        labels = [f"width {w}\ndepth {d}" for w, d in itertools.product(WIDTHS, DEPTHS)]
        panel.set_xticks(range(len(labels)), labels)
        panel.set_title("augmented" if augmented else "not augmented", fontsize=10)
        panel.grid(alpha=0.3, axis="y")
    axes[0].set_ylabel("test accuracy, % (mean, 95% interval)")
    axes[1].legend(loc="lower right")
    figure.suptitle(title, fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=130, bbox_inches="tight", pad_inches=0.15)


def main(argv: list[str] | None = None) -> None:
    parser = common.parser("optimizers", __doc__, "optimizers")
    parser.add_argument("--dataset", default="cluttered", help="as for experiments.mnist")
    parser.add_argument("--data-dir", type=Path, help="where mnist or a prepared TFDS set lies")
    parser.add_argument(
        "--images", type=partial(common.at_least, 64), default=8000, help="for training"
    )
    parser.add_argument("--epochs", type=partial(common.at_least, 2), default=3)
    parser.add_argument("--seeds", type=partial(common.at_least, 2), default=3)
    args = parser.parse_args(argv)
    common.use_device(args.device, parser)
    splits = mnist.load(args.dataset, args.data_dir, parser)
    train = jx.data.arrays(splits.train.image[: args.images], splits.train.label[: args.images])
    splits = splits._replace(train=train)
    folder = common.make_folder(args.out, parser)
    start = time.perf_counter()
    settings = list(itertools.product(OPTIMIZERS, WIDTHS, DEPTHS, (False, True)))
    rows = []
    for setting in settings:
        seeds = range(args.seed, args.seed + args.seeds)
        rows.append(row(splits, setting, args.epochs, seeds))
        print(*line(rows[-1]), flush=True)
    head = (
        f"{args.dataset}: {len(train.label):,} training and {len(splits.test.label):,} test images,"
        f" {args.epochs} epochs, batch 64, {args.seeds} seeds; s: training time, compilation left "
        f"out; {(time.perf_counter() - start) / 60:.0f} min; {common.machine_line()}"
    )
    lines = [line(found) for found in rows]
    results = {"about": head, "rows": rows}
    common.publish(folder / "optimizers", COLUMNS, lines, results, findings, head)
    plot(
        folder / "optimizers.png",
        rows,
        f"3x3 convolutions, batch norm, on {args.dataset}; {common.machine_line()}",
    )


if __name__ == "__main__":
    main()
