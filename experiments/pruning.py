"""What removing channels costs in accuracy and buys in time: 2.1 times fewer MACs, paired seeds.

    python -m experiments.pruning                      # two networks, 5 seeds, 4 hours
    python -m experiments.pruning --networks ConvNet   # 40 minutes

A network is trained, then loses channels until its multiply-accumulates are down 2.1 times, and is
fine-tuned with the network before as its teacher. Beside it: random channels; those that
Torch-Pruning removes from an equal PyTorch network (``pip install -e '.[bench]'``) by the L2 norm
of groups, as in its README, at the ratio that comes nearest to the budget, fine-tuned by the same
code; the small network trained from scratch for as many epochs, on labels alone; and the whole
network given the same fine-tuning. All of one seed share data order and number of steps. Last
epoch, not the best; the test set is read once per network, when all training of the seed is over.

The images are cluttered digits, each 2x2 pixels averaged to one: 28x28 from 56x56. The digits are
8x8 in their source, so that nothing is lost that telling them apart needs. Every (network, seed)
that is done stays in pruning-runs.json: an interrupted run goes on from there.

2 cores (AMD EPYC), jax 0.10.2, 5 seeds: experiments/results/pruning.md.
"""

import json
import time
from argparse import Namespace
from bisect import bisect_left
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from zlib import crc32

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from matplotlib.figure import Figure

import jaxaccel as jx
from experiments import accuracy, common, mnist, torch_networks
from experiments.mnist import Network
from jaxaccel._graph import leaf_paths
from jaxaccel._groups import Group, Groups

HE, LECUN = nnx.initializers.he_normal(), nnx.initializers.lecun_normal()
FEWER = 2.1  # times the multiply-accumulates
PEAK = 1e-2  # of the learning rates
TARGET = 0.3  # points of accuracy that pruning may cost
SHAPE = (28, 28, 1)
IMAGE = jax.ShapeDtypeStruct((1, *SHAPE), jnp.float32)

WHOLE, LONGER, SCRATCH, TORCH = "unpruned", "unpruned, trained on", "from scratch", "Torch-Pruning"
# (name of the claim, the one that should be better, the one it is held against)
CLAIMS = (
    ("what pruning costs", "l1", WHOLE),
    ("what it costs with the same training", "l1", LONGER),
    ("magnitude over random channels", "l1", "random"),
    ("pruned over small from the start", "l1", SCRATCH),
    ("l1 over the choice of Torch-Pruning", "l1", TORCH),
)


def convnet(rngs: nnx.Rngs) -> nnx.Module:
    options = {"widths": (32, 64), "dense": (64,), "dropout": 0.0, "rngs": rngs}
    return jx.nn.ConvNet(input_shape=SHAPE, **options)


def resnet(rngs: nnx.Rngs) -> nnx.Module:
    return jx.nn.ResNet(20, in_features=1, rngs=rngs)


# Each network, and its equal in PyTorch.
NETWORKS: dict[str, tuple[Callable[[nnx.Rngs], nnx.Module], Callable[[Any], Any]]] = {
    "ConvNet": (convnet, torch_networks.convnet),
    "ResNet-20": (resnet, torch_networks.resnet),
}
EPOCHS = {"ConvNet": 16, "ResNet-20": 6}  # half as many of fine-tuning


def load(train: int) -> jx.data.Splits:
    """The cluttered digits at half their size, the first `train` images for training."""
    splits = jx.data.digits("cluttered")
    first = jx.data.arrays(splits.train.image[:train], splits.train.label[:train])
    return jx.data.Splits(*map(pooled, splits._replace(train=first)))


