"""Structured pruning by jaxaccel against Torch-Pruning, on the same networks with the same weights.

    pip install -e '.[bench]'
    python -m experiments.pruning_peer

torchvision's networks with random weights, and the same in JAX with these weights carried over,
which is checked by their outputs. Both tools remove half of every group's channels, those with the
lowest L1 norm over the group (Torch-Pruning's adds the scales of batch norms; which channels go
does not change how many). Torch-Pruning is called as its README says: `BasePruner`, the classifier
in `ignored_layers`, the rest by default.

Prunable channels are a share of the output channels of all convolutions and dense layers, among
them the classifier's 1,000, which no tool may remove. jaxaccel's are those in a group of more than
one, for one of every group stays; of Torch-Pruning, all channels of a layer that it made narrower
count. Multiply-accumulates are, for both, the sum over convolutions and dense layers of the
kernel's elements times the positions of the output. Parameters are without the statistics of batch
norms.

Seconds are of plan, rewrite and shrink, and of making the pruner and its step: medians, interleaved
in shuffled order in one process, with PyTorch's own number of threads; leave the machine idle, for
a PyTorch that waits for a core is slower by far. "first, s" is the warm-up before. jaxaccel
rewrites when the result is traced: "trace, s" is the first trace.

The kept results, from 2 CPU cores (AMD EPYC), are in `experiments/results/pruning_peer.md`.
"""

import copy
import gc
import random
import time
from argparse import ArgumentTypeError
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

import jaxaccel as jx
from experiments import common
from experiments.peer_networks import CLASSES, NETWORKS, Pair, difference, packages, pair, weighted
from jaxaccel._graph import leaf_paths
from jaxaccel._groups import Groups

OURS, PEER = "jaxaccel", "Torch-Pruning"
SIZES = (
    *("network", "tool", "prunable channels", "parameters", "left", "against the peer"),
    *("MACs, M", "left, M", "against the peer", "pruned network"),
)
TIMES = (
    *("network", "tool", "first, s", "seconds", "quartiles", "times the peer's", "quartiles"),
    "trace, s",
)
# Readies one run, outside the clock; what it returns is timed.
Tool = Callable[[], Callable[[], Any]]


class Size(NamedTuple):
    """Of a network; `outputs` are the channels of each convolution and dense layer."""

    parameters: int
    macs: int
    outputs: list[int]


def pruning(pair: Pair, ratio: float) -> Callable[[], Any]:
    """What is timed of jaxaccel: the plan, the rewritten function and its parameters."""

    def run() -> tuple[jx.prune.Plan, Callable, Any]:
        plan = jx.prune.plan(pair.fn, pair.params, pair.image, ratio=ratio)
        return plan, plan.rewrite(pair.fn), jax.block_until_ready(plan.shrink(pair.params))

    return run


def peer_pruning(pair: Pair, ratio: float) -> Callable[[], Any]:
    """What is timed of Torch-Pruning, on a copy of the model, for it changes it."""
    model, (torch, _, tp, _) = copy.deepcopy(pair.model), pair.packages
    linear = [layer for layer in model.modules() if isinstance(layer, torch.nn.Linear)]

    def run() -> Any:
        pruner = tp.pruner.BasePruner(
            model,
            pair.peer_image,
            importance=tp.importance.GroupMagnitudeImportance(p=1),
            pruning_ratio=ratio,
            ignored_layers=[layer for layer in linear if layer.out_features == CLASSES],
        )
        pruner.step()
        return model

    return run


def size(pair: Pair, parameters: int, kernels: Sequence[tuple[int, ...]]) -> Size:
    """From the shapes of the kernels with the output channels last."""
    macs = sum(prod(shape) * n for shape, n in zip(kernels, pair.positions, strict=True))
    return Size(parameters, macs, [shape[-1] for shape in kernels])


def totals(size: Size) -> dict[str, int]:
    return {"parameters": size.parameters, "macs": size.macs, "channels": sum(size.outputs)}


