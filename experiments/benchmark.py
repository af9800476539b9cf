"""jaxaccel against plain Flax, PyTorch, onnxruntime and openvino: training and inference.

    pip install -e '.[bench]'
    python -m experiments.benchmark
    python -m experiments.benchmark --device gpu

Every candidate has the same weights, the same batch and the same work: a training step is forward
in training mode (batch norm with the statistics of the batch, the running ones updated; no
dropout), softmax cross entropy, gradients and Adam; inference gives logits. What each computes is
held against plain Flax first: the logits within 1e-3 of the largest, the losses of the first three
steps within 0.1%, 0.5% and 3% (Adam's steps multiply rounding); one that differs more is called
wrong and not timed. The int8 engines compute something else by design: their difference is
printed, and the share of images with the same class.

Each in its best mode, the fastest of those tried here on the same batch:

    plain Flax       flax.nnx, optax and jax.jit, state donated
    jaxaccel         jx.autotune(step); for inference jx.fold.batchnorm, then jx.autotune
    jaxaccel, rules  the same without measuring: jx.autotune(mode="rules")
    torch            eager; contiguous or channels last; inference with batch norm fused or not,
                     training with the fused or the foreach Adam
    torch.compile    contiguous or channels last; inference with frozen weights, on a GPU the
                     default mode or CUDA graphs; training with the fused Adam
    onnxruntime      all graph optimizations; int8 static, per channel, by its own tools
    openvino         the latency hint, float32; int8 from the same file as onnxruntime's

One process, with huge pages from glibc for all (GLIBC_TUNABLES=glibc.malloc.hugetlb=1, which this
sets where nothing else is; `experiments.dispatch --parts memory` shows what they are worth), as
many threads as cores for each, warm, in turn in shuffled order, a pause at every change so that
the thread pools of the one before sleep; ratios are taken within each round. Inference on a CPU
waits for every call, as one request after another; training and a GPU wait for the last call of a
sample. Every sample of training begins at the initial weights. Leave the machine idle.

FLOPs are those of the plain function as written, bytes its arguments and results (parameters,
batch, for training Adam's moments too): the least that must travel, without what lies between
layers. "of the limit" is the share of what the largest measured matrix product and copy allow at
that intensity; for int8 the limit is float32's. "first call" is from nothing to the first result:
tracing, compiling, for jaxaccel measuring what to choose, on an empty cache. "compile" is of JAX
the tracing and compiling with the choices known, of onnxruntime and openvino the time to load.

Every case is kept as it is done, and an interrupted run goes on where it stopped.
"""

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from rich.console import Console
from rich.progress import Progress

import jaxaccel as jx
from experiments import benchmark_jax, benchmark_peers, benchmark_report, common
from experiments.benchmark_networks import CASES, Case, Problem, problem
from experiments.benchmark_peers import Kit
from experiments.benchmark_timing import Engine, interleaved, limits
from jaxaccel._choices import digest, environment

TOLERANCES = {"float32": 1e-3, "bfloat16": 5e-2, "int8": float("inf")}
TF32 = 1e-2  # a GPU's products of float32
# Adam's first steps divide each gradient by its own size: where that is rounding alone, so is the
# step. PyTorch's losses for MobileNet differed by 5e-7, 6e-4 and 7e-3 of plain Flax's.
GROWTH = np.array([1, 5, 30])
VERSIONS = ("jax", "jaxlib", "flax", "optax", "jaxaccel", "torch", "onnxruntime", "openvino")


class Candidate(NamedTuple):
    """Who takes part: `family` is plain, jaxaccel or peer."""

    name: str
    family: str
    precision: str
    make: Callable[[], Engine]


