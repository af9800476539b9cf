"""Optimizer x width x depth x augmentation: accuracy and training time of the ConvNet.

    python -m experiments.optimizers

Each cell trains on the same images in the same order for the same number of steps, from the same
seeds; validation images choose nothing, the test set is read once per network. Learning rates are
each optimizer's usual one for this size of network, one-cycle cosine, not tuned per cell.
"""

import itertools
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import optax
from flax import nnx
from matplotlib.figure import Figure

import jaxaccel as jx
from experiments import common, mnist

OPTIMIZERS = {
    "SGD": (lambda schedule: optax.sgd(schedule, momentum=0.9, nesterov=True), 0.05),
    "Adam": (optax.adam, 2e-3),
    "Adagrad": (optax.adagrad, 0.02),
}
WIDTHS = (8, 16)  # channels of the first convolution; each further one doubles them
DEPTHS = (1, 2)  # convolutions
COLUMNS = ("optimizer", "width", "depth", "augmented", "parameters", "accuracy, %", "95%", "s")


def augmentation() -> Any:
    return jx.augment.random_rotation(15, "bilinear")


def cell(splits: jx.data.Splits, setting: tuple, epochs: int, seed: int) -> tuple[float, float]:
    """Test accuracy in percent and seconds of training, compilation left out."""
    optimizer, width, depth, augmented = setting
    make, rate = OPTIMIZERS[optimizer]
    train = jx.data.device_loader(splits.train, 64, seed=seed)
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
    widths = tuple(width * 2**i for i in range(depth))
    shape = splits.train.image.shape[1:]
    return jx.nn.ConvNet(input_shape=shape, widths=widths, rngs=nnx.Rngs(seed))


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
    parser.add_argument("--images", type=common.positive, default=4000, help="training images")
    parser.add_argument("--epochs", type=common.positive, default=6)
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
    print(f"\n{head}\n\n{jx.measure.table(COLUMNS, lines)}")
    text = f"{head}\n\n{jx.measure.table(COLUMNS, lines, 'markdown')}\n"
    (folder / "optimizers.md").write_text(text)
    common.write_json(folder / "optimizers.json", {"about": head, "rows": rows})
    plot(folder / "optimizers.png", rows, f"ConvNet on {args.dataset}; {common.machine_line()}")


if __name__ == "__main__":
    main()