def our_size(pair: Pair, params: Any) -> Size:
    leaves = leaf_paths(params)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(params["params"]))
    return size(pair, parameters, [leaves[path].shape for path in pair.kernels])


def peer_size(pair: Pair, model: Any) -> Size:
    layers = weighted(pair.packages.torch, model)
    parameters = sum(leaf.numel() for leaf in model.parameters())
    return size(pair, parameters, [tuple(layer.weight.shape)[::-1] for layer in layers])


def outcome(pair: Pair, result: tuple[jx.prune.Plan, Callable, Any]) -> dict[str, Any]:
    """What jaxaccel's pruning came to."""
    plan, rewritten, small = result
    masked = jx.prune.apply(pair.params, plan.masks(pair.params))
    wanted = jax.jit(pair.fn)(masked, pair.image)
    differs = difference(jax.jit(rewritten)(small, pair.image), wanted)
    groups = jx.groups(pair.fn, pair.params, pair.image)
    before = our_size(pair, pair.params)
    reasons: Counter[str] = Counter()
    for pin in groups.pinned:
        reasons[pin.reason] += pin.count
    return {
        "prunable": prunable(pair, plan, groups) / sum(before.outputs),
        "before": totals(before),
        "after": totals(our_size(pair, small)),
        "pruned": f"differs from masked by {differs:.0e}",
        "groups": len(groups),
        "groups_of_one": sum(group.size == 1 for group in groups),
        "unprunable": reasons,
    }


def prunable(pair: Pair, plan: jx.prune.Plan, groups: Groups) -> int:
    """Output channels of convolutions and dense layers in groups of more than one channel."""
    outputs = {(path, len(plan.shapes[path]) - 1) for path in pair.kernels}
    slices = [part for group in groups if group.size > 1 for part in group.slices]
    return sum(part.index.size for part in slices if (part.path, part.axis) in outputs)


def peer_outcome(pair: Pair, model: Any) -> dict[str, Any]:
    """What Torch-Pruning's pruning came to."""
    before, after = peer_size(pair, pair.model), peer_size(pair, model)
    with pair.packages.torch.no_grad():
        finite = model(pair.peer_image).isfinite().all()
    layers = list(zip(pair.kernels, before.outputs, after.outputs, strict=True))
    return {
        "prunable": sum(old for _, old, new in layers if new < old) / sum(before.outputs),
        "before": totals(before),
        "after": totals(after),
        "pruned": "runs, finite" if finite else "runs, not finite",
        "unprunable": {path: old for path, old, new in layers if new == old},
    }


def timed(run: Callable[[], Any]) -> tuple[Any, float]:
    gc.collect()
    start = time.perf_counter()
    result = run()
    return result, time.perf_counter() - start