def candidates(problem: Problem, kit: Kit | None, gpu: bool, folder: Path) -> list[Candidate]:
    """Plain Flax first: the others are held against it."""
    own = partial(benchmark_jax.ours, problem)
    found = [
        Candidate("plain Flax", "plain", "float32", partial(benchmark_jax.plain, problem)),
        Candidate("jaxaccel", "jaxaccel", "float32", own),
        Candidate("jaxaccel, rules", "jaxaccel", "float32", partial(own, mode="rules")),
    ]
    if gpu:
        found.append(
            Candidate("jaxaccel, bfloat16", "jaxaccel", "bfloat16", partial(own, bfloat16=True))
        )
    if kit is not None:
        for precision in ("float32", "bfloat16") if gpu else ("float32",):
            for name, compiled in (("torch", False), ("torch.compile", True)):
                half = precision == "bfloat16"
                make = partial(benchmark_peers.torch, kit, problem, compiled, half)
                name += ", bfloat16" if half else ""
                found.append(Candidate(name, "peer", precision, make))
    if kit is not None and not gpu and not problem.case.train:
        engines = (benchmark_peers.onnxruntime, benchmark_peers.openvino)
        for precision in ("float32", "int8"):
            for engine in engines:
                name = engine.__name__ + (", int8" if precision == "int8" else "")
                make = partial(engine, kit, problem, folder, precision == "int8")
                found.append(Candidate(name, "peer", precision, make))
    return found


def readied(
    candidate: Candidate, reference: Engine | None, gpu: bool
) -> tuple[dict, Engine | None]:
    """The row of a candidate, and its engine where it may be timed."""
    row: dict[str, Any] = {
        "candidate": candidate.name,
        "family": candidate.family,
        "precision": candidate.precision,
        "mode": "",
    }
    try:
        engine = candidate.make()
    except Exception as error:  # one peer that fails is a result, not the end
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        return row | {"status": "failed", "error": said}, None
    wanted = (reference or engine).outputs
    differs = differences(engine.outputs, wanted)
    right = bool(np.all(differs <= allowed(candidate.precision, gpu, differs)))  # of NaN not
    row |= {
        "mode": engine.mode,
        "status": "ok" if right else "wrong",
        "difference": float(differs.max()),
        "agreement": agreement(engine.outputs, wanted),
        "first_s": engine.first_s,
        "compile_s": engine.compile_s,
    }
    return row, engine if right else None


