"""Every form of `jx.autotune` against XLA's own, for calls that networks make.

    python -m experiments.forms
    python -m experiments.forms --survey
    python -m experiments.forms --int8

Each call and each of its gradients is timed as `jx.autotune` does it, in all forms that apply,
which must equal XLA's own; "rule" is the form that is taken without timing. With --survey these
are the shapes, at several batch sizes, that the rules for a CPU were drawn from; with --int8 calls
of int8 summed in int32. The second table holds rewritings of a dense convolution that
`jx.autotune` does not try on floats:

    space to depth   a strided convolution as one that moves by one over the pixels between two
                     strides, as channels
    NCHW             the axes of images and kernel in PyTorch's order, transposed on the way
    padded before    the edges by jax.lax.pad, the convolution without
"""

from collections.abc import Callable, Iterator
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
from jaxaccel._autotune import times
from jaxaccel._forms import XLA, Op, candidates, rule
from jaxaccel._forms._conv import Conv, space_to_depth
from jaxaccel._forms_report import operands, operation
from jaxaccel._graph import graph_of
from jaxaccel._tuned import formed, has_forms, op_of
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
    dtype: Any = np.float32


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
    sides = (1, window, window, 1), (1, stride, stride, 1)

    def fn(x: Any) -> Any:
        lowest = np.iinfo(x.dtype).min if x.dtype == np.int8 else -np.inf
        start, reduce = (0, lax.add) if average else (lowest, lax.max)
        return lax.reduce_window(x, x.dtype.type(start), reduce, *sides, pads)

    return Call(name, fn, (x,))


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


def of_int8(call: Call) -> Call:
    fn = call.fn if len(call.shapes) == 1 else partial(call.fn, preferred_element_type=np.int32)
    return call._replace(fn=fn, stride=None, dtype=np.int8)


def of_one_image(call: Call) -> Call:
    (_, *sizes), *others = call.shapes
    return call._replace(name=f"{call.name}, batch 1", shapes=((1, *sizes), *others))


COMPUTED = tuple(c for c in CALLS if c.name != "coordinates, dense" and "average" not in c.name)
INT8 = tuple(
    of_int8(call)
    for call in (
        *(each for call in COMPUTED for each in (call, of_one_image(call))),
        conv("ResNet-18, last 3x3, batch 1", (1, 7, 7, 512), (3, 3, 512, 512), 1, 1),
        conv("ResNet-18, pruned", (16, 28, 28, 77), (3, 3, 77, 77), 1, 1),
        conv("MobileNet, last depthwise", (32, 3, 3, 960), (3, 3, 1, 960), 1, 1, 960),
        conv("MobileNet, projection", (32, 6, 6, 576), (1, 1, 576, 96)),
        Call("dense", jnp.dot, ((32, 512), (512, 1000))),
        Call("dense, one row", jnp.dot, ((1, 512), (512, 1000))),
    )
)


