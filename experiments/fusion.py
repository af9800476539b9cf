"""What operator fusion buys: the same network as XLA fuses it, and with every operation held apart.

    python -m experiments.fusion

Three programs, forward, batch 128: bias, relu and 2x2 max pool; the same behind its 5x5
convolution; the whole of `jx.nn.ConvNet`, in XLA's own ops. "Apart" is a program with a
`jax.lax.optimization_barrier` behind every operation but broadcasts and reshapes, as a library that
runs one operation after the other would have it. JAX 0.10's XLA:CPU drops these barriers before it
fuses, so that pass is switched off for the process; a program without barriers does not meet it.
The table shows what the compiler left, by `jx.measure.fusions`, and the time of both, interleaved
in one process. About a minute on 2 CPU cores; the kept results are in
`experiments/results/fusion.md`.
"""

import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from matplotlib.figure import Figure

import jaxaccel as jx
from experiments import common
from jaxaccel import _graph, _trace
from jaxaccel._tuned import untuned

BATCH = 128
KEEP_BARRIERS = "--xla_disable_hlo_passes=cse_barrier_expander"
VIEWS = {"broadcast_in_dim", "reshape", "squeeze"}
COLUMNS = (
    *("program", "operations", "kernels", "kernels apart", "MB moved", "MB moved apart"),
    *("MB no longer moved", "ms", "ms apart", "times as fast", "quartiles"),
)


def convolution(kernel: Any, x: Any) -> Any:
    layout = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, kernel, (1, 1), "VALID", dimension_numbers=layout)


def behind_it(bias: Any, x: Any) -> Any:
    """Bias, relu, 2x2 max pool."""
    x = jax.nn.relu(x + bias)
    return lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")


def programs(seed: int) -> dict[str, tuple[Callable, Any, Any]]:
    """Name -> function, parameters, images."""
    x = jax.random.uniform(jax.random.key(seed), (BATCH, 28, 28, 1))
    kernel, bias = jax.random.normal(jax.random.key(seed + 1), (5, 5, 1, 10)) / 5, jnp.zeros(10)
    fn, params = jx.functional(jx.nn.ConvNet(rngs=nnx.Rngs(seed)))
    layer = lambda params, x: behind_it(params[1], convolution(params[0], x))
    return {
        "bias, relu, max pool": (behind_it, bias, convolution(kernel, x)),
        "conv, bias, relu, max pool": (layer, (kernel, bias), x),
        "ConvNet": (untuned(fn), params, x),
    }


def apart(fn: Callable) -> Callable:
    """The same function with a barrier behind each operation, calls inlined."""

    def held(params: Any, *args: Any) -> Any:
        traced = _trace.trace(fn, params, *args)
        results = _graph.run(traced.graph, jax.tree.leaves((params, args)), _held_apart)
        return jax.tree.unflatten(traced.out_tree, results)

    return held


def _held_apart(node: _graph.Node, operands: list[Any]) -> Sequence[Any]:
    if len(node.bodies) == 1 and node.name != "scan":
        return _graph.run(node.bodies[0], operands, _held_apart)
    results = node.run(operands)
    return results if node.name in VIEWS else lax.optimization_barrier(results)


def measured(name: str, fn: Callable, params: Any, x: Any, rounds: int) -> dict[str, Any]:
    candidates = {"fused": (fn, params), "apart": (apart(fn), params)}
    found = {key: jx.measure.fusions(run, params, x) for key, (run, _) in candidates.items()}
    outputs = [jax.jit(run)(params, x) for run, _ in candidates.values()]
    print(f"\n{name}, fused\n\n{found['fused']}")
    fused, held = jx.measure.compare(candidates, x, rounds=rounds, show=False).rows
    return {
        "program": name,
        "fused": found["fused"].to_dict(),
        "apart": found["apart"].to_dict(),
        "ms": {row.name: [row.low_ms, row.median_ms, row.high_ms] for row in (fused, held)},
        "speedup": held.ratio,
        "speedup_quartiles": [held.ratio_low, held.ratio_high],
        "difference": float(jnp.abs(outputs[0] - outputs[1]).max()),
    }


