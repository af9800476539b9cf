"""What each compression costs in accuracy: over paired seeds, with intervals.

    python -m experiments.accuracy --epochs 4                        # cluttered, 25 minutes
    python -m experiments.accuracy --dataset digits --epochs 20      # saturated, 3 minutes

For each seed the teacher and the students of `experiments.mnist` are trained with the same
initialisation, data order and number of steps; 80% of the student's pointwise and dense weights are
set to zero; beside them stand the controls that should be worse: the student without its teacher,
and random instead of magnitude masks. What removing channels costs: `experiments.pruning`. Last
epoch, not the best; the test set is read once per network, when all training of the seed is over.
Differences are paired by seed.

2 cores (AMD EPYC), jax 0.10.2, 5 seeds: experiments/results/accuracy-cluttered.md and -digits.md.
"""

import re
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
from matplotlib.figure import Figure

import jaxaccel as jx
from experiments import common, mnist, networks

# (name of the claim, the one that should be better, the one it is held against)
CLAIMS = (
    ("the teacher's help", "distilled", "student"),
    ("magnitude over random masks", "pruned", "random masks"),
    ("student for teacher", "distilled", "teacher"),
    ("80% of pointwise and dense weights removed", "pruned", "distilled"),
    ("int8 for float32 weights", "int8", "pruned"),
)


SPARSITY = 0.8
# The few weights of the first and of the depthwise convolutions stay, as in Zhu and Gupta 2017
# (arXiv:1710.01878).
PRUNED = {"*depthwise*": False, "*conv1*": False, "*": True}


def masked(
    job: mnist.Job, name: str, student: mnist.Network, teacher: mnist.Network, criterion: Any
) -> mnist.Network:
    """Most weights set to zero, the rest fine-tuned with the teacher's help."""
    masks = jx.prune.masks(student.params, SPARSITY, criterion=criterion, where=PRUNED)
    model = (student.fn, jx.prune.apply(student.params, masks))
    method = f"{SPARSITY:.0%} of pointwise and dense weights zero, fine-tuned"
    keep = jx.prune.keep(masks)
    return job.fit(name, method, model, keep, tune=True, **mnist.follow(teacher))


def int8_weights(network: mnist.Network) -> mnist.Network:
    """Weights in int8 with a scale per output channel; arithmetic in float32."""
    fn = lambda params, x: network.fn(jx.quantize.dequantize(params), x)
    params = jx.quantize.weights(network.params)
    return mnist.Network("int8", fn, params, "the pruned student's weights in int8", [])


def trained(job: mnist.Job, splits: jx.data.Splits) -> list[mnist.Network]:
    """Teacher and students, what masks and int8 weights leave of them, and the controls."""
    teacher, alone, student = mnist.students(job, splits)
    sparse = masked(job, "pruned", student, teacher, jx.prune.magnitude)
    random = jx.prune.random(jax.random.key(job.seed))
    control = masked(job, "random masks", student, teacher, random)
    return [teacher, alone, student, sparse, control, int8_weights(sparse)]


def study(splits: jx.data.Splits, epochs: int | None, seeds: range) -> dict[str, list[float]]:
    """Test accuracies in percent, by network, one for each seed."""
    accuracies: dict[str, list[float]] = {}
    for seed in seeds:
        start = time.perf_counter()
        job = mnist.Job(splits, epochs, seed, progress=False)
        for network in trained(job, splits):
            accuracy = 100 * job.test_metrics(network)[0]
            accuracies.setdefault(network.name, []).append(accuracy)
        shown = ", ".join(f"{name} {values[-1]:.2f}" for name, values in accuracies.items())
        print(f"seed {seed}, {time.perf_counter() - start:.0f} s: {shown}", flush=True)
    return accuracies


def claims(
    accuracies: dict[str, list[float]], pairs: Sequence[tuple[str, str, str]] = CLAIMS
) -> list[dict[str, Any]]:
    """Paired differences in points, with what may be said of them."""
    found = []
    for claim, better, worse in pairs:
        mean, half = jx.measure.paired(accuracies[better], accuracies[worse])[:2]
        said = "better" if mean > half else "worse" if mean < -half else "no difference shown"
        found.append(
            {
                "claim": claim,
                "pair": f"{better} - {worse}",
                "points": mean,
                "half_width": half,
                "said": said,
            }
        )
    return found


def words(claim: dict[str, Any]) -> str:
    """One of `claims`, as a sentence."""
    points = f"{claim['points']:+.2f} ± {claim['half_width']:.2f} points"
    return f"{points}, {claim['said']}: {claim['claim']} ({claim['pair']})."


def findings(results: dict[str, Any]) -> list[str]:
    return list(map(words, results["claims"]))