def pooled(part: jx.data.Arrays) -> jx.data.Arrays:
    """The mean of each 2x2 pixels."""
    count, height, width, channels = part.image.shape
    squares = part.image.reshape(count, height // 2, 2, width // 2, 2, channels)
    image = np.rint(squares.mean((2, 4), dtype=np.float32)).astype(np.uint8)
    return jx.data.arrays(image, part.label)


class Trial(NamedTuple):
    """A network and a seed, with what every training of them shares."""

    name: str
    seed: int
    splits: jx.data.Splits
    epochs: int

    def build(self) -> nnx.Module:
        """The whole network, not yet trained."""
        return NETWORKS[self.name][0](nnx.Rngs(self.seed))

    def job(self, epochs: int | None = None) -> mnist.Job:
        """The loaders, from the start of their order."""
        return mnist.Job(self.splits, epochs or self.epochs, self.seed, progress=False)

    def fit(self, name: str, model: Any, epochs: int, **options: Any) -> Network:
        """Train as the main job does, with the higher peak."""
        start = time.perf_counter()
        found = self.job(epochs).fit(name, self.name, model, peak=PEAK, **options)
        print(f"seed {self.seed}, {time.perf_counter() - start:.0f} s", flush=True)
        return found

    def plans(self, whole: Network) -> dict[str, jx.prune.Plan]:
        """The channels that stay, by who chose them."""
        within = partial(
            jx.prune.plan, whole.fn, whole.params, IMAGE, budget={"flops": 1 / FEWER}, scope="local"
        )
        return {
            "l1": within(criterion=jx.prune.l1),
            "random": within(criterion=jx.prune.random(jax.random.key(self.seed))),
            TORCH: self.torch_plan(whole),
        }

    def torch_plan(self, whole: Network) -> jx.prune.Plan:
        """The choice of Torch-Pruning at the ratio that comes nearest to the budget."""
        images = np.asarray(common.scaled(self.splits.validation.image[:64]))
        model = NETWORKS[self.name][1](whole.params)
        agree(model, whole.fn, whole.params, images)

        def chosen(parts: int) -> tuple[Any, jx.prune.Plan]:
            small, kept = torch_networks.pruned(model, parts / 64, images[:1])
            return small, as_plan(whole, kept)

        over = lambda plan: plan.macs.after * FEWER - plan.macs.before
        # No group has more than 64 channels.
        first = bisect_left(range(63), True, key=lambda parts: over(chosen(parts)[1]) <= 0)
        small, plan = min(chosen(first - 1), chosen(first), key=lambda pair: abs(over(pair[1])))
        agree(small, plan.rewrite(whole.fn), plan.shrink(whole.params), images)
        return plan

    def fresh(self, plan: jx.prune.Plan) -> tuple[Callable, Any]:
        """The small network as `jaxaccel.nn` would initialise it."""
        fn, params = jx.functional(plan.module(self.build()))
        key = jax.random.key(self.seed)

        def drawn(path: str, leaf: jax.Array) -> jax.Array:
            if not path.endswith("kernel"):
                return leaf  # zeros or ones
            draw = LECUN if "classifier" in path else HE
            return draw(jax.random.fold_in(key, crc32(path.encode())), leaf.shape)

        leaves = [drawn(path, leaf) for path, leaf in leaf_paths(params).items()]
        return fn, jax.tree.unflatten(jax.tree.structure(params), leaves)

    def networks(self) -> tuple[list[Network], dict[str, jx.prune.Plan]]:
        """All that are compared, trained, and the plans of those that were pruned."""
        whole = self.fit(WHOLE, self.build(), self.epochs)
        plans = self.plans(whole)
        fn: Any = whole.fn
        models = {LONGER: fn.module(whole.params)}
        models |= {name: plan.module(models[LONGER]) for name, plan in plans.items()}
        follow = mnist.follow(whole)
        found = [self.fit(name, m, self.epochs // 2, **follow) for name, m in models.items()]
        scratch = self.fit(SCRATCH, self.fresh(plans["l1"]), self.epochs + self.epochs // 2)
        return [whole, *found, scratch], plans

    def record(self) -> dict[str, Any]:
        """Everything that is reported of one seed."""
        start = time.perf_counter()
        found, plans = self.networks()
        job, groups = self.job(), jx.groups(found[0].fn, found[0].params, IMAGE)
        sizes = lambda n: sum(leaf.size for leaf in jax.tree.leaves(n.params))
        return {
            "accuracies": {n.name: 100 * job.test_metrics(n)[0] for n in found},
            "macs": {n.name: jx.measure.macs(n.fn, n.params, IMAGE) for n in found},
            "parameters": {n.name: sizes(n) for n in found},
            "as_l1": {name: alike(plans["l1"], plan, groups) for name, plan in plans.items()},
            "groups": len(groups),
            "left_whole": [r.channels for r in plans[TORCH].rows if r.kept == r.channels],
            "seconds": time.perf_counter() - start,
        }


def agree(model: Any, fn: Callable, params: Any, images: np.ndarray) -> None:
    """Raises a ValueError where a PyTorch network and a function differ by more than 1e-3."""
    off = np.abs(torch_networks.outputs(model, images) - np.asarray(fn(params, images))).max()
    if off > 1e-3:
        raise ValueError(f"PyTorch's logits differ from JAX's by {off:.2g}")


def as_plan(whole: Network, kept: dict[str, np.ndarray]) -> jx.prune.Plan:
    """The plan that leaves the output channels `kept` of each kernel."""
    leaves = leaf_paths(whole.params)

    def stays(group: Group) -> np.ndarray:
        found = [
            np.isin(part.index[:, 0], kept[part.path])
            for part in group.slices
            if part.path in kept and part.axis == leaves[part.path].ndim - 1
        ]
        if not all((one == found[0]).all() for one in found):
            raise ValueError(f"{group}: Torch-Pruning cuts a part of it")
        return found[0]

    return jx.prune.plan(
        whole.fn,
        whole.params,
        IMAGE,
        ratio=0.0,
        criterion=lambda groups, params: [stays(group) for group in groups],
        where=lambda group: 1 - float(stays(group).mean()),
    )


def alike(one: jx.prune.Plan, other: jx.prune.Plan, groups: Groups) -> float:
    """The share of all channels that both keep or both remove."""

    def stays(plan: jx.prune.Plan, group: Group) -> np.ndarray:
        part = group.slices[0]
        kept = plan.kept.get(part.path, {}).get(part.axis, part.index)
        return np.isin(part.index[:, 0], kept)

    return float(np.concatenate([stays(one, g) == stays(other, g) for g in groups]).mean())


def latency(name: str) -> list[tuple[object, ...]]:
    """Rows of batch size, milliseconds before and after, their ratio with its quartiles.

    Time does not depend on the values, so that the network need not be trained.
    """
    fn, params = jx.functional(NETWORKS[name][0](nnx.Rngs(0)))
    small = jx.prune.channels(fn, params, IMAGE, budget={"flops": 1 / FEWER})
    rows = []
    for size in (1, 128):
        candidates = {WHOLE: (fn, params), "l1": small}
        images = jnp.zeros((size, *SHAPE))
        before, after = jx.measure.compare(candidates, images, rounds=30, show=False).rows
        ratios = after.ratio, after.ratio_low, after.ratio_high
        rows.append((name, size, before.median_ms, after.median_ms, *ratios))
    return rows


def records(args: Namespace, splits: jx.data.Splits) -> dict[str, list[dict[str, Any]]]:
    """By network, one for each seed; what the file has at these settings is not run again."""
    path = args.out / "pruning-runs.json"
    stored = json.loads(path.read_text())["runs"] if path.exists() else []
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in args.networks}
    for seed in range(args.seed, args.seed + args.seeds):
        for name in args.networks:
            epochs = args.epochs or EPOCHS[name]
            settings = {"epochs": epochs, "train": len(splits.train), "peak": PEAK}
            wanted = {"network": name, "seed": seed, "settings": settings}
            run = next((run for run in stored if run.items() >= wanted.items()), None)
            if run is None:
                made = Trial(name, seed, splits, epochs).record()
                run = {**wanted, "machine": common.machine_line(), **made}
                stored.append(run)
                common.store(path, {"runs": stored})
            shown = ", ".join(f"{n} {value:.2f}" for n, value in run["accuracies"].items())
            print(f"{name}, seed {seed}, {run['seconds']:.0f} s: {shown}", flush=True)
            found[name].append(run)
    return found


def by_variant(runs: list[dict[str, Any]]) -> dict[str, list[float]]:
    """Test accuracies in percent, one for each seed."""
    return {name: [run["accuracies"][name] for run in runs] for name in runs[0]["accuracies"]}


def page(found: dict[str, list[dict[str, Any]]], times: Any, head: str, style: Any) -> str:
    """All tables, and what they do not show, in words."""
    parts = [head]
    for name, runs in found.items():
        accuracies, seeds = by_variant(runs), range(runs[0]["seed"], runs[-1]["seed"] + 1)
        tables = accuracy.tables(accuracies, accuracy.claims(accuracies, CLAIMS), seeds, style)
        epochs = runs[0]["settings"]["epochs"]
        parts += [f"{name}, {epochs} epochs, {epochs // 2} of fine-tuning. {words(runs)}", tables]
    columns = ("network", "variant", "MACs", "times fewer", "parameters", "times fewer")
    parts.append(jx.measure.table(columns, [r for i in found.items() for r in costs(*i)], style))
    columns = ("network", "batch", "unpruned, ms", "l1, ms", "ratio", "25%", "75%")
    parts.append(jx.measure.table(columns, times, style))
    parts.append("Costs: first seed. Ratio: l1 over unpruned within a round, quartiles.")
    return common.paragraphs(*parts)


def words(runs: list[dict[str, Any]]) -> str:
    """Whether the target is met, and how the choices of channels differ."""
    drop, same_training = accuracy.claims(by_variant(runs), CLAIMS)[:2]
    met = "met" if drop["points"] >= -TARGET else "not met"
    same = {name: np.mean([run["as_l1"][name] for run in runs]) for name in (TORCH, "random")}
    text = (
        f"l1 - unpruned: {points(drop)} points; target: at least {-TARGET} on average, {met}. "
        f"l1 - unpruned, trained on: {points(same_training)}. "
        f"Torch-Pruning treats {same[TORCH]:.0%} of the channels as l1 does, random ones "
        f"{same['random']:.0%}."
    )
    spared = runs[0]["left_whole"]
    if spared:
        text += (
            f" Torch-Pruning leaves {len(spared)} of {runs[0]['groups']} groups whole "
            f"({sum(spared)} channels): those that a shortcut pads with zeros; the others make up "
            "for it."
        )
    return text


def findings(results: dict[str, Any]) -> list[str]:
    """The costs in accuracy of each network, and what time its pruned form takes."""
    said = []
    for name, (cost, *others) in results["claims"].items():
        met = "met" if cost["points"] >= -TARGET else "missed"
        said.append(f"{name}: {accuracy.words(cost)} Target, {-TARGET} on average: {met}.")
        said += [f"{name}: {accuracy.words(claim)}" for claim in others]
        sizes = [(f"batch {row[1]}", row[4]) for row in results["latency"] if row[0] == name]
        times = ", ".join(f"{ratio:.2f} ({size})" for size, ratio in sizes)
        said.append(f"{name}: pruned it takes {times} of the time.")
    return said


def points(claim: dict[str, Any]) -> str:
    return f"{claim['points']:+.2f} ± {claim['half_width']:.2f}"


def costs(name: str, runs: list[dict[str, Any]]) -> list[tuple[object, ...]]:
    macs, parameters = runs[0]["macs"], runs[0]["parameters"]
    fewer = lambda counts, variant: f"{counts[WHOLE] / counts[variant]:.2f}"
    return [
        (name, v, macs[v], fewer(macs, v), parameters[v], fewer(parameters, v))
        for v in (WHOLE, "l1", "random", TORCH)
    ]


def plot(path: Path, found: dict[str, list[dict[str, Any]]]) -> None:
    figure = Figure(figsize=(1 + 4.5 * len(found), 3.6), layout="constrained")
    panels = figure.subplots(1, len(found), sharey=True, squeeze=False)[0]
    for axes, (name, runs) in zip(panels, found.items(), strict=True):
        accuracies = by_variant(runs)
        for place, values in enumerate(accuracies.values()):
            mean, half = jx.measure.interval(values)[:2]
            axes.errorbar(mean, place, xerr=half, fmt="o", capsize=5, color="C0")
            axes.scatter(values, [place] * len(values), s=14, color="C1", alpha=0.7, zorder=3)
        axes.set_yticks(range(len(accuracies)), list(accuracies))
        axes.set_xlabel("test accuracy, %")
        axes.set_title(name, fontsize=10)
        axes.grid(alpha=0.3, axis="x")
    panels[0].invert_yaxis()
    figure.suptitle(
        f"cluttered digits, {FEWER} times fewer MACs: mean and 95% interval (blue), each seed "
        f"(orange)\n{common.machine_line()}",
        fontsize=8,
    )
    figure.savefig(path, dpi=130)


def main(argv: list[str] | None = None) -> None:
    parser = common.parser("pruning", __doc__, "pruning")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--seeds", type=partial(common.at_least, 2), default=5)
    parser.add_argument("--epochs", type=partial(common.at_least, 2), help="of training")
    parser.add_argument("--train", type=common.positive, default=8000, help="training images")
    args = parser.parse_args(argv)
    common.use_device(args.device, parser)
    common.packages(parser, "torch", "torch_pruning")
    common.make_folder(args.out, parser)
    splits = load(args.train)
    found = records(args, splits)
    minutes = sum(run["seconds"] for runs in found.values() for run in runs) / 60
    head = (
        f"cluttered digits at 28x28, {len(splits.train):,} training and {len(splits.test):,} test "
        f"images, {args.seeds} seeds, {minutes:.0f} min; {common.machine_line()}"
    )
    write(args.out / "pruning", head, found)


def write(stem: Path, head: str, found: dict[str, list[dict[str, Any]]]) -> None:
    """Print the tables; write them beside their figures and the picture."""
    times = [row for name in found for row in latency(name)]
    said = {name: accuracy.claims(by_variant(runs), CLAIMS) for name, runs in found.items()}
    results = {"about": head, "claims": said, "latency": times, "runs": found}
    measured = common.machines(run for runs in found.values() for run in runs)
    common.write(stem, partial(page, found, times, head), results, findings, measured)
    plot(stem.with_suffix(".png"), found)


if __name__ == "__main__":
    main()
