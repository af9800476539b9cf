"""What int8 buys in time on this machine: against float32 in its fastest form, and against peers.

    pip install -e '.[bench]'
    python -m experiments.int8_speed
    python -m experiments.int8_speed --cases infer-resnet18-224px-batch16 --chains

For each case a network with random weights in several forms, all on the same batch:

    float32             batch norm folded, `jx.autotune`: what the others are held against
    int8                `jx.quantize.int8`, static, then `jx.autotune`
    int8, fastest       the same with mode="fastest"
    Qwix                its static PTQ of the same Flax network, under `jax.jit`
    onnxruntime, int8   `quantize_static`, QDQ, per channel
    openvino, int8      from the same file

The chains (`experiments.int8_chain`) begin with networks that are trained: then half of the
multiply-accumulates go, what is left is fine-tuned, put on integers and tuned. "plain" is the
trained network with Flax's own batch norm under `jax.jit`. The peers get the pruned network.
Accuracies are on the test set, of one seed. What is trained is kept beside the compiled code.

One process, warm, in shuffled turns, with a pause at every change of the engine; ratios are taken
within each round. Every case is kept as it is done. Leave the machine idle.
"""

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

import jaxaccel as jx
from experiments import benchmark, benchmark_jax, benchmark_peers, common, int8_report
from experiments.benchmark_networks import CASES, Problem, problem
from experiments.benchmark_peers import Kit
from experiments.benchmark_timing import Engine, interleaved
from experiments.int8_chain import CHAINS, Chain
from experiments.int8_report import FLOAT, PLAIN, page, plot
from jaxaccel._choices import default_folder

# How many times as fast as float32 int8 is meant to be.
TARGETS = {"convnet": 1.5, "mobilenet": 1.3, "resnet18": 1.4}
PARTS = 10  # of the test set
INFERENCE = [name for name, case in CASES.items() if not case.train]
Makers = Mapping[str, Callable[[], Engine]]


def int8(problem: Problem, **options: Any) -> Engine:
    """The network on integers, tuned."""
    batches = list(problem.calibration) or [problem.images]
    fn, params = jx.quantize.int8(problem.fn, problem.params, batches, progress=False, **options)
    rows, left = len(fn.report.rows), len(fn.report.left)
    found = served(benchmark_jax.tuned(fn), params, problem)
    return found._replace(mode=f"{rows} of {rows + left} layers on integers")


def served(fn: Callable, params: Any, problem: Problem) -> Engine:
    """A function under `jax.jit`."""
    params, images = jax.device_put((params, problem.images))
    return benchmark_jax.engine(problem, jax.jit(fn), (params, images))


def qwix(problem: Problem) -> Engine:
    """Weights per channel and activations in int8, ranges from the batch."""
    (tool,) = common.packages(common.parser("int8_speed", None, "int8_speed"), "qwix")
    kinds = {"weight_qtype": "int8", "act_qtype": "int8", "act_static_scale": True}
    rules = [tool.QuantizationRule(module_path=".*", **kinds)]
    module = flax_module(problem)
    module = tool.quantize_model(module, tool.QtProvider(rules), problem.images)
    module(problem.images)
    module = tool.quantize_model(module, tool.PtqProvider(rules), problem.images)
    graph, state = nnx.split(module)
    return served(lambda state, x: nnx.merge(graph, state)(x), state, problem)


def flax_module(problem: Problem) -> Any:
    """The network with JAX's own convolution, which Qwix replaces."""
    module = problem.plain.module(problem.params)
    module.eval()
    for _, layer in nnx.iter_modules(module):
        if isinstance(layer, nnx.Conv):
            layer.conv_general_dilated = jax.lax.conv_general_dilated
    return module


def peers(given: Problem, kit: Kit, folder: Path) -> Makers:
    """Two engines on the int8 network that onnxruntime's tools make."""
    return {
        "onnxruntime, int8": partial(benchmark_peers.onnxruntime, kit, given, folder, True),
        "openvino, int8": partial(benchmark_peers.openvino, kit, given, folder, True),
    }


def timed(makers: Makers, rounds: int, tick: Callable[[str], object]) -> list[dict[str, Any]]:
    """A row for each; one that fails is a result."""
    rows, engines = [], {}
    for name, make in makers.items():
        tick(name)
        row: dict[str, Any] = {"candidate": name}
        try:
            engines[name] = make()
            row["mode"], row["logits"] = engines[name].mode, engines[name].outputs
        except Exception as error:
            row["error"] = (str(error).strip() or type(error).__name__).splitlines()[0]
        rows.append(row)
    first = rows[0]["logits"]
    for row in rows:
        if "logits" in row:
            row["agreement"] = benchmark.agreement(row.pop("logits"), first)
    for name, seconds in interleaved(engines, rounds, lambda: tick("timing")).items():
        next(row for row in rows if row["candidate"] == name)["seconds"] = seconds
    return rows


