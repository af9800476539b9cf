"""A network on three engines, as float32 and as int8: accuracy, latency, and bytes.

    pip install -e '.[bench]'
    python -m experiments.engines
    python -m experiments.engines --networks convnet --rounds 10

Networks that are trained on cluttered digits (those of `experiments.int8_chain`: MobileNetV2 and
ResNet-18 are timed on images of another size), each as

    xla                          batch norm folded, `jx.autotune`
    xla, int8                    `jx.quantize.int8`, static, then `jx.autotune`
    onnxruntime, openvino        what `jx.export.compile` makes of the float32 network
    onnxruntime, int8 ...        what it makes of the same int8 network
    onnxruntime, quantize_static ...
                                 onnxruntime's own static int8 (QDQ, per channel, its defaults) of
                                 our float32 file: the way there is without `jx.quantize`

on all cores, interleaved, with pauses. Accuracies are on the whole test set, of one seed; all of
int8 sees the same 512 images for calibration. Leave the machine idle.
"""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from matplotlib.figure import Figure

import jaxaccel as jx
from experiments import benchmark_peers, common
from experiments.benchmark_jax import tuned
from experiments.int8_chain import CHAINS, Chain
from jaxaccel._choices import default_folder
from jaxaccel.export._engines import started
from jaxaccel.measure._cost import parameter_size

FOREIGN = ("onnxruntime", "openvino")
FLOAT, THEIRS = "xla", "quantize_static"
PARTS = 50  # of the test set
COLUMNS = (
    *("network", "batch", "candidate", "ms", "quartiles", "times xla", "accuracy, %"),
    *("logits from float32, %", "bytes"),
)


def networks(chain: Chain, batches: Sequence[Any]) -> dict[str, tuple[Callable, Any]]:
    """The trained network without batch norm, and the same on integers."""
    fn, params = chain.whole.fn, chain.whole.params
    folded = jx.fold.batchnorm(fn, params, batches[0]) if "batch_stats" in params else (fn, params)
    return {"": folded, "int8": jx.quantize.int8(fn, params, batches, progress=False)}


def candidates(
    chain: Chain, batches: Sequence[Any], folder: Path, forms: Callable[[Callable], Callable]
) -> Iterator[tuple[str, Any, int]]:
    """By name, what `jx.measure.compare` takes, and the bytes of its file or its parameters."""
    example, made = batches[0], networks(chain, batches)
    for kind, (fn, params) in made.items():
        name = partial(named, kind=kind)
        yield name("xla"), (forms(fn), params), parameter_size(params)[1]
        for engine in FOREIGN:
            path = folder / f"{kind or 'float32'}.onnx"
            jx.export.onnx(path, fn, params, example)
            found = jx.export.compile(fn, params, example, engine=engine)
            yield name(engine), found, path.stat().st_size
    path = quantized(folder / "float32.onnx", batches)
    for engine in FOREIGN:
        run = started(engine, path.read_bytes())
        bind = lambda x, run=run: partial(
            lambda call, x: call({"args/0": x})[0], run, np.asarray(x)
        )
        found = jx.export.Compiled(engine, made[""][1], bind)
        yield named(engine, THEIRS), found, path.stat().st_size


def named(engine: str, kind: str) -> str:
    return f"{engine}, {kind}" if kind else engine


def quantized(source: Path, batches: Sequence[Any]) -> Path:
    """By onnxruntime's tools, as its documentation advises."""
    return benchmark_peers.quantize_static(
        source, source.with_suffix(".theirs.onnx"), [{"args/0": np.asarray(x)} for x in batches]
    )


def called(candidate: Any) -> Callable[[Any], np.ndarray]:
    """The logits of a batch."""
    if isinstance(candidate, tuple):
        fn, params = candidate
        compiled = jax.jit(fn)
        return lambda x: np.asarray(compiled(params, x))
    return lambda x: np.asarray(candidate(x))


def accuracies(chain: Chain, folder: Path) -> dict[str, dict[str, float]]:
    """On the test set, in percent, in the size that the network was trained for."""
    test = chain.splits.test
    parts = np.split(np.asarray(common.scaled(test.image)), PARTS)
    by_rules = partial(tuned, mode="rules")
    found, real = {}, None
    for name, candidate, size in candidates(chain, chain.batches, folder, by_rules):
        logits = np.concatenate([called(candidate)(part) for part in parts])
        real = logits if real is None else real
        right = logits.argmax(-1) == np.asarray(test.label)
        found[name] = {
            "accuracy": 100 * float(right.mean()),
            "noise": 100 * float(np.linalg.norm(logits - real) / np.linalg.norm(real)),
            "bytes": size,
        }
    return found


def record(name: str, rounds: int, seed: int, tick: Callable[[str], None]) -> dict[str, Any]:
    """Everything about one network."""
    chain = Chain(name, seed, 8000, default_folder() / "trained")
    tick(f"{name}: accuracy")
    with tempfile.TemporaryDirectory() as temporary:
        quality = accuracies(chain, Path(temporary))
    images = chain.timed_images()
    rows = []
    for batch in (1, len(images)):
        tick(f"{name}: batch {batch}")
        with tempfile.TemporaryDirectory() as temporary:
            made = candidates(chain, [images], Path(temporary), tuned)
            timed = {row: candidate for row, candidate, _ in made}
        x = images[:batch]
        found = jx.measure.compare(timed, x, rounds=rounds, min_time=0.1, show=False)
        rows += [{"batch": batch, **row._asdict(), **quality[row.name]} for row in found.rows]
    return {"network": name, "side": images.shape[1], "rows": rows}


