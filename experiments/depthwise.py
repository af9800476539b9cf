"""A depthwise convolution in XLA's own form, in that of the rules, and in PyTorch.

    python -m experiments.depthwise

Forward, and forward with the gradients of images and kernel. `jx.nn` and `jx.autotune` write the
convolution as shifted multiply-adds on CPU, its input gradient as the same with the kernel turned
round, and its kernel gradient as sums of products; off the CPU the rules leave it to XLA, and the
ratio says so. PyTorch, where it is installed (`[bench]`), is timed in the same rounds, on channels
last images, as its own guide advises for CPUs, and on contiguous ones: the faster counts.
"""

import gc
import os
import statistics
from collections.abc import Callable
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from matplotlib.figure import Figure

from experiments import common
from jaxaccel._tuned import by_rules
from jaxaccel.measure._compare import _interleave

# batch, side, channels, kernel
SHAPES = ((8, 56, 64, 3), (32, 28, 32, 3), (8, 14, 512, 3), (8, 28, 128, 5))
ROUNDS, MIN_TIME = 15, 0.02
WORK = ("forward", "with gradients")
COLUMNS = ("shape", "what", "XLA, ms", "rules, ms", "times as fast", "quartiles", "PyTorch, ms",
           "rules / PyTorch")  # fmt: skip
Calls = dict[str, Callable[[], Any]]


def jax_calls(x: np.ndarray, kernel: np.ndarray, what: str) -> Calls:
    def conv(x: Any, kernel: Any) -> Any:
        return lax.conv_general_dilated(
            x,
            kernel,
            (1, 1),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=x.shape[3],
        )

    def work(conv: Callable) -> Callable:
        if what == "forward":
            return conv
        return jax.value_and_grad(lambda x, kernel: jnp.sum(conv(x, kernel) ** 2), (0, 1))

    calls, args = {}, jax.device_put((x, kernel))
    for name, form in (("XLA", conv), ("rules", by_rules(conv))):
        compiled = jax.jit(work(form)).lower(*args).compile()
        calls[name] = lambda compiled=compiled: compiled(*args)
    same = [jax.tree.leaves(call()) for call in calls.values()]
    for a, b in zip(*same, strict=True):
        apart = float(jnp.abs(a - b).max() / jnp.abs(a).max())
        assert apart < 1e-5, f"{x.shape}, {what}: the forms differ by {apart:.1e}"
    return calls


