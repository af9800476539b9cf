"""Every form of `jx.autotune` against XLA's own, for calls that networks make.

    python -m experiments.forms

Each call and each of its gradients is timed in all forms that apply to it, which must equal XLA's
own; "rule" is the form that is taken without timing. The second table holds rewritings that
`jx.autotune` does not try, and why: here, none is the fastest.

    space to depth   a strided convolution as one that moves by one over the pixels between two
                     strides, as channels
    NCHW             the axes of images and kernel in PyTorch's order, transposed on the way
    padded before    the edges by jax.lax.pad, the convolution without
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from matplotlib.figure import Figure
from rich.progress import track

from experiments import common
from jaxaccel._forms import XLA, Op, candidates, rule
from jaxaccel._forms_report import _operands, _operation
from jaxaccel._graph import graph_of
from jaxaccel._timing import synthetic, timed
from jaxaccel._tuned import has_forms, op_of, original
from jaxaccel.measure import table

LAYOUT = ("NHWC", "HWIO", "NHWC")
COLUMNS = ("network's part", "call", "operands", "XLA, ms", "fastest", "times as fast",
           "rule", "times as fast ")  # fmt: skip
REFUSED = ("network's part", "rewriting", "ms", "times as fast as XLA", "as the fastest form")


class Call(NamedTuple):
    """A function with one operation, its operands' shapes, and a strided convolution's padding."""

    name: str
    fn: Callable[..., Any]
    shapes: tuple[tuple[int, ...], ...]
    stride: int | None = None
    pad: int = 0


def conv(
    name: str, x: tuple, kernel: tuple, stride: int = 1, pad: int = 0, groups: int = 1
) -> Call:
    fn = partial(
        lax.conv_general_dilated,
        window_strides=(stride, stride),
        padding=((pad, pad), (pad, pad)),
        dimension_numbers=LAYOUT,
        feature_group_count=groups,
    )
    return Call(name, fn, (x, kernel), stride if groups == 1 else None, pad)


def pool(name: str, x: tuple, window: int, stride: int, pad: int, average: bool = False) -> Call:
    pads = ((0, 0), (pad, pad), (pad, pad), (0, 0))
    start, reduce = (0.0, lax.add) if average else (-jnp.inf, lax.max)
    sides = (1, window, window, 1), (1, stride, stride, 1)
    return Call(name, lambda x: lax.reduce_window(x, start, reduce, *sides, pads), (x,))


CALLS = (
    conv("ConvNet, conv 1", (128, 28, 28, 1), (5, 5, 1, 10)),
    conv("ConvNet, conv 2", (128, 12, 12, 10), (5, 5, 10, 20)),
    pool("ConvNet, max pool", (128, 24, 24, 10), 2, 2, 0),
    conv("ResNet-18, stem", (16, 224, 224, 3), (7, 7, 3, 64), 2, 3),
    pool("ResNet-18, max pool", (16, 112, 112, 64), 3, 2, 1),
    conv("ResNet-18, 3x3", (16, 28, 28, 128), (3, 3, 128, 128), 1, 1),
    conv("ResNet-18, 3x3, stride 2", (16, 56, 56, 64), (3, 3, 64, 128), 2, 1),
    conv("ResNet-18, 1x1, stride 2", (16, 56, 56, 64), (1, 1, 64, 128), 2),
    conv("MobileNet, stem", (32, 96, 96, 3), (3, 3, 3, 32), 2, 1),
    conv("MobileNet, expansion", (32, 24, 24, 24), (1, 1, 24, 144)),
    conv("MobileNet, depthwise", (32, 24, 24, 144), (3, 3, 1, 144), 1, 1, 144),
    conv("MobileNet, depthwise, stride 2", (32, 48, 48, 96), (3, 3, 1, 96), 2, 1, 96),
    conv("ResNeXt, grouped", (16, 28, 28, 64), (3, 3, 16, 64), 1, 1, 4),
    pool("DenseNet, average pool", (16, 28, 28, 128), 2, 2, 0, average=True),
    pool("Inception, average pool", (16, 14, 14, 192), 3, 1, 1, average=True),
    Call("coordinates, dense", jnp.dot, ((100_000, 3), (3, 64))),
)


def ops_of(call: Call) -> list[Op]:
    """The operation, and those of its gradients."""

    def everything(*args: Any) -> Any:
        out, pullback = jax.vjp(call.fn, *args)
        return out, pullback(out)

    avals = [jax.ShapeDtypeStruct(shape, np.float32) for shape in call.shapes]
    nodes = (node for node in graph_of(everything, *avals)[0].nodes if has_forms(node))
    return [op for op in map(op_of, nodes) if candidates(op)]


def space_to_depth(call: Call, x: Any, kernel: Any) -> Any:
    s, k, c = call.stride or 1, kernel.shape[0], kernel.shape[2]
    out = (x.shape[1] + 2 * call.pad - k) // s + 1
    taps = -(-k // s)
    side = (out - 1 + taps) * s
    kernel = jnp.pad(kernel, ((0, taps * s - k), (0, taps * s - k), (0, 0), (0, 0)))
    after = side - x.shape[1] - call.pad
    x = lax.pad(x, 0.0, [(0, 0, 0), *[(call.pad, after, 0)] * 2, (0, 0, 0)])
    x = x.reshape(-1, side // s, s, side // s, s, c).transpose(0, 1, 3, 2, 4, 5)
    kernel = kernel.reshape(taps, s, taps, s, c, -1).transpose(0, 2, 1, 3, 4, 5)
    x, kernel = x.reshape(*x.shape[:3], -1), kernel.reshape(taps, taps, s * s * c, -1)
    return lax.conv_general_dilated(x, kernel, (1, 1), "VALID", dimension_numbers=LAYOUT)


def channels_first(call: Call, x: Any, kernel: Any) -> Any:
    strides, pads = (call.stride or 1,) * 2, ((call.pad, call.pad),) * 2
    x, kernel = x.transpose(0, 3, 1, 2), kernel.transpose(3, 2, 0, 1)
    return lax.conv_general_dilated(x, kernel, strides, pads).transpose(0, 2, 3, 1)


def padded_before(call: Call, x: Any, kernel: Any) -> Any:
    x = lax.pad(x, 0.0, [(0, 0, 0), *[(call.pad, call.pad, 0)] * 2, (0, 0, 0)])
    strides = (call.stride or 1,) * 2
    return lax.conv_general_dilated(x, kernel, strides, "VALID", dimension_numbers=LAYOUT)


def refused(call: Call) -> dict[str, Callable]:
    found = {"NCHW": channels_first}
    found |= {"space to depth": space_to_depth} if (call.stride or 1) > 1 else {}
    found |= {"padded before": padded_before} if call.pad else {}
    return {name: partial(fn, call) for name, fn in found.items()}


def measured(call: Call, op: Op, forward: bool, rounds: int) -> dict[str, Any]:
    """Seconds of each form, and of what is refused."""
    forms = {XLA: partial(original, op.name)}
    forms |= {name: form.run for name, form in candidates(op).items()}
    runs: dict[str, Callable] = {name: partial(run, **op.params) for name, run in forms.items()}
    others = refused(call) if forward and call.stride else {}
    avals = [jax.ShapeDtypeStruct(s, d) for s, d in zip(op.shapes, op.dtypes, strict=True)]
    found = timed(runs | others, synthetic(avals), rounds, terms=op.terms)
    part = call.name if forward else f"{call.name}, gradient"
    seconds = {name: found.seconds[name] for name in runs if name in found.seconds}
    return {
        "part": part,
        "operation": _operation(op),
        "operands": _operands(op),
        "rule": rule(op, jax.default_backend()),
        "seconds": seconds,
        "refused": {name: found.seconds[name] for name in others if name in found.seconds},
        "dropped": found.dropped,
    }


def page(rows: list[dict[str, Any]], style: Any) -> str:
    lines, others = [], []
    for row in rows:
        seconds = row["seconds"]
        best = min(seconds, key=lambda name: seconds[name])
        times = lambda name, seconds=seconds: seconds[XLA] / seconds[name]
        where = (row["part"], row["operation"], row["operands"], 1e3 * seconds[XLA])
        lines.append((*where, best, times(best), row["rule"], times(row["rule"])))
        for name, own in row["refused"].items():
            ratios = seconds[XLA] / own, seconds[best] / own
            others.append((row["part"], name, 1e3 * own, *ratios))
    return common.paragraphs(None, table(COLUMNS, lines, style), table(REFUSED, others, style))


def plot(path: Path, rows: list[dict[str, Any]]) -> None:
    """A line for each call: all its forms by their time over XLA's."""
    names = [row["part"] for row in rows]
    figure = Figure(figsize=(9, 0.27 * len(rows) + 1.5), layout="constrained")
    axes = figure.subplots()
    styles: dict[str, dict[str, Any]] = {
        "another form": {"s": 12, "color": "tab:gray"},
        "by rule": {"s": 28, "color": "tab:blue", "marker": "D"},
        "fastest": {"s": 60, "color": "tab:orange", "marker": "*"},
    }
    points: dict[str, list[tuple[float, int]]] = {name: [] for name in styles}
    for y, row in enumerate(rows):
        times = {name: row["seconds"][XLA] / own for name, own in row["seconds"].items()}
        points["another form"] += [(value, y) for value in times.values()]
        points["by rule"].append((times[row["rule"]], y))
        points["fastest"].append((max(times.values()), y))
    for label, style in styles.items():
        x, y = zip(*points[label], strict=True)
        axes.scatter(x, y, label=label, **style)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_xlabel("times as fast as XLA's own form")
    axes.set_yticks(range(len(rows)), names, fontsize=7)
    axes.invert_yaxis()
    axes.grid(axis="x", linewidth=0.3)
    axes.legend(fontsize=8, loc="lower right")
    figure.suptitle(common.machine_line(), fontsize=9)
    figure.savefig(path, dpi=130)


def main(argv: list[str] | None = None) -> None:
    parser = common.parser("forms", __doc__, "forms")
    parser.add_argument("--rounds", type=common.positive, default=9)
    args = parser.parse_args(argv)
    common.use_device(args.device, parser)
    folder = common.make_folder(args.out, parser)
    jobs = [(call, op, i == 0) for call in CALLS for i, op in enumerate(ops_of(call))]
    rows = [measured(*job, args.rounds) for job in track(jobs, "forms", transient=True)]
    common.write(folder / "forms", partial(page, rows), {"rows": rows})
    plot(folder / "forms.png", rows)


if __name__ == "__main__":
    main()