def line(network: str, row: dict[str, Any]) -> tuple[object, ...]:
    low, middle, high = np.percentile(row["rounds_ms"], (25, 50, 75))
    return (
        *(network, row["batch"], row["name"], f"{middle:.3f}", f"{low:.3f}-{high:.3f}"),
        "{1:.2f} ({0:.2f}-{2:.2f})".format(*times(row, row["base"])),
        *(f"{row['accuracy']:.2f}", f"{row['noise']:.2f}", f"{row['bytes']:,}"),
    )


def times(row: dict[str, Any], base: Sequence[float]) -> np.ndarray:
    """How many times as fast as another, round by round: quartiles, the median between."""
    return np.percentile(np.divide(base, row["rounds_ms"]), (25, 50, 75))


class Verdict(NamedTuple):
    """Our int8 on an engine: times as fast as theirs and as float32 there, points from theirs."""

    name: str
    theirs: np.ndarray
    float32: np.ndarray
    points: float


def verdicts(records: list[dict[str, Any]]) -> Iterator[Verdict]:
    """Our int8 against theirs, on the same engine."""
    for found in records:
        rows = {(row["batch"], row["name"]): row for row in found["rows"]}
        for batch, name in rows:
            engine, _, kind = name.partition(", ")
            if kind != "int8" or engine not in FOREIGN:
                continue
            own, other = rows[batch, name], rows[batch, named(engine, THEIRS)]
            yield Verdict(
                f"{found['network']}, batch {batch}, {name}",
                times(own, other["rounds_ms"]),
                times(own, rows[batch, engine]["rounds_ms"]),
                own["accuracy"] - other["accuracy"],
            )


def words(found: Verdict) -> str:
    low, middle, high = found.theirs
    return (
        f"{found.name}: {middle:.2f} ({low:.2f}-{high:.2f}) times as fast as {THEIRS} there, "
        f"{found.points:+.2f} points of accuracy; {found.float32[1]:.2f} times as fast as float32 "
        "there."
    )


def findings(results: dict[str, Any]) -> list[str]:
    found = list(verdicts(results["networks"]))
    points = [one.points for one in found]
    said = []
    for whom, median in (
        (f"onnxruntime's {THEIRS}", lambda one: one.theirs[1]),
        ("float32", lambda one: one.float32[1]),
    ):
        slower = [f"{one.name} ({median(one):.2f})" for one in found if median(one) < 1]
        said.append(
            f"Our int8 is {min(map(median, found)):.2f} to {max(map(median, found)):.2f} times as "
            f"fast as {whom} on the same engine; slower in {len(slower)} of {len(found)}"
            f"{': ' if slower else ''}{'; '.join(slower)}."
        )
    return [
        *said,
        f"Its accuracy is {min(points):+.2f} to {max(points):+.2f} points from {THEIRS}'s.",
    ]


def plot(path: Path, records: list[dict[str, Any]]) -> None:
    """A panel for each network and batch, a bar for each candidate."""
    panels = [(found, batch) for found in records
              for batch in dict.fromkeys(row["batch"] for row in found["rows"])]  # fmt: skip
    figure = Figure(figsize=(11, 2.5 * -(-len(panels) // 2)), layout="constrained")
    places = figure.subplots(-(-len(panels) // 2), 2, squeeze=False).flat
    for axes, (found, batch) in zip(places, panels, strict=True):
        rows = [row for row in found["rows"] if row["batch"] == batch]
        for place, row in enumerate(rows):
            low, middle, high = times(row, row["base"])
            kind = row["name"].partition(", ")[2]
            color = {"": "C7", "int8": "C0", THEIRS: "C1"}[kind]
            axes.barh(place, middle, xerr=[[middle - low], [high - middle]], color=color, capsize=3)
            axes.text(high, place, f"  {middle:.2f}", va="center", fontsize=7)
        axes.set_yticks(range(len(rows)), [row["name"] for row in rows], fontsize=7)
        axes.set_xlim(0, 1.15 * axes.get_xlim()[1])
        axes.axvline(1, color="0.4", linewidth=1)
        axes.invert_yaxis()
        axes.set_title(f"{found['network']} at {found['side']} px, batch {batch}", fontsize=9)
        axes.set_xlabel("times as fast as xla (float32)", fontsize=8)
    figure.suptitle(
        "float32 (grey), int8 of jx.quantize (blue), quantize_static of onnxruntime (orange): "
        f"median and quartiles\n{common.machine_line()}",
        fontsize=9,
    )
    figure.savefig(path, dpi=110)


def main(argv: list[str] | None = None) -> None:
    parser = common.parser("engines", __doc__, "engines")
    parser.add_argument("--networks", nargs="+", choices=CHAINS, default=list(CHAINS))
    parser.add_argument("--rounds", type=common.positive, default=15)
    args = parser.parse_args(argv)
    common.use_device(args.device, parser)
    benchmark_peers.engines(parser)
    folder = common.make_folder(args.out, parser)
    tick = lambda text: print(text, flush=True)
    records = [record(name, max(2, args.rounds), args.seed, tick) for name in args.networks]
    for found in records:
        bases = {row["batch"]: row["rounds_ms"] for row in found["rows"] if row["name"] == FLOAT}
        for row in found["rows"]:
            row["base"] = bases[row["batch"]]
    lines = [line(found["network"], row) for found in records for row in found["rows"]]
    note = "\n".join(map(words, verdicts(records)))
    head = f"{common.machine_line()}; {common.malloc()}"
    results = {"networks": records}
    common.publish(folder / "engines", COLUMNS, lines, results, findings, head, note)
    plot(folder / "engines.png", records)


if __name__ == "__main__":
    common.with_huge_pages()
    main()