def first(tool: Tool, judge: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
    """The outcome of the warm-up, or how it failed."""
    try:
        result, seconds = timed(tool())
        return {"first": seconds, **judge(result)}
    except Exception as error:
        lines = str(error).splitlines() or [""]
        return {"error": f"{type(error).__name__}: {lines[0]}"}


def race(tools: dict[str, Tool], rounds: int, seed: int) -> dict[str, list[float]]:
    """Seconds of every round."""
    seconds: dict[str, list[float]] = {name: [] for name in tools}
    order = random.Random(seed)
    for _ in range(rounds):
        for name in order.sample(list(tools), len(tools)):
            seconds[name].append(timed(tools[name]())[1])
    return seconds


def traces(pair: Pair, ratio: float, rounds: int) -> list[float]:
    """Seconds of the first trace of the rewritten function."""
    plan, _, small = pruning(pair, ratio)()
    run = lambda: jax.jit(plan.rewrite(pair.fn)).trace(small, pair.image)
    return [timed(run)[1] for _ in range(rounds)]


def measured(name: str, pair: Pair, ratio: float, rounds: int, seed: int) -> list[dict[str, Any]]:
    """A row for each tool."""
    tools = {OURS: partial(pruning, pair, ratio), PEER: partial(peer_pruning, pair, ratio)}
    judges = {OURS: partial(outcome, pair), PEER: partial(peer_outcome, pair)}
    rows = {tool: first(ready, judges[tool]) for tool, ready in tools.items()}
    running = {tool: tools[tool] for tool, row in rows.items() if "error" not in row}
    for tool, seconds in race(running, rounds, seed).items():
        rows[tool]["seconds"] = seconds
    if OURS in running:
        rows[OURS]["trace"] = traces(pair, ratio, rounds)
    common_to_both = {"network": name, "difference_before_pruning": pair.difference}
    return [{"tool": tool, **common_to_both, **row} for tool, row in rows.items()]


def quartiles(values: Any) -> list[float]:
    return np.percentile(values, (25, 50, 75)).tolist()


def sizes(row: dict[str, Any], peer: dict[str, Any]) -> list[object]:
    """Of the first table: what a tool removes, beside the peer where that did not fail."""
    if "error" in row:
        return [row["network"], row["tool"], *[None] * 7, f"fails: {row['error']}"]
    before, after = row["before"], row["after"]
    return [
        *(row["network"], row["tool"], f"{row['prunable']:.1%}"),
        *(before["parameters"], after["parameters"], against(row, peer, "parameters")),
        *(f"{before['macs'] / 1e6:.1f}", f"{after['macs'] / 1e6:.1f}"),
        *(against(row, peer, "macs"), row["pruned"]),
    ]


def times(row: dict[str, Any], peer: dict[str, Any]) -> list[object]:
    """Of the second: how long that takes it."""
    return [
        *(row["network"], row["tool"], f"{row['first']:.2f}", *spread(row["seconds"])),
        *([None] * 2 if "error" in peer else spread(np.divide(row["seconds"], peer["seconds"]))),
        f"{np.median(row['trace']):.2f}" if "trace" in row else "",
    ]


def against(row: dict[str, Any], peer: dict[str, Any], what: str) -> str | None:
    if "error" in peer:
        return None
    return f"{row['after'][what] / peer['after'][what] - 1:+.2%}"


def spread(values: Any) -> list[str]:
    """The median, and the quartiles."""
    low, middle, high = quartiles(values)
    return [f"{middle:.2f}", f"{low:.2f}-{high:.2f}"]


def findings(results: dict[str, Any]) -> list[str]:
    """Where both tools prune: what they leave, and in what time; and where the peer fails."""
    by_tool = {(row["network"], row["tool"]): row for row in results["rows"]}
    names = list(dict.fromkeys(network for network, _ in by_tool))
    pairs = {name: (by_tool[name, OURS], by_tool[name, PEER]) for name in names}
    failed = {name: tool["error"] for (name, _), tool in by_tool.items() if "error" in tool}
    both = {name: pair for name, pair in pairs.items() if name not in failed}
    same = sum(own["after"] == peer["after"] for own, peer in both.values())
    takes = [
        f"{np.median(np.divide(own['seconds'], peer['seconds'])):.2f} ({name})"
        for name, (own, peer) in both.items()
    ]
    said = [
        f"Where both prune, they leave the same parameters and MACs in {same} of {len(both)} "
        f"networks; {OURS} takes {', '.join(takes)} of {PEER}'s time."
    ]
    for (name, tool), row in by_tool.items():
        if "error" in row:
            said.append(f"{tool} fails on {name}, 1 of {len(names)}: {row['error']}.")
    return said


def plot(rows: list[dict[str, Any]], ratio: float, path: Path) -> None:
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator, NullFormatter

    figure, both = plt.subplots(1, 2, figsize=(10, 4.5))
    for tool, offset, marker in ((OURS, -0.2, "o"), (PEER, 0.2, "s")):
        draw(both, [row for row in rows if row["tool"] == tool], offset, marker)
    names = list(dict.fromkeys(row["network"] for row in rows))
    for axes in both:
        axes.set_xticks(range(len(names)), names, rotation=20, ha="right")
        axes.set_xlim(-0.6, len(names) - 0.4)
    both[0].set(ylabel="output channels that can be pruned, %", ylim=(0, 100))
    both[1].set(ylabel="seconds to prune: median, quartiles", yscale="log")
    both[1].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    both[1].yaxis.set_major_formatter("{x:g}")
    both[1].yaxis.set_minor_formatter(NullFormatter())
    both[1].grid(axis="y", alpha=0.3)
    figure.suptitle(f"Structured pruning by {ratio:.0%}, images of 224x224 pixels")
    figure.legend(*both[1].get_legend_handles_labels(), loc="lower right", ncols=2, frameon=False)
    figure.text(0.01, 0.005, common.machine_line(), fontsize=6)
    figure.tight_layout(rect=(0, 0.04, 1, 1))
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw(both: Any, rows: list[dict[str, Any]], offset: float, marker: str) -> None:
    """One tool; where it failed, a word."""
    done = [(n + offset, row) for n, row in enumerate(rows) if "error" not in row]
    (shares, times), places = both, [place for place, _ in done]
    shares.bar(places, [100 * row["prunable"] for _, row in done], 0.4)
    low, middle, high = np.reshape([quartiles(row["seconds"]) for _, row in done], (-1, 3)).T
    bars, label = [middle - low, high - middle], rows[0]["tool"]
    times.errorbar(places, middle, bars, fmt=marker, capsize=3, label=label)
    for place in (n + offset for n, row in enumerate(rows) if "error" in row):
        for axes in both:
            # Upwards in shares of the height: a logarithmic axis has no zero.
            at = axes.get_xaxis_transform()
            axes.text(place, 0.02, f"{label} fails", rotation=90, ha="center", transform=at)


def share(text: str) -> float:
    """A number between 0 and 1, for argparse."""
    try:
        value = float(text)
    except ValueError:
        raise ArgumentTypeError(f"{text!r} is not a number") from None
    if not 0 < value < 1:
        raise ArgumentTypeError(f"{text} does not lie between 0 and 1")
    return value


def main(argv: list[str] | None = None) -> None:
    parser = common.parser("pruning_peer", __doc__, "pruning_peer")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--rounds", type=common.positive, default=5, help="timed, after one")
    parser.add_argument("--ratio", type=share, default=0.5, help="of the channels to remove")
    args = parser.parse_args(argv)
    common.use_device(args.device, parser)
    folder = common.make_folder(args.out, parser)
    given = packages(parser)
    rows = []
    for name in args.networks:
        rows += measured(name, pair(name, given, args.seed), args.ratio, args.rounds, args.seed)
    peers = {row["network"]: row for row in rows if row["tool"] == PEER}
    versions = {name: version(name) for name in ("torch", "torchvision", "torch-pruning")}
    both = [(row, peers[row["network"]]) for row in rows]
    removed = [sizes(*pair) for pair in both]
    taken = [times(*pair) for pair in both if "error" not in pair[0]]
    largest = max(row["difference_before_pruning"] for row in rows)
    head = ", ".join([common.machine_line(), *map(" ".join, versions.items())])
    note = (
        f"Ratio {args.ratio}, {args.rounds} rounds. Before pruning, the outputs of the two "
        f"frameworks differ by at most {largest:.0e} of the largest."
    )
    results = {"versions": versions, "ratio": args.ratio, "rounds": args.rounds, "rows": rows}
    table = jx.measure.table
    page = lambda style: common.paragraphs(
        head, table(SIZES, removed, style), table(TIMES, taken, style), note
    )
    common.write(folder / "pruning_peer", page, results, findings)
    plot(rows, args.ratio, folder / "pruning_peer.png")


if __name__ == "__main__":
    main()