def differences(found: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Of logits the largest, relative to the largest logit; of losses each, to the loss."""
    if wanted.ndim == 2:
        return np.abs(found - wanted).max(keepdims=True)[0] / np.abs(wanted).max()
    return np.abs(found - wanted) / np.abs(wanted)


def allowed(precision: str, gpu: bool, differs: np.ndarray) -> np.ndarray:
    """How large each of `differences` may be."""
    base = TF32 if gpu and precision == "float32" else TOLERANCES[precision]
    return np.minimum(base * GROWTH, 0.3) if len(differs) == len(GROWTH) else np.array([base])


def agreement(found: np.ndarray, wanted: np.ndarray) -> float | None:
    """The share of images with the same class; None for losses."""
    return float((found.argmax(-1) == wanted.argmax(-1)).mean()) if wanted.ndim == 2 else None


def measured(
    case: Case, taking_part: list[Candidate], work: dict, rounds: int, gpu: bool, tick: Callable
) -> dict[str, Any]:
    """The record of a case."""
    rows, engines = [], {}
    for candidate in taking_part:
        tick(f"{case.name}: {candidate.name}")
        row, engine = readied(candidate, engines.get(taking_part[0].name), gpu)
        rows.append(row)
        if engine is not None:
            engines[candidate.name] = engine
        elif candidate is taking_part[0]:
            raise SystemExit(f"{case.name}: {candidate.name}: {row.get('error', 'not finite')}")
    seconds = interleaved(engines, rounds, lambda: tick(f"{case.name}: timing"))
    for row in rows:
        if row["candidate"] in seconds:
            row["seconds"] = seconds[row["candidate"]]
    targets = {"plain": case.plain, "peer": case.peer}
    return {
        "case": case.name,
        "train": case.train,
        "batch": case.batch,
        "rounds": rounds,
        "date": common.machine()["date"],
        "machine": common.machine_line(),
        "targets": {kind: target for kind, target in targets.items() if target is not None},
        **work,
        "rows": rows,
    }


class Runs:
    """What earlier runs found, in a file, by what was measured on what."""

    def __init__(self, path: Path, fresh: bool) -> None:
        self.path = path
        self.fresh = fresh
        self.runs = json.loads(path.read_text())["runs"] if path.exists() else {}

    def kept(self, key: str, make: Callable[[], Any]) -> Any:
        """The result of this key, made and written where it is not there."""
        if self.fresh or key not in self.runs:
            self.runs[key] = make()
            common.store(self.path, {"runs": self.runs})
        return self.runs[key]


def versions() -> dict[str, str]:
    """Of everything that takes part."""

    def of(name: str) -> str:
        try:
            return version(name)
        except PackageNotFoundError:
            return "absent"

    return {name: of(name) for name in VERSIONS}


def key(what: str, rounds: int, seed: int) -> str:
    """A case, or the limits, on this machine with these versions and this code."""
    on = environment()
    machine = (
        f"{on['device']}, {on['processor']}, {on['cores']} cores, {common.malloc()}, code {_code()}"
    )
    parts = [f"{what}, {rounds} rounds, seed {seed}", machine, *map(" ".join, versions().items())]
    return "; ".join(parts)


@cache
def _code() -> str:
    """A digest of jaxaccel's source, whose version stays the same while it is written."""
    files = sorted(Path(jx.__file__).parent.rglob("*.py"))
    return digest([path.read_text() for path in files])


def peers(parser: common.Parser, gpu: bool) -> Kit | None:
    """PyTorch for all, or an exit with one line; None where it has no GPU for itself."""
    if not gpu:
        benchmark_peers.engines(parser)
        return benchmark_peers.torch_kit(parser, "cpu")
    if find_spec("torch") is None or not import_module("torch").cuda.is_available():
        return None
    return benchmark_peers.torch_kit(parser, "cuda")


@contextmanager
def progress(cases: int) -> Iterator[Callable]:
    """A function that says what is under way; it draws or prints then only, never in a sample."""
    console = Console(stderr=True)
    shown = {"console": console, "auto_refresh": False, "transient": True}
    with Progress(**shown, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=cases)

        def tick(text: str, done: int = 0) -> None:
            if not console.is_terminal and bar.tasks[0].description != text:
                console.print(text)  # into a log, once each
            bar.update(task, description=text, advance=done, refresh=True)

        yield tick


def findings(results: dict[str, Any]) -> list[str]:
    return benchmark_report.words(results["cases"])


def publish(folder: Path, records: list[dict], found: dict[str, Any], rounds: int) -> None:
    """Tables and plots."""
    named = ", ".join(f"{name} {number}" for name, number in versions().items())
    head = f"{common.machine_line()}\n{named}\n{common.malloc()}"
    dates = " and ".join(sorted({record["date"] for record in records}))
    note = (
        f"Medians of {rounds} rounds, quartiles; ratios within each round, above 1 is faster. "
        f"Measured on {dates}."
    )
    page = partial(benchmark_report.page, records, found, head, note)
    results = {"limits": found, "cases": records}
    common.write(folder / "benchmark", page, results, findings, common.machines(records))
    benchmark_report.plots(records, found, folder)


def main(argv: list[str] | None = None) -> None:
    parser = common.parser("benchmark", __doc__, "benchmark")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="CASE")
    parser.add_argument("--rounds", type=common.positive, default=10)
    parser.add_argument("--fresh", action="store_true", help="measure again what is kept")
    args = parser.parse_args(argv)
    # PyTorch needs a GPU's memory as well.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    common.use_device(args.device, parser, keep_compiled=False)
    gpu = jax.default_backend() == "gpu"
    with tempfile.TemporaryDirectory() as temporary, progress(len(args.cases)) as tick:
        kit = peers(parser, gpu)
        folder = common.make_folder(args.out, parser)
        runs = Runs(folder / "benchmark-runs.json", args.fresh)
        of = partial(key, rounds=args.rounds, seed=args.seed)

        def record(case: Case) -> dict[str, Any]:
            # Empty caches, so that first calls are what they are for a new user.
            os.environ["JAXACCEL_CACHE"] = f"{temporary}/jaxaccel-{case.name}"
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{temporary}/torch-{case.name}"
            given = problem(case, args.seed)
            part = candidates(given, kit, gpu, Path(temporary))
            return measured(case, part, benchmark_jax.work(given), args.rounds, gpu, tick)

        tick("the machine's limits")
        found = runs.kept(of("limits"), lambda: limits(kit and kit.torch, gpu))
        records = []
        for case in (CASES[name] for name in args.cases):
            records.append(runs.kept(of(case.name), partial(record, case)))
            tick(case.name, 1)
    publish(folder, records, found, args.rounds)


if __name__ == "__main__":
    common.with_huge_pages()
    main()