def line(row: dict[str, Any]) -> tuple[object, ...]:
    fused, held = row["fused"], row["apart"]
    moved = (fused["bytes_moved"], held["bytes_moved"])
    return (
        *(row["program"], fused["ops_before"], len(fused["kernels"]), len(held["kernels"])),
        *(f"{value / 1e6:.2f}" for value in (*moved, moved[1] - moved[0])),
        *(f"{row['ms'][key][1]:.2f}" for key in ("fused", "apart")),
        f"{row['speedup']:.2f}",
        "{:.2f}-{:.2f}".format(*row["speedup_quartiles"]),
    )


def note(rows: list[dict[str, Any]]) -> str:
    loose = [row["program"] for row in rows if len(row["fused"]["kernels"]) >= _held(row)]
    worst = max(row["difference"] for row in rows)
    text = (
        "Kernels, operations and bytes are the compiler's; times as fast: the ratio of the two in "
        f"the same round. Largest difference of outputs: {worst:.1e}."
    )
    if loose:
        text += f" The barriers did not hold in {', '.join(loose)}: the times compare nothing."
    return text


def _held(row: dict[str, Any]) -> int:
    return len(row["apart"]["kernels"])


def findings(results: dict[str, Any]) -> list[str]:
    return [
        "{}, against the same held apart: kernels {} for {}, MB moved {:.1f} for {:.1f}, {:.2f} "
        "times as fast ({:.2f}-{:.2f}).".format(
            row["program"],
            *(len(row[key]["kernels"]) for key in ("fused", "apart")),
            *(row[key]["bytes_moved"] / 1e6 for key in ("fused", "apart")),
            *(row["speedup"], *row["speedup_quartiles"]),
        )
        for row in results["rows"]
    ]


def draw(path: Path, rows: list[dict[str, Any]]) -> None:
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.add_subplot()
    for offset, key, color in ((-0.2, "fused", "tab:blue"), (0.2, "apart", "tab:orange")):
        low, middle, high = zip(*(row["ms"][key] for row in rows), strict=True)
        spread = [
            [m - a for m, a in zip(middle, low, strict=True)],
            [b - m for m, b in zip(middle, high, strict=True)],
        ]
        places = [place + offset for place in range(len(rows))]
        axes.bar(places, middle, 0.36, yerr=spread, capsize=4, color=color, label=key)
        for place, top, row in zip(places, high, rows, strict=True):
            label = f"kernels: {len(row[key]['kernels'])}\n{row[key]['bytes_moved'] / 1e6:.1f} MB"
            axes.annotate(
                *(label, (place, top)),
                xytext=(0, 3),
                textcoords="offset points",
                ha="center",
                fontsize="small",
            )
    axes.set_xticks(range(len(rows)), [row["program"] for row in rows])
    axes.set_ylim(0, 1.3 * max(max(row["ms"][key][2] for key in row["ms"]) for row in rows))
    axes.set_ylabel("ms per call (median, quartiles)")
    axes.set_xlabel(f"program, forward, batch {BATCH}; above each bar: kernels, bytes they move")
    axes.legend(title="operations", loc="upper left")
    axes.set_title(common.machine_line(), fontsize="small")
    figure.savefig(path, dpi=150)


def main(argv: list[str] | None = None) -> None:
    parser = common.parser("fusion", __doc__, "fusion")
    parser.add_argument("--rounds", type=partial(common.at_least, 2), default=50)
    args = parser.parse_args(argv)
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {KEEP_BARRIERS}"
    common.use_device(args.device, parser)
    folder = common.make_folder(args.out, parser)
    rows = [measured(name, *program, args.rounds) for name, program in programs(args.seed).items()]
    results = {"batch": BATCH, "rounds": args.rounds, "rows": rows}
    lines = [line(row) for row in rows]
    common.publish(folder / "fusion", COLUMNS, lines, results, findings, note=note(rows))
    draw(folder / "fusion.png", rows)


if __name__ == "__main__":
    main()
