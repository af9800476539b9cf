"""What it costs to read a network: tracing it, and labelling every axis of every value.

    python -m experiments.labels

Seconds for networks of several sizes, and for chains of residual blocks from 8 to 512 blocks long,
which show how the cost grows with the number of equations. Nothing is compiled or run. Medians of
5 runs, in about a minute on 2 CPU cores (AMD EPYC): ResNet-50 is read in 0.3 s, and labelling grows
in proportion to the equations. The kept results are in `experiments/results/labels.md`.
"""

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import jaxaccel as jx
from experiments import common
from jaxaccel import _trace
from jaxaccel._labels import label

RUNS = 5
BLOCKS = (8, 16, 32, 64, 128, 256, 512)
COLUMNS = ("network", "equations", "parameters", "labels", "groups", "trace, s", "labels, s")


def shapes(build: Callable[[], nnx.Module]) -> tuple[Callable, Any]:
    """A network whose parameters are shapes alone."""
    return jx.functional(nnx.eval_shape(build))


def networks() -> dict[str, tuple[Callable, Any, tuple[int, ...]]]:
    rngs = lambda: nnx.Rngs(0)
    return {
        "ConvNet": (*shapes(lambda: jx.nn.ConvNet(rngs=rngs())), (128, 28, 28, 1)),
        "ResNet-18": (*shapes(lambda: jx.nn.ResNet(18, rngs=rngs())), (16, 224, 224, 3)),
        "ResNet-50": (*shapes(lambda: jx.nn.ResNet(50, rngs=rngs())), (16, 224, 224, 3)),
        "MobileNetV2": (*shapes(lambda: jx.nn.MobileNet(1000, rngs=rngs())), (16, 224, 224, 3)),
    }


def chain(blocks: int, width: int = 32) -> tuple[Callable, Any, tuple[int, ...]]:
    """Residual blocks of two dense layers, a norm and an attention-like gate."""

    def fn(params: Any, x: Any) -> Any:
        for p in params:
            h = jax.nn.gelu(x @ p["up"] + p["bias"][None])
            h = (h - p["mean"][None]) * jax.lax.rsqrt(p["var"][None] + 1e-5)
            x = x + (h * jax.nn.sigmoid(h)) @ p["down"]
        return x.sum(1)

    wide = jax.ShapeDtypeStruct((2 * width,), jnp.float32)
    block = {
        "up": jax.ShapeDtypeStruct((width, 2 * width), jnp.float32),
        "down": jax.ShapeDtypeStruct((2 * width, width), jnp.float32),
        **dict.fromkeys(("bias", "mean", "var"), wide),
    }
    return fn, [block] * blocks, (16, width)


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """The last result, and the median of the seconds."""
    seconds = []
    result = None
    for _ in range(RUNS):
        start = time.perf_counter()
        result = work()
        seconds.append(time.perf_counter() - start)
    return result, statistics.median(seconds)


def measured(name: str, fn: Callable, params: Any, shape: tuple[int, ...]) -> dict[str, Any]:
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    traced, trace_seconds = timed(lambda: _trace.trace(fn, params, x))
    (labelling, _), label_seconds = timed(lambda: label(traced, range(traced.num_params)))
    groups = jx.groups(fn, params, x)
    return {
        "network": name,
        "equations": common.equations(traced.graph),
        "parameters": groups.num_parameters,
        "labels": len(labelling),
        "groups": len(groups),
        "trace": trace_seconds,
        "label": label_seconds,
    }


def plot(rows: list[dict[str, Any]], slope: float, path: Path) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4))
    equations = [row["equations"] for row in rows]
    for what, name, marker in (("trace", "trace", "o"), ("label", "labelling", "s")):
        axes.loglog(equations, [row[what] for row in rows], marker=marker, label=name)
    line = [rows[0]["label"] * n / equations[0] for n in equations]
    axes.loglog(equations, line, "--", color="grey", label="proportional")
    axes.set(
        xlabel="equations of the traced function",
        ylabel="seconds",
        title=f"Chains of residual blocks: labelling takes equations^{slope:.2f}",
    )
    axes.legend()
    figure.text(0.01, 0.005, common.machine_line(), fontsize=6)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def findings(results: dict[str, Any]) -> list[str]:
    every = [row for row in results["rows"] if not row["network"].endswith(" blocks")]
    slow = max(every, key=lambda row: row["trace"] + row["label"])
    return [
        f"The slowest of {len(every)} networks to read, {slow['network']}: {slow['equations']} "
        f"equations are traced in {slow['trace']:.2f} s and labelled in {slow['label']:.2f} s.",
        f"Labelling grows as equations^{results['slope']:.2f}.",
    ]


def main(argv: list[str] | None = None) -> None:
    parser = common.parser("labels", __doc__, "labels")
    args = parser.parse_args(argv)
    common.use_device(args.device, parser)
    folder = common.make_folder(args.out, parser)
    rows = [measured(name, *network) for name, network in networks().items()]
    chains = [measured(f"{n} blocks", *chain(n)) for n in BLOCKS]
    logs = np.log([[row["equations"], row["label"]] for row in chains])
    slope = float(np.polyfit(logs[:, 0], logs[:, 1], 1)[0])
    lines = [
        [row[name] for name in ("network", "equations", "parameters", "labels", "groups")]
        + [f"{row['trace']:.3f}", f"{row['label']:.3f}"]
        for row in [*rows, *chains]
    ]
    results = {"rows": [*rows, *chains], "slope": slope}
    note = f"Labelling grows as equations^{slope:.2f}."
    common.publish(folder / "labels", COLUMNS, lines, results, findings, note=note)
    plot(chains, slope, folder / "labels.png")


if __name__ == "__main__":
    main()
