"""What int8 costs in accuracy: paired seeds, three networks, beside Qwix and onnxruntime.

    python -m experiments.quantization                      # three networks, 5 seeds, hours
    python -m experiments.quantization --networks ConvNet
    python -m experiments.quantization --again QAT          # the rows of this name anew
    python -m experiments.quantization --report             # tables of what is there so far

A network is trained; what `jx.quantize` makes of it is then read on the whole test set, with
batches of training images for calibration that are the same for all tools. What is trained (the
network; QAT; its control, the float network trained on as long) is kept in `--keep`, every row of
the table in quantization-runs.json: an interrupted run goes on from there. The images are those of
`experiments.pruning`.

The hard case is the same function with factors moved between layers, so that the ranges of the
channels of one tensor differ 1000-fold.

2 cores, jax 0.10.2: experiments/results/quantization.md.
"""

import json
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from itertools import chain, product
from pathlib import Path
from typing import Any

import jax
import numpy as np

import jaxaccel as jx
from experiments import common, pruning, quantization_layers, quantization_peers
from experiments import quantization_report as report
from experiments.quantization_layers import decibels
from experiments.quantization_rows import BATCH as SIZE
from experiments.quantization_rows import (
    BATCHES,
    HARD,
    LATER,
    NETWORKS,
    ROWS,
    Logits,
    Run,
    Trial,
    compiled,
)
from jaxaccel._choices import default_folder

EPOCHS = {"ConvNet": 12, "ResNet-20": 5, "MobileNet": 10}
BATCH = 200  # test images at a time


def logits(run: Run, splits: jx.data.Splits) -> Logits:
    """Of the whole test set."""
    images = splits.test.image
    parts = (images[i : i + BATCH] for i in range(0, len(images), BATCH))
    return np.concatenate([np.asarray(run(common.scaled(part))) for part in parts])


def variants(name: str, later: bool) -> Iterator[tuple[str, Callable[[Trial], Run]]]:
    """By name, how to make each row: those of the first round, or the others."""
    peers = quantization_peers
    for row, made in (LATER if later else ROWS | peers.QWIX).items():
        if row in HARD and name == "MobileNet":
            continue  # a relu6 passes no factor on
        yield row, lambda trial, made=made: compiled(made(trial))
    yield from (peers.ONNXRUNTIME_LATER if later else peers.ONNXRUNTIME).items()


def measured(found: Logits, real: Logits, labels: np.ndarray) -> dict[str, float]:
    """Accuracy, and how near the logits are to those of float32."""
    return {
        "accuracy": 100 * float((found.argmax(-1) == labels).mean()),
        "agreement": 100 * float((found.argmax(-1) == real.argmax(-1)).mean()),
        "decibels": decibels(found, real),
    }


def records(args: Namespace, splits: jx.data.Splits) -> list[dict[str, Any]]:
    """One for each network and seed; rows that the file has at these settings stay."""
    path = args.out / "quantization-runs.json"
    stored = json.loads(path.read_text())["runs"] if path.exists() else []
    found = []
    names: list[str] = args.networks
    pairs = list(product(range(args.seed, args.seed + args.seeds), names))
    for later, (seed, name) in product((False, True), pairs):
        epochs = args.epochs or EPOCHS[name]
        settings = {"epochs": epochs, "train": len(splits.train), "test": len(splits.test)}
        wanted = {"network": name, "seed": seed, "settings": settings}
        run = next((run for run in stored if run.items() >= wanted.items()), None)
        if run is None:
            run = wanted | {"machine": common.machine_line(), "rows": {}}
            stored.append(run)
        trial = Trial(name, seed, splits, epochs, args.keep)
        if args.report:
            found += [run] if run["rows"] and not later else []
            continue
        for _ in chain(rows(trial, run, args.again, later), facts(trial, run, args.again, later)):
            common.store(path, {"runs": stored})
        found += [] if later else [run]
    return found


def rows(trial: Trial, run: dict[str, Any], again: list[str], later: bool) -> Iterator[None]:
    """Adds the rows that the record of a network and a seed lacks, one after the other."""
    real: Logits | None = None
    for row, made in variants(trial.name, later):
        if row in run["rows"] and row not in again:
            continue
        start = time.perf_counter()
        if real is None:
            real = logits(compiled(trial.whole), trial.splits)
        found = logits(made(trial), trial.splits)
        run["rows"][row] = measured(found, real, trial.splits.test.label)
        run["rows"][row]["seconds"] = time.perf_counter() - start
        shown = ", ".join(f"{key} {value:.2f}" for key, value in run["rows"][row].items())
        print(f"{trial.name}, seed {trial.seed}, {row}: {shown}", flush=True)
        jax.clear_caches()
        yield


def facts(trial: Trial, run: dict[str, Any], again: list[str], later: bool) -> Iterator[None]:
    """The same for what is reported beside accuracies."""
    for name, made in (quantization_layers.LATER if later else quantization_layers.FACTS).items():
        once = name in quantization_layers.FIRST_SEED and trial.seed
        if once or (name in run and name not in again):
            continue
        start = time.perf_counter()
        run[name] = made(trial)
        seconds = time.perf_counter() - start
        print(f"{trial.name}, seed {trial.seed}, {name}: {seconds:.0f} s", flush=True)
        jax.clear_caches()
        yield


def findings(results: dict[str, Any]) -> list[str]:
    return report.words(results)


def main(argv: list[str] | None = None) -> None:
    parser = common.parser("quantization", __doc__, "quantization")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--seeds", type=common.positive, default=5)
    parser.add_argument("--epochs", type=common.positive, help="of training")
    parser.add_argument("--train", type=common.positive, default=8000, help="training images")
    parser.add_argument("--again", nargs="+", default=[], help="rows to make anew")
    parser.add_argument("--keep", type=Path, default=default_folder() / "quantization",
                        help="folder for trained networks")  # fmt: skip
    parser.add_argument("--report", action="store_true", help="only tables of what is there")
    args = parser.parse_args(argv)
    common.use_device(args.device, parser)
    common.packages(parser, *quantization_peers.PACKAGES)
    common.make_folder(args.out, parser)
    splits = pruning.load(args.train)
    found = records(args, splits)
    about = (
        f"cluttered digits at 28x28, {len(splits.train):,} training and {len(splits.test):,} test "
        f"images; calibration on {BATCHES} batches of {SIZE} training images"
    )
    report.write(args.out / "quantization", found, about, findings)


if __name__ == "__main__":
    main()