def tables(
    accuracies: dict[str, list[float]], found: list[dict[str, Any]], seeds: range, style: Any
) -> str:
    rows = []
    for name, values in accuracies.items():
        mean, half = jx.measure.interval(values)[:2]
        rows.append((name, f"{mean:.2f}", f"± {half:.2f}", *(f"{v:.2f}" for v in values)))
    names = (f"seed {seed}" for seed in seeds)
    first = jx.measure.table(("network", "accuracy, %", "95%", *names), rows, style)
    columns = ("claim", "pair", "points", "95%", "verdict")
    lines = [
        (c["claim"], c["pair"], f"{c['points']:+.2f}", f"± {c['half_width']:.2f}", c["said"])
        for c in found
    ]
    return f"{first}\n\n{jx.measure.table(columns, lines, style)}"


def plot(path: Path, accuracies: dict[str, list[float]], dataset: str) -> None:
    figure = Figure(figsize=(8, 3.6))
    axes = figure.subplots()
    for i, (_, values) in enumerate(accuracies.items()):
        mean, half = jx.measure.interval(values)[:2]
        axes.errorbar(i, mean, half, fmt="o", capsize=6, color="C0")
        axes.scatter([i] * len(values), values, s=14, color="C1", alpha=0.7, zorder=3)
    axes.set_xticks(range(len(accuracies)), list(accuracies))
    axes.set_ylabel("test accuracy, %")
    axes.set_title(
        f"{dataset}: mean and 95% interval (blue), each seed (orange)\n{common.machine_line()}",
        fontsize=9,
    )
    axes.grid(alpha=0.3, axis="y")
    figure.savefig(path, dpi=130, bbox_inches="tight", pad_inches=0.15)


def sizes(splits: jx.data.Splits) -> str:
    """What the student saves, and how much of it the pruning takes, in words."""
    teacher, student = costs(splits)
    _, params = jx.functional(networks.build(splits, 0, separable=True))
    pruned = jx.prune.masks(params, SPARSITY, where=PRUNED)["params"]
    gone = sum(int((~mask).sum()) for mask in jax.tree.leaves(pruned))
    share = gone / sum(leaf.size for leaf in jax.tree.leaves(params["params"]))
    return (
        f"student: {teacher / student:.1f}x fewer multiply-accumulates ({student:,} for "
        f"{teacher:,}); pruned: {share:.0%} of all its parameters"
    )


def costs(splits: jx.data.Splits) -> tuple[int, int]:
    """Multiply-accumulates of the teacher and of the student, for one image."""
    image = jax.ShapeDtypeStruct((1, *splits.train.image.shape[1:]), "float32")
    pair = (jx.functional(networks.build(splits, 0, separable=s)) for s in (False, True))
    teacher, student = (jx.measure.macs(fn, params, image) for fn, params in pair)
    return teacher, student


def main(argv: list[str] | None = None) -> None:
    parser = common.parser("accuracy", __doc__, "accuracy")
    parser.add_argument("--dataset", default="cluttered", help="as for experiments.mnist")
    parser.add_argument("--data-dir", type=Path, help="where mnist or a prepared TFDS set lies")
    parser.add_argument("--epochs", type=common.positive, help="of each network")
    parser.add_argument("--seeds", type=partial(common.at_least, 2), default=5)
    args = parser.parse_args(argv)
    common.use_device(args.device, parser)
    splits = mnist.load(args.dataset, args.data_dir, parser)
    folder = common.make_folder(args.out, parser)
    start, seeds = time.perf_counter(), range(args.seed, args.seed + args.seeds)
    accuracies = study(splits, args.epochs, seeds)
    minutes = (time.perf_counter() - start) / 60
    epochs = mnist.Job(splits, args.epochs, 0, progress=False).epochs
    head = (
        f"{args.dataset}, {len(splits.test.label):,} test images, {args.seeds} seeds, {epochs} "
        f"epochs, {minutes:.0f} min; {sizes(splits)}; {common.machine_line()}"
    )
    write(folder / f"accuracy-{slug(args.dataset)}", head, accuracies, seeds, args.dataset)


def slug(dataset: str) -> str:
    """A data set's name as part of a file's: tfds:name/config:1.0.0 has characters that divide."""
    return re.sub(r"[^\w.-]", "-", dataset)


def write(
    path: Path, head: str, accuracies: dict[str, list[float]], seeds: range, dataset: str
) -> None:
    """Print the tables; write them beside their figures and the picture."""
    found = claims(accuracies)
    print(f"\n{head}\n\n{tables(accuracies, found, seeds, 'text')}")
    text = f"{head}\n\n{tables(accuracies, found, seeds, 'markdown')}\n"
    path.with_name(f"{path.name}.md").write_text(text)
    results = {"about": head, "seeds": list(seeds), "accuracies": accuracies, "claims": found}
    common.write_json(path.with_name(f"{path.name}.json"), results, findings)
    plot(path.with_name(f"{path.name}.png"), accuracies, dataset)


if __name__ == "__main__":
    main()
