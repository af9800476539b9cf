"""The main job: real digits in, a compressed and measured network out.

    python -m experiments.mnist                       # scikit-learn's digits, offline
    python -m experiments.mnist --dataset cluttered   # the same digits, hard
    python -m experiments.mnist --dataset mnist --data-dir FOLDER    # the four IDX files
    python -m experiments.mnist --dataset tfds:mnist --data-dir DIR  # a prepared TFDS data set

Trains a network, distils it into a depthwise-separable student, removes channels of the student
until half of its multiply-accumulates are left and fine-tunes, quantizes what is left to int8, and
writes report.html, report.md, plots and results.json. Each row of the table says what a step bought
and what it did not. Claims about accuracy rest on `experiments.accuracy` and `experiments.pruning`,
which repeat the steps over seeds; one run here is one sample.
"""

import functools
import sys
import time
import zlib
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxaccel as jx
from experiments import common, report
from experiments.networks import build

BATCH = 64
BUDGET = 0.5  # share of the multiply-accumulates that pruning leaves
CALIBRATION = 512  # images for the ranges of int8
STEPS = 800  # of each training, unless --epochs is given; fine-tuning takes half


class Network(NamedTuple):
    """One row of the table: a function, its parameters, how it came about, how it trained."""

    name: str
    fn: Callable
    params: Any
    method: str
    accuracy: list[float]  # validation, after each epoch


def load(dataset: str, data_dir: Path | None, parser: common.Parser) -> jx.data.Splits:
    """The splits of a data set, or an exit with one line."""
    try:
        return _load(dataset, data_dir)
    except (OSError, ValueError, ImportError) as error:
        parser.error(str(error).splitlines()[0])


def _load(dataset: str, data_dir: Path | None) -> jx.data.Splits:
    if dataset in ("digits", "cluttered"):
        return jx.data.digits("plain" if dataset == "digits" else "cluttered")
    if dataset == "mnist":
        if data_dir is None:
            raise ValueError("--dataset mnist needs --data-dir, the folder of the four IDX files")
        return jx.data.mnist(data_dir)
    if dataset.startswith("tfds:"):
        return _tfds(dataset.removeprefix("tfds:"), data_dir)
    raise ValueError(f"--dataset {dataset!r} is not one of digits, cluttered, mnist, tfds:NAME")


