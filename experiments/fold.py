"""What folding batch norm buys in inference: kernels of the compiled program, and latency.

    python -m experiments.fold

The network as `jx.functional` gives it against the same with `jx.fold.batchnorm`, interleaved in
one process, batch sizes 1 and 8, in about 2 minutes on 2 CPU cores (AMD EPYC). Parameters are
random: neither kernels nor latency depend on them. There are 36 to 45% fewer kernels, and the same
latency: the convolutions take nearly all of it. The kept results are in
`experiments/results/fold.md`.
"""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

import jaxaccel as jx
from experiments import common
from jaxaccel import _trace

BATCHES = (1, 8)
COLUMNS = (
    *("network", "batch", "equations", "equations folded", "kernels", "kernels folded"),
    *("ms", "ms folded", "times as fast", "quartiles", "largest difference"),
)
# Instructions of a compiled program that move or compute nothing.
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "call"}


def networks() -> dict[str, tuple[nnx.Module, tuple[int, ...]]]:
    rngs = lambda: nnx.Rngs(0)
    return {
        "ResNet-20": (jx.nn.ResNet(20, rngs=rngs()), (32, 32, 3)),
        "ResNet-50": (jx.nn.ResNet(50, rngs=rngs()), (224, 224, 3)),
        "MobileNetV2": (jx.nn.MobileNet(1000, rngs=rngs()), (224, 224, 3)),
    }


def lively(params: Any) -> Any:
    """Statistics and scales as after some training, so that folding has something to do."""

    def noisy(path: Any, leaf: Any) -> Any:
        noise = jax.random.uniform(jax.random.key(leaf.size), leaf.shape, minval=-0.2, maxval=0.2)
        return leaf + noise if leaf.ndim == 1 else leaf

    return jax.tree_util.tree_map_with_path(noisy, params)


def kernels(fn: Callable, params: Any, x: Any) -> int:
    """Instructions of the compiled program's entry that do something."""
    text = jax.jit(fn).lower(params, x).compile().as_text() or ""
    entry = text[text.index("\nENTRY") :]
    names = re.findall(r"^\s+(?:ROOT )?%?[\w.-]+ = \S+ ([\w-]+)\(", entry, re.M)
    return sum(name not in _FREE for name in names)


def equations(fn: Callable, params: Any, x: Any) -> int:
    return common.equations(_trace.trace(fn, params, x).graph)


def measured(name: str, module: nnx.Module, shape: tuple[int, ...], batch: int) -> dict[str, Any]:
    fn, params = jx.functional(module)
    params = lively(params)
    x = jax.random.normal(jax.random.key(0), (batch, *shape))
    folded, small = jx.fold.batchnorm(fn, params, x)
    wanted, found = jax.jit(fn)(params, x), jax.jit(folded)(small, x)
    candidates = {"original": (fn, params), "folded": (folded, small)}
    before, after = jx.measure.compare(candidates, x, rounds=10, show=False).rows
    return {
        "network": name,
        "batch": batch,
        "equations": [equations(fn, params, x), equations(folded, small, x)],
        "kernels": [kernels(fn, params, x), kernels(folded, small, x)],
        "ms": [before.median_ms, after.median_ms],
        "speedup": 1 / after.ratio,
        "speedup_quartiles": [1 / after.ratio_high, 1 / after.ratio_low],
        "difference": float(jnp.abs(wanted - found).max() / jnp.abs(wanted).max()),
    }


def findings(results: dict[str, Any]) -> list[str]:
    rows = results["rows"]
    fewer = [1 - after / before for before, after in (row["kernels"] for row in rows)]
    speeds = [row["speedup"] for row in rows]
    spreads = [row["speedup_quartiles"] for row in rows]
    same = sum(low <= 1 <= high for low, high in spreads)
    return [
        f"The compiled program has {min(fewer):.0%} to {max(fewer):.0%} fewer kernels.",
        f"It is {min(speeds):.2f} to {max(speeds):.2f} times as fast: in {same} of {len(rows)} "
        "cases the quartiles include 1, no gain.",
    ]


def main(argv: list[str] | None = None) -> None:
    parser = common.parser("fold", __doc__, "fold")
    args = parser.parse_args(argv)
    common.use_device(args.device, parser)
    folder = common.make_folder(args.out, parser)
    rows = [
        measured(name, module, shape, batch)
        for name, (module, shape) in networks().items()
        for batch in BATCHES
    ]
    lines = [
        (
            *(row["network"], row["batch"], *row["equations"], *row["kernels"]),
            *(f"{ms:.2f}" for ms in row["ms"]),
            f"{row['speedup']:.2f}",
            "{:.2f}-{:.2f}".format(*row["speedup_quartiles"]),
            f"{row['difference']:.0e}",
        )
        for row in rows
    ]
    common.publish(folder / "fold", COLUMNS, lines, {"rows": rows}, findings)


if __name__ == "__main__":
    main()
