"""The Accelerator against the training loop of the Flax NNX MNIST tutorial.

    python -m experiments.accelerator

Same model (jx.nn.ConvNet), optimizer (Adam), loss, metrics (accuracy and mean loss) and images,
in one process, epochs taken in turn in shuffled order, warm, over batch sizes 16, 32 and 128. The
tutorial's loop is given its batches as ready float32 NumPy arrays in one fixed order, which is
faster than the tf.data pipeline it has in the tutorial; Accelerator shuffles, gathers and scales
its own. Between the two stand the steps from one to the other, so that each cause has its share:

    nnx.jit            the tutorial: the module, optimizer and metrics go through nnx.jit
    nnx.cached_partial the same with the graph walk of the inputs cached, Flax's own advice
    split once         pure function and pytrees through jax.jit, float32 batches from the host
    + donation         the state's buffers are reused
    Accelerator        uint8 images live on the device, are shuffled, gathered and scaled there;
                       NaN check, history and progress included
    4 steps a call     Accelerator with steps_per_call=4
    bfloat16           Accelerator with precision="bfloat16"
"""

import random
import statistics
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from matplotlib.figure import Figure

import jaxaccel as jx
from experiments import common

BATCHES = (16, 32, 128)
STEPS = {16: 60, 32: 40, 128: 12}  # of one timed sample
ROUNDS = 15
Run = Callable[[], object]


def model(seed: int) -> nnx.Module:
    return jx.nn.ConvNet(rngs=nnx.Rngs(seed))


def tutorial(batches: list[dict], seed: int, *, cached: bool) -> Run:
    """The loop as the tutorial writes it, with Flax's caching of the graph walk on request."""
    net = model(seed)
    optimizer = nnx.Optimizer(net, optax.adam(1e-3), wrt=nnx.Param)
    metrics = nnx.MultiMetric(accuracy=nnx.metrics.Accuracy(), loss=nnx.metrics.Average("loss"))

    def loss_fn(net: Any, batch: dict) -> tuple[jax.Array, jax.Array]:
        logits = net(batch["image"])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
        return losses.mean(), logits

    @nnx.jit
    def train_step(net: Any, optimizer: Any, metrics: Any, batch: dict) -> None:
        (loss, logits), grads = nnx.value_and_grad(loss_fn, has_aux=True)(net, batch)
        metrics.update(loss=loss, logits=logits, labels=batch["label"])
        optimizer.update(net, grads)

    step = (
        nnx.cached_partial(train_step, net, optimizer, metrics)
        if cached
        else partial(train_step, net, optimizer, metrics)
    )

    def run() -> None:
        for batch in batches:
            step(batch)
        jax.block_until_ready(metrics.compute())

    return run


def split_once(batches: list[dict], seed: int, *, donate: bool) -> Run:
    """The same step on pytrees through jax.jit, on the tutorial's host batches."""
    fn, params = jx.functional(model(seed))
    tx = optax.adam(1e-3)
    trained = params["params"]
    state = (trained, tx.init(trained), jax.random.key(seed), jnp.zeros(3))

    def step(state: tuple, batch: dict) -> tuple:
        trained, moments, key, totals = state
        key, dropout = jax.random.split(key)

        def objective(trained: Any) -> tuple[jax.Array, jax.Array]:
            logits, _ = fn.train({"params": trained}, dropout, batch["image"])
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
            return losses.mean(), logits

        (loss, logits), grads = jax.value_and_grad(objective, has_aux=True)(trained)
        changes, moments = tx.update(grads, moments, trained)
        right = jnp.sum(logits.argmax(-1) == batch["label"])
        totals += jnp.array([loss * len(logits), right, len(logits)])
        return optax.apply_updates(trained, changes), moments, key, totals

    compiled = jax.jit(step, donate_argnums=0 if donate else ())

    def run() -> None:
        nonlocal state
        for batch in batches:
            state = compiled(state, batch)
        jax.block_until_ready(state)

    return run


def accelerator(data: jx.data.Arrays, size: int, seed: int, **options: Any) -> Run:
    """The loop of Accelerator.fit itself, its history and its NaN check included."""
    acc = jx.Accelerator(model(seed), optax.adam(1e-3), seed=seed, **options)
    loader = jx.data.device_loader(data, size, seed=seed)
    return lambda: acc.fit(loader, progress=False)


def candidates(size: int, seed: int) -> dict[str, Run]:
    """Every loop over the same images; a call of each makes the same number of steps."""
    digits = jx.data.digits().train
    rows = np.arange(STEPS[size] * size) % len(digits.label)
    data = jx.data.arrays(digits.image[rows], digits.label[rows])
    host = [
        {"image": batch["image"].astype(np.float32) / 255, "label": batch["label"]}
        for batch in jx.data.stream_loader(data, size, seed=seed)
    ]
    return {
        "nnx.jit": tutorial(host, seed, cached=False),
        "nnx.cached_partial": tutorial(host, seed, cached=True),
        "split once": split_once(host, seed, donate=False),
        "+ donation": split_once(host, seed, donate=True),
        "Accelerator": accelerator(data, size, seed),
        "4 steps a call": accelerator(data, size, seed, steps_per_call=4),
        "bfloat16": accelerator(data, size, seed, precision="bfloat16"),
    }