def survey() -> Iterator[Call]:
    """The shapes around those of the networks."""
    for b in (1, 4, 16):
        for side, c in ((56, 64), (28, 128), (14, 256), (7, 512)):
            yield conv(f"3x3, batch {b}", (b, side, side, c), (3, 3, c, c), 1, 1)
        for side, c in ((56, 64), (14, 256)):
            yield conv(f"3x3, stride 2, batch {b}", (b, side, side, c), (3, 3, c, 2 * c), 2, 1)
            yield conv(f"1x1, stride 2, batch {b}", (b, side, side, c), (1, 1, c, 2 * c), 2)
    for b in (1, 16):
        for groups, c, side in ((2, 64, 28), (4, 128, 28), (8, 128, 14), (16, 256, 14)):
            x, kernel = (b, side, side, c), (3, 3, c // groups, c)
            yield conv(f"{groups} groups, batch {b}", x, kernel, 1, 1, groups)
    for b in (1, 16, 128):
        for side, c, out in ((28, 1, 32), (28, 3, 16), (24, 10, 20), (28, 16, 16), (32, 16, 32)):
            yield conv(f"few channels, batch {b}", (b, side, side, c), (3, 3, c, out), 1, 1)
    for summed in (2, 3, 4, 6, 8):
        for rows, columns in ((1_000, 128), (10_000, 16), (10_000, 128), (100_000, 64)):
            yield Call(f"dense, {summed} summed", jnp.dot, ((rows, summed), (summed, columns)))


def ops_of(call: Call) -> list[Op]:
    """The operation, and those of its gradients, which int8 has none of."""

    def everything(*args: Any) -> Any:
        out, pullback = jax.vjp(call.fn, *args)
        return out, pullback(out)

    avals = [jax.ShapeDtypeStruct(shape, call.dtype) for shape in call.shapes]
    fn = call.fn if call.dtype == np.int8 else everything
    return [op_of(node) for node in graph_of(fn, *avals)[0].nodes if has_forms(node)]


def shallow(call: Call, x: Any, kernel: Any) -> Any:
    """By space to depth."""
    strides, pads = (call.stride or 1,) * 2, ((call.pad, call.pad),) * 2
    moved = Conv(strides, pads, (1, 1), (1, 1), 1, 1, None, None)
    return space_to_depth(lambda x, kernel, conv: conv(x, kernel))(x, kernel, moved)


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
    found |= {"space to depth": shallow} if (call.stride or 1) > 1 else {}
    found |= {"padded before": padded_before} if call.pad else {}
    return {name: partial(fn, call) for name, fn in found.items()}


def measured(call: Call, op: Op, forward: bool) -> dict[str, Any]:
    """Seconds of each form, and of what is refused."""
    others = refused(call) if forward and call.stride else {}
    # Which autotune spares where it is slow.
    own = {XLA: partial(formed, op.name, XLA, **op.params)}
    seconds, dropped = times(op, own | others)
    if XLA not in seconds:
        raise SystemExit(f"{call.name}: XLA's own form failed: {dropped.get(XLA)}")
    return {
        "part": call.name if forward else f"{call.name}, gradient",
        "operation": operation(op),
        "operands": operands(op),
        "rule": rule(op, jax.default_backend()),
        "seconds": {name: own for name, own in seconds.items() if name not in others},
        "refused": {name: seconds[name] for name in others if name in seconds},
        "dropped": dropped,
    }


def page(rows: list[dict[str, Any]], style: Any) -> str:
    lines, others = [], []
    for row in rows:
        seconds = row["seconds"]
        best = min(seconds, key=lambda name: seconds[name])
        gain = lambda name, seconds=seconds: seconds[XLA] / seconds[name]
        where = (row["part"], row["operation"], row["operands"], 1e3 * seconds[XLA])
        by_rule = gain(row["rule"]) if row["rule"] in seconds else "differs"
        lines.append((*where, best, gain(best), row["rule"], by_rule))
        for name, own in row["refused"].items():
            ratios = seconds[XLA] / own, seconds[best] / own
            others.append((row["part"], name, 1e3 * own, *ratios))
    return common.paragraphs(None, table(COLUMNS, lines, style), table(REFUSED, others, style))


def findings(results: dict[str, Any]) -> list[str]:
    rows = results["rows"]
    gains = [{name: row["seconds"][XLA] / own for name, own in row["seconds"].items()}
             for row in rows]  # fmt: skip
    best = [max(found.values()) for found in gains]
    by_rule = [found.get(row["rule"]) for found, row in zip(gains, rows, strict=True)]
    taken = sum(gain == most for gain, most in zip(by_rule, best, strict=True))
    timed = [gain for gain in by_rule if gain]
    said = [
        f"The fastest form is {np.median(best):.1f} times as fast as XLA's own in the median of "
        f"{len(rows)} operations, {max(best):.1f} times at most.",
        f"The rules take it in {taken} of {len(rows)}; their form is slower than XLA's own in "
        f"{sum(gain < 1 for gain in timed)} ({min(timed):.2f} times as fast at the least).",
    ]
    others = [min(row["seconds"].values()) / own for row in rows for own in row["refused"].values()]
    if others:
        said.append(
            f"Of {len(others)} rewritings that are not tried, those faster than the fastest form: "
            f"{sum(gain > 1 for gain in others)} ({max(others):.2f} times as fast at most)."
        )
    return said


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
        gains = {name: row["seconds"][XLA] / own for name, own in row["seconds"].items()}
        points["another form"] += [(value, y) for value in gains.values()]
        points["by rule"] += [(gains[row["rule"]], y)] if row["rule"] in gains else []
        points["fastest"].append((max(gains.values()), y))
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
    parser.add_argument("--survey", action="store_true", help="the shapes behind the rules")
    parser.add_argument("--int8", action="store_true", help="int8 summed in int32")
    args = parser.parse_args(argv)
    common.use_device(args.device, parser)
    folder = common.make_folder(args.out, parser)
    calls, name = (survey(), "forms-survey") if args.survey else (CALLS, "forms")
    calls, name = (INT8, "forms-int8") if args.int8 else (calls, name)
    jobs = [(call, op, i == 0) for call in calls for i, op in enumerate(ops_of(call))]
    jobs = [job for job in jobs if candidates(job[1])]
    rows = [measured(*job) for job in track(jobs, "forms", transient=True)]
    common.write(folder / name, partial(page, rows), {"rows": rows}, findings)
    plot(folder / f"{name}.png", rows)


if __name__ == "__main__":
    main()