def _tfds(name: str, data_dir: Path | None) -> jx.data.Splits:
    whole = jx.data.to_arrays(jx.data.tfds(name, "train", data_dir))
    test = jx.data.to_arrays(jx.data.tfds(name, "test", data_dir))
    cut = max(1, len(whole.label) // 12)
    train = jx.data.arrays(whole.image[:-cut], whole.label[:-cut])
    validation = jx.data.arrays(whole.image[-cut:], whole.label[-cut:])
    return jx.data.Splits(train, validation, test)


class Job:
    """The data and the settings that every training of one run shares."""

    def __init__(self, splits: jx.data.Splits, epochs: int | None, seed: int, progress: bool):
        loader = functools.partial(jx.data.device_loader, batch_size=BATCH)
        whole = len(splits.train.label) >= BATCH  # padding would enter batch norm's statistics
        self.train = loader(splits.train, seed=seed, drop_last=whole)
        self.validation = loader(splits.validation, shuffle=False)
        self.test = loader(splits.test, shuffle=False)
        self.epochs = epochs or max(1, round(STEPS / len(self.train)))
        self.seed, self.progress = seed, progress

    def fit(
        self, name: str, method: str, model: Any, *last: Any, tune=False, peak=4e-3, **options
    ) -> Network:
        """Train with Adam, one cycle; fine-tune for half as long.

        `last` are optax transformations that end the chain, `peak` is the highest learning rate,
        `options` are those of the Accelerator.
        """
        epochs = max(1, self.epochs // 2) if tune else self.epochs
        schedule = optax.cosine_onecycle_schedule(epochs * len(self.train), peak)
        acc = jx.Accelerator(
            model,
            optax.chain(optax.adam(schedule), *last),
            augment=jx.augment.random_rotation(10, "bilinear"),
            seed=self.seed,
            **options,
        )
        print(f"{name}: {method}", flush=True)
        history = acc.fit(self.train, epochs, validation=self.validation, progress=self.progress)
        curve = [e.validation.accuracy for e in history if e.validation]
        return Network(name, acc.fn, acc.params, method, curve)

    def test_metrics(self, network: Network) -> tuple[float, float]:
        """Accuracy and loss on the test set: read once, when all training is over."""
        run = jax.jit(network.fn)
        right, loss, count = 0, 0.0, 0
        for batch in self.test:
            logits = run(network.params, common.scaled(batch["image"]))
            hits = (logits.argmax(-1) == batch["label"]) & batch["mask"]
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
            right += int(hits.sum())
            loss += float((losses * batch["mask"]).sum())
            count += int(batch["mask"].sum())
        return right / count, loss / count


def follow(teacher: Network) -> dict[str, Any]:
    """Options of the Accelerator that distil from a teacher."""
    loss = functools.partial(jx.distill.loss, temperature=4.0, alpha=0.9, reduction="none")
    return {"teacher": (teacher.fn, teacher.params), "loss": loss}


def pruned(job: Job, network: Network) -> Network:
    """Channels removed, the smaller network fine-tuned by distillation from the whole one."""
    image = next(iter(job.validation))["image"][:1]
    plan = jx.prune.plan(network.fn, network.params, image, budget={"flops": BUDGET})
    print(plan)
    model = plan.module(network.fn.module(network.params))  # pyright: ignore[reportFunctionMemberAccess]
    method = f"channels removed until {BUDGET:.0%} of the MACs are left, fine-tuned"
    return job.fit("pruned", method, model, tune=True, **follow(network))


def quantized(network: Network, images: np.ndarray) -> Network:
    """Convolutions and dot products on integers; ranges from these images of the training set."""
    batches = [common.scaled(part) for part in np.array_split(images, -(-len(images) // BATCH))]
    fn, params = jx.quantize.int8(network.fn, network.params, batches, progress=False)
    print(fn.report)
    fn = jx.autotune(fn, mode="rules")
    return Network("int8", fn, params, "the pruned student, computed on integers", [])


def students(job: Job, splits: jx.data.Splits) -> tuple[Network, Network, Network]:
    """The teacher, the student alone and the one that it taught."""
    model = build(splits, job.seed, separable=False)
    teacher = job.fit("teacher", "plain convolutions, float32", model)
    model = build(splits, job.seed, separable=True)
    alone = job.fit("student", "depthwise-separable, without a teacher", model)
    distilled = job.fit("distilled", "depthwise-separable, with it", model, **follow(teacher))
    return teacher, alone, distilled


def networks(job: Job, splits: jx.data.Splits) -> list[Network]:
    """Teacher, student alone, distilled, pruned, quantized: each step on the one before."""
    teacher, alone, distilled = students(job, splits)
    small = pruned(job, distilled)
    whole = quantized(small, splits.train.image[:CALIBRATION])
    return [teacher, alone, distilled, small, whole]


def stored_bytes(params: Any) -> tuple[int, int]:
    """Bytes of the leaves as they are, and after zlib: what a download would be."""
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(params)]
    data = b"".join(leaf.tobytes() for leaf in leaves)
    return len(data), len(zlib.compress(data, 9))


def measured(job: Job, found: list[Network], shape: tuple[int, ...]) -> list[dict[str, Any]]:
    """All figures of all rows; latencies are taken together, interleaved."""
    candidates = {n.name: (n.fn, n.params) for n in found}
    latency = {
        size: jx.measure.compare(candidates, jnp.zeros((size, *shape)), rounds=15, show=False)
        for size in (1, 128)
    }
    rows = []
    for i, network in enumerate(found):
        accuracy, loss = job.test_metrics(network)
        dense, compressed = stored_bytes(network.params)
        nonzero = sum(int(jnp.count_nonzero(leaf)) for leaf in jax.tree.leaves(network.params))
        row = {
            "name": network.name,
            "method": network.method,
            "accuracy": accuracy,
            "loss": loss,
            "macs": jx.measure.macs(network.fn, network.params, jnp.zeros((1, *shape))),
            "parameters": latency[1].rows[i].parameters,
            "nonzero": nonzero,
            "bytes": dense,
            "compressed_bytes": compressed,
            "validation_curve": network.accuracy,
        }
        for size, comparison in latency.items():
            timed = comparison.rows[i]
            row[f"ms_{size}"], row[f"ratio_{size}"] = timed.median_ms, timed.ratio
            row[f"rounds_ms_{size}"] = timed.rounds_ms
        rows.append(row)
    return rows


def findings(results: dict[str, Any]) -> list[str]:
    return report.verdicts(results["networks"])[1:]  # the first is the baseline


def run(args: Namespace, parser: common.Parser) -> None:
    start = time.perf_counter()
    splits = load(args.dataset, args.data_dir, parser)
    folder = common.make_folder(args.out, parser)
    sizes = ", ".join(f"{len(part.label):,} {n}" for n, part in splits._asdict().items())
    print(f"data: {args.dataset} ({sizes} images of {splits.train.image.shape[1:]})")
    job = Job(splits, args.epochs, args.seed, sys.stdout.isatty())
    print(f"{common.machine_line()}; {job.epochs} epochs a network")
    found = networks(job, splits)
    rows = measured(job, found, splits.train.image.shape[1:])
    samples = report.samples(found[-1].fn, found[-1].params, splits.test)
    seconds = time.perf_counter() - start
    facts = {"dataset": args.dataset, "sizes": sizes, "epochs": job.epochs, "seed": args.seed}
    facts |= {
        "seconds": round(seconds, 1),
        "shapes": report.shapes(found[2].params, found[3].params),
    }
    report.write(folder, rows, samples, facts, findings)
    print(f"\n{report.table(rows)}\n\n{report.shape_table(facts)}\n")
    print("\n".join(report.verdicts(rows)))
    print(f"\n{seconds:.0f} s; open {folder / 'report.html'}")


def main(argv: list[str] | None = None) -> None:
    parser = common.parser("mnist", __doc__, "mnist")
    parser.add_argument("--dataset", default="digits", help="digits, cluttered, mnist, tfds:NAME")
    parser.add_argument("--data-dir", type=Path, help="where mnist or a prepared TFDS set lies")
    parser.add_argument("--epochs", type=common.positive, help=f"default: about {STEPS} steps")
    args = parser.parse_args(argv)
    if args.dataset == "digits":
        print(
            "digits: scikit-learn's 1,797 real handwritten digits, offline; "
            "for MNIST: --dataset mnist --data-dir FOLDER (the four IDX files)"
        )
    common.use_device(args.device, parser)
    run(args, parser)


if __name__ == "__main__":
    main()