def case_record(name: str, kit: Kit, folder: Path, rounds: int, seed: int, tick: Callable) -> dict:
    """One case with random weights."""
    case = CASES[name]
    given = problem(case, seed)
    makers = {
        FLOAT: partial(benchmark_jax.ours, given),
        "int8": partial(int8, given),
        "int8, fastest": partial(int8, given, mode="fastest"),
        "Qwix": partial(qwix, given),
        **peers(given, kit, folder),
    }
    rows = timed(makers, rounds, lambda text: tick(f"{name}: {text}"))
    return {"name": name, "batch": case.batch, "target": TARGETS[case.network], "rows": rows}


def chain_record(name: str, kit: Kit, folder: Path, rounds: int, seed: int, tick: Callable) -> dict:
    """One chain, with the accuracy of each row."""
    tick(f"{name}: training")
    kept = default_folder() / "trained"
    chain = Chain(name, seed, 8000, kept)
    images = chain.timed_images()
    whole, small = chain.problem(chain.whole, images), chain.problem(chain.pruned, images)
    makers = {
        PLAIN: partial(benchmark_jax.plain, whole),
        FLOAT: partial(benchmark_jax.ours, whole),
        "pruned": partial(benchmark_jax.ours, small),
        "int8": partial(int8, whole),
        "pruned, int8": partial(int8, small),
        "pruned, int8, fastest": partial(int8, small, mode="fastest"),
        **{f"pruned, {name}": make for name, make in peers(small, kit, folder).items()},
    }
    rows = timed(makers, rounds, lambda text: tick(f"{name}: {text}"))
    found = accuracies(chain, kit, folder, small)
    for row in rows:
        row["accuracy"] = found[row["candidate"].removesuffix(", fastest")]
    target = chain.setup.target
    return {"name": name, "batch": len(images), "target": target, "side": images.shape[1],
            "rows": rows}  # fmt: skip


def accuracies(chain: Chain, kit: Kit, folder: Path, small: Problem) -> dict[str, float]:
    """On the test set, in percent, in the size that the network was trained for."""
    test = chain.splits.test
    parts = np.split(np.asarray(common.scaled(test.image)), PARTS)
    case = replace(small.case, side=parts[0].shape[1], batch=len(parts[0]))
    calibration = np.resize(np.concatenate(chain.batches), parts[0].shape)  # some of them twice
    given = small._replace(case=case, images=parts[0], calibration=[calibration])
    found = {PLAIN: chain.accuracy(chain.whole), "pruned": chain.accuracy(chain.pruned)}
    found[FLOAT] = found[PLAIN]
    found["int8"] = chain.accuracy(chain.int8(chain.whole))
    found["pruned, int8"] = chain.accuracy(chain.int8(chain.pruned))
    for name in peers(given, kit, folder):
        logits = [peers(given._replace(images=part), kit, folder)[name]().outputs for part in parts]
        right = np.concatenate(logits).argmax(-1) == np.asarray(test.label)
        found[f"pruned, {name}"] = 100 * float(right.mean())
    return found


def findings(results: dict[str, Any]) -> list[str]:
    return int8_report.words(results["cases"])


def main(argv: list[str] | None = None) -> None:
    parser = common.parser("int8_speed", __doc__, "int8_speed")
    names = {"choices": INFERENCE, "default": INFERENCE, "metavar": "CASE"}
    parser.add_argument("--cases", nargs="*", **names)
    parser.add_argument("--chains", nargs="*", choices=CHAINS, default=list(CHAINS))
    parser.add_argument("--rounds", type=common.positive, default=10)
    parser.add_argument("--fresh", action="store_true", help="measure again what is kept")
    args = parser.parse_args(argv)
    common.use_device(args.device, parser)
    benchmark_peers.engines(parser)
    kit, out = benchmark_peers.torch_kit(parser, "cpu"), common.make_folder(args.out, parser)
    runs = benchmark.Runs(out / "int8_speed-runs.json", args.fresh)
    jobs = [(name, case_record) for name in args.cases]
    jobs += [(name, chain_record) for name in args.chains]
    with tempfile.TemporaryDirectory() as temporary, benchmark.progress(len(jobs)) as tick:
        records = []
        for name, record in jobs:
            folder = common.make_folder(Path(temporary) / name, parser)
            make = partial(record, name, kit, folder, args.rounds, args.seed, tick)
            on = lambda make=make: {"machine": common.machine_line(), **make()}
            records.append(runs.kept(benchmark.key(name, args.rounds, args.seed), on))
            tick(name, 1)
    head = f"{common.machine_line()}; {common.malloc()}"
    shown = partial(page, records, head)
    measured = common.machines(records)
    common.write(out / "int8_speed", shown, {"cases": records}, findings, measured)
    plot(out / "int8_speed.png", records)


if __name__ == "__main__":
    common.with_huge_pages()
    main()