def timed(runs: dict[str, Run], steps: int, seed: int) -> dict[str, list[float]]:
    """Milliseconds a step, interleaved in shuffled order, after two warm calls of each."""
    for run in runs.values():
        run()
        run()
    found: dict[str, list[float]] = {name: [] for name in runs}
    order = random.Random(seed)
    for _ in range(ROUNDS):
        for name in order.sample(list(runs), len(runs)):
            start = time.perf_counter()
            runs[name]()
            found[name].append(1e3 * (time.perf_counter() - start) / steps)
    return found


def rows_of(size: int, found: dict[str, list[float]]) -> list[dict[str, Any]]:
    """Median and quartiles of each loop and of its speed-up within each round."""
    rows = []
    for name, ms in found.items():
        faster = [base / own for base, own in zip(found["nnx.jit"], ms, strict=True)]
        low, _, high = statistics.quantiles(faster, n=4)
        rows.append(
            {
                "batch": size,
                "loop": name,
                "ms_per_step": statistics.median(ms),
                "speedup": statistics.median(faster),
                "speedup_quartiles": [low, high],
                "images_per_second": 1e3 * size / statistics.median(ms),
            }
        )
    return rows


def shares(rows: list[dict[str, Any]]) -> dict[str, float]:
    """What each step towards Accelerator saves, as a share of the tutorial's time for a step."""
    ms = {row["loop"]: row["ms_per_step"] for row in rows}
    chain = ("nnx.jit", "split once", "+ donation", "Accelerator")
    names = ("no graph walk in Python", "donated buffers", "Accelerator's own feed")
    savings = [(ms[a] - ms[b]) / ms["nnx.jit"] for a, b in pairwise(chain)]
    return dict(zip(names, savings, strict=True))


def plot(path: Path, rows: list[dict[str, Any]]) -> None:
    figure = Figure(figsize=(9, 4))
    axes = figure.subplots()
    loops = list(dict.fromkeys(row["loop"] for row in rows))
    for i, loop in enumerate(loops):
        own = [row for row in rows if row["loop"] == loop]
        x = np.arange(len(own)) + 0.12 * (i - (len(loops) - 1) / 2)
        y = [row["speedup"] for row in own]
        low, high = zip(*(row["speedup_quartiles"] for row in own), strict=True)
        error = np.abs([np.subtract(y, low), np.subtract(high, y)])
        axes.bar(x, y, 0.11, yerr=error, capsize=2, label=loop)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xticks(range(len(BATCHES)), [f"batch {size}" for size in BATCHES])
    axes.set_ylabel("training steps per second, over nnx.jit's")
    axes.set_title(f"ConvNet, Adam; {common.machine_line()}", fontsize=9)
    axes.legend(ncols=4, fontsize=8, loc="upper right")
    axes.set_ylim(0, 1.35 * max(row["speedup_quartiles"][1] for row in rows))
    figure.savefig(path, dpi=130, bbox_inches="tight", pad_inches=0.15)


def findings(results: dict[str, Any]) -> list[str]:
    """Over the tutorial's loop, and what the two options give over Accelerator without them."""
    ms = {(row["batch"], row["loop"]): row["ms_per_step"] for row in results["rows"]}
    speed = {(row["batch"], row["loop"]): row["speedup"] for row in results["rows"]}
    sizes = list(dict.fromkeys(row["batch"] for row in results["rows"]))
    every = lambda of: ", ".join(f"{of(size):.2f} (batch {size})" for size in sizes)
    over = lambda loop: every(lambda size: ms[size, "Accelerator"] / ms[size, loop])
    return [
        f"{loop}: {every(lambda size, loop=loop: speed[size, loop])} times the steps a second of "
        "the tutorial's nnx.jit loop."
        for loop in ("Accelerator", "nnx.cached_partial")
    ] + [
        f"{name}: {over(loop)} times those of Accelerator without it."
        for name, loop in (("steps_per_call=4", "4 steps a call"), ("bfloat16", "bfloat16"))
    ]


def main(argv: list[str] | None = None) -> None:
    parser = common.parser("accelerator", __doc__, "accelerator")
    args = parser.parse_args(argv)
    common.use_device(args.device, parser)
    folder = common.make_folder(args.out, parser)
    print(common.machine_line())
    rows, causes = [], {}
    for size in BATCHES:
        found = rows_of(size, timed(candidates(size, args.seed), STEPS[size], args.seed))
        rows += found
        causes[size] = shares(found)
    columns = ("batch", "loop", "ms/step", "speed-up", "quartiles", "images/s")
    lines = [
        (r["batch"], r["loop"], f"{r['ms_per_step']:.2f}", f"{r['speedup']:.2f}",
         "{:.2f}-{:.2f}".format(*r["speedup_quartiles"]), f"{r['images_per_second']:,.0f}")
        for r in rows
    ]  # fmt: skip
    print(jx.measure.table(columns, lines))
    names = list(causes[BATCHES[0]])
    parts = [(size, *(f"{share:+.0%}" for share in causes[size].values())) for size in BATCHES]
    print("\nshare of nnx.jit's step that each cause saves")
    print(jx.measure.table(("batch", *names), parts))
    text = jx.measure.table(columns, lines, "markdown")
    shared = jx.measure.table(("batch", *names), parts, "markdown")
    (folder / "accelerator.md").write_text(f"{common.machine_line()}\n\n{text}\n\n{shared}\n")
    results = {"rows": rows, "shares": causes}
    common.write_json(folder / "accelerator.json", results, findings)
    plot(folder / "accelerator.png", rows)


if __name__ == "__main__":
    main()