def torch_calls(x: np.ndarray, kernel: np.ndarray, what: str) -> Calls:
    """Contiguous and channels last; nothing where PyTorch is not installed."""
    if not find_spec("torch"):
        return {}
    torch = import_module("torch")
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    grad = what != "forward"
    conv = partial(torch.nn.functional.conv2d, padding=kernel.shape[0] // 2, groups=x.shape[3])

    def call(images: Any, weights: Any) -> Any:
        if not grad:
            with torch.inference_mode():
                return conv(images, weights)
        return torch.autograd.grad((conv(images, weights) ** 2).sum(), (images, weights))

    calls: Calls = {}
    for name in ("contiguous_format", "channels_last"):
        memory = {"memory_format": getattr(torch, name)}
        given = (torch.tensor(x.transpose(0, 3, 1, 2)), torch.tensor(kernel.transpose(3, 2, 0, 1)))
        args = [value.contiguous(**memory).requires_grad_(grad) for value in given]
        calls[f"PyTorch, {name}"] = partial(call, *args)
    return calls


def measured(shape: tuple[int, ...], what: str) -> dict[str, Any]:
    batch, side, channels, size = shape
    random = np.random.default_rng(0)
    x = random.normal(size=(batch, side, side, channels)).astype(np.float32)
    kernel = random.normal(size=(size, size, 1, channels)).astype(np.float32)
    calls = jax_calls(x, kernel, what) | torch_calls(x, kernel, what)
    gc.collect()
    seconds = _interleave(calls, ROUNDS, MIN_TIME)
    ratios = [a / b for a, b in zip(seconds["XLA"], seconds["rules"], strict=True)]
    low, speedup, high = statistics.quantiles(ratios, n=4)
    ms = {name: 1e3 * statistics.median(values) for name, values in seconds.items()}
    peer = min((name for name in ms if "PyTorch" in name), key=lambda name: ms[name], default=None)
    over = peer and [a / b for a, b in zip(seconds["rules"], seconds[peer], strict=True)]
    return {
        "shape": f"{batch}x{side}x{side}x{channels}, {size}x{size}",
        "what": what,
        "ms": ms,
        "speedup": speedup,
        "speedup_quartiles": [low, high],
        "torch": peer,
        "over_torch": statistics.median(over) if over else None,
    }


def line(row: dict[str, Any]) -> tuple[str, ...]:
    ms, peer = row["ms"], row["torch"]
    return (
        row["shape"],
        row["what"],
        f"{ms['XLA']:.2f}",
        f"{ms['rules']:.2f}",
        f"{row['speedup']:.1f}",
        "{:.1f}-{:.1f}".format(*row["speedup_quartiles"]),
        f"{ms[peer]:.2f}" if peer else common.NOT_MEASURED,
        f"{row['over_torch']:.2f}" if peer else common.NOT_MEASURED,
    )


def means(rows: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    """Geometric means over the shapes."""
    lines = []
    for what in WORK:
        own = [row for row in rows if row["what"] == what]
        speed = statistics.geometric_mean(row["speedup"] for row in own)
        over = [row["over_torch"] for row in own if row["over_torch"]]
        ratio = f"{statistics.geometric_mean(over):.2f}" if over else common.NOT_MEASURED
        lines.append(("geometric mean", what, "", "", f"{speed:.1f}", "", "", ratio))
    return lines


def plot(path: Path, rows: list[dict[str, Any]]) -> None:
    figure = Figure(figsize=(9, 4))
    for axes, what in zip(figure.subplots(1, 2, sharey=True), WORK, strict=True):
        own = [row for row in rows if row["what"] == what]
        for i, name in enumerate(("XLA", "rules", "torch")):
            name_of = lambda row, name=name: row["torch"] if name == "torch" else name
            ms = [row["ms"].get(name_of(row), np.nan) for row in own]
            label = {"XLA": "XLA's own", "rules": "jaxaccel, rules", "torch": "PyTorch"}[name]
            axes.bar(np.arange(len(own)) + 0.27 * (i - 1), ms, 0.25, label=label)
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        ticks = [row["shape"].replace(", ", "\n") for row in own]
        axes.set_xticks(range(len(own)), ticks, fontsize=7)
        axes.set_title(f"depthwise convolution, {what}", fontsize=9)
    figure.axes[0].set_ylim(top=6 * figure.axes[0].get_ylim()[1])
    figure.axes[0].set_ylabel("ms per call (log scale)")
    figure.axes[1].legend(fontsize=8)
    figure.suptitle(common.machine_line(), fontsize=9)
    figure.savefig(path, dpi=130, bbox_inches="tight", pad_inches=0.15)


def findings(results: dict[str, Any]) -> list[str]:
    said = []
    for what in WORK:
        own = [row for row in results["rows"] if row["what"] == what]
        speed = [row["speedup"] for row in own]
        over = [row["over_torch"] for row in own if row["over_torch"]]
        text = (
            f"{what.capitalize()}: the rules' form is {statistics.geometric_mean(speed):.1f} times "
            f"as fast as XLA's own ({min(speed):.1f} to {max(speed):.1f})"
        )
        if over:
            text += f", and takes {statistics.geometric_mean(over):.2f} of PyTorch's time"
            text += f" ({min(over):.2f} to {max(over):.2f})"
        said.append(f"{text}; geometric means over {len(own)} shapes.")
    return said


def main(argv: list[str] | None = None) -> None:
    parser = common.parser("depthwise", __doc__, "depthwise")
    args = parser.parse_args(argv)
    common.use_device(args.device, parser)
    folder = common.make_folder(args.out, parser)
    rows = [measured(shape, what) for shape in SHAPES for what in WORK]
    lines = [*map(line, rows), *means(rows)]
    common.publish(folder / "depthwise", COLUMNS, lines, {"rows": rows}, findings)
    plot(folder / "depthwise.png", rows)


if __name__ == "__main__":
    main()
