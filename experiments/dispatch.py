"""What the settings of compiling and of dispatching buy.

    python -m experiments.dispatch [--parts donation layouts options steps cache memory]

ConvNet and the stacks of convolutions are in XLA's own operations, MobileNet in the forms that
`jx.nn` takes. Each part takes its candidates in turn, the first four in one process and in shuffled
order, the last two in a process for each; the ratio is a candidate's time over the first one's in
the same round, below 1 is faster.

    donation  a training step (Adam) that gives the buffers of its state back, and one that does not
    layouts   the same stack of convolutions in NHWC and NCHW, and with the layout of the arguments
              left to XLA (jax.experimental.layout)
    options   jit(...).lower(...).compile(compiler_options={...}); results are compared, as the
              largest difference over the largest value of an array
    steps     K training steps as K calls, in lax.scan, in lax.scan with unroll=K, and written out
              in one program; jx.Accelerator(steps_per_call=K) is the third on CPU, else the second
    cache     the first training step of a process: nothing kept, and from the persistent cache
    memory    a training step under settings of glibc's malloc, each in processes of its own:
              GLIBC_TUNABLES=glibc.malloc.hugetlb=1 asks for huge pages, and with "kept" blocks are
              not given back to the system after each step, to be zeroed again page by page

XLA:CPU brings a convolution into the form that its fast kernels take only in the entry computation
of a program. In a loop's body those that are not in it already, such as each gradient of a kernel,
are left to a naive loop nest; steps that are written out, or a scan that is unrolled as a whole,
stay in the entry.
"""

from collections.abc import Callable
from functools import partial, reduce
from itertools import pairwise
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.experimental.layout import Format, Layout
from matplotlib.figure import Figure

import jaxaccel as jx
from experiments import common
from experiments.dispatch_processes import cache, memory
from experiments.dispatch_steps import (
    Candidate,
    Rows,
    compiled,
    convnet,
    mobilenet,
    rows,
    stepping,
)
from jaxaccel._tuned import untuned
from jaxaccel.measure._cost import _peak_memory

K = 4
OPTIONS: dict[str, dict[str, Any]] = {
    "cpu": {
        "xla_cpu_enable_fast_math": True,
        "xla_cpu_use_thunk_runtime": False,
        "xla_cpu_enable_concurrency_optimized_scheduler": False,
        "xla_cpu_prefer_vector_width": 512,
        "xla_cpu_max_isa": "AVX2",
        "xla_cpu_multi_thread_eigen": False,
        "xla_cpu_use_fusion_emitters": False,
        "xla_cpu_experimental_ynn_fusion_type": "",
        "xla_backend_optimization_level": 1,
    },
    "gpu": {
        "optimization_level": 19,  # what jax_optimization_level="O1" sets
        "xla_gpu_enable_latency_hiding_scheduler": True,
        "xla_gpu_enable_command_buffer": "",
        "xla_gpu_autotune_level": 0,
        "xla_backend_optimization_level": 1,
    },
}


def donation(seed: int, rounds: int) -> Rows:
    made = {f"ConvNet, batch {size}": convnet(size, seed) for size in (16, 128)}
    found = []
    for name, (step, state, batch) in (
        made | {"MobileNet 96x96, batch 8": mobilenet(8, seed)}
    ).items():
        ways: dict[str, Candidate] = {}
        for setting, donated in (("not donated", ()), ("donated", 0)):
            program, seconds = compiled(step, (state, batch), donate_argnums=donated)
            memory = {"peak memory, bytes": _peak_memory(program.memory_analysis())}
            ways[setting] = (stepping(program, state, batch), seconds, memory)
        found += rows("donation", name, ways, rounds)
    return found


def stack(last: bool, kernels: list[Any], x: Any) -> Any:
    """Four 3x3 convolutions with relu, two of stride 2, and a mean; channels last or first."""
    names = ("NHWC", "HWIO", "NHWC") if last else ("NCHW", "OIHW", "NCHW")
    for i, kernel in enumerate(kernels):
        stride = (1 + i % 2,) * 2
        x = lax.conv_general_dilated(x, kernel, stride, "SAME", dimension_numbers=names)
        x = jax.nn.relu(x)
    return x.mean((1, 2) if last else (2, 3))


def stack_gradient(last: bool, kernels: list[Any], x: Any) -> Any:
    return jax.grad(lambda kernels: jnp.sum(stack(last, kernels, x) ** 2))(kernels)


def stack_arguments(seed: int) -> tuple[list[Any], jax.Array]:
    """Kernels and images, channels last."""
    rng, widths = np.random.default_rng(seed), (3, 32, 64, 64, 128)
    shapes = [(3, 3, *pair) for pair in pairwise(widths)]
    kernels = [rng.standard_normal(s) / np.sqrt(np.prod(s[:3])) for s in shapes]
    x = rng.standard_normal((16, 64, 64, 3))
    return [jnp.asarray(k, jnp.float32) for k in kernels], jnp.asarray(x, jnp.float32)


def layouts(seed: int, rounds: int) -> Rows:
    kernels, x = stack_arguments(seed)
    first = [k.transpose(3, 2, 0, 1) for k in kernels], x.transpose(0, 3, 1, 2)
    found = []
    for name, fn in (("forward", stack), ("gradient of the kernels", stack_gradient)):
        ways: dict[str, Candidate] = {}
        for setting, last, args in (("NHWC", True, (kernels, x)), ("NCHW", False, first)):
            program, seconds = compiled(partial(fn, last), args)
            ways[setting] = (partial(program, *args), seconds, {"arguments moved": "0"})
            ways[f"{setting}, arguments as XLA asks"] = automatic(partial(fn, last), args)
        found += rows("layouts", f"4 convolutions, {name}", ways, rounds)
    return found


def automatic(fn: Callable, args: tuple) -> Candidate:
    """The arguments in the memory order that the compiler asks for, put there beforehand."""
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), args)
    try:
        program, seconds = compiled(fn, shapes, in_shardings=Format(Layout.AUTO))
        formats = program.input_formats[0]
        args = jax.tree.map(jax.device_put, args, formats)
        jax.block_until_ready(program(*args))
    except jax.errors.JaxRuntimeError as error:  # a backend without layouts
        return (None, None, {"arguments moved": str(error).partition("\n")[0][:80]})
    plain = [tuple(range(x.ndim)) for x in jax.tree.leaves(args)]
    orders = [f.layout.major_to_minor for f in jax.tree.leaves(formats)]
    moved = sum(a != b for a, b in zip(plain, orders, strict=True))
    return (partial(program, *args), seconds, {"arguments moved": moved})


def options(seed: int, rounds: int) -> Rows:
    fn, params = jx.functional(jx.nn.ConvNet(rngs=nnx.Rngs(seed)))
    image = convnet(128, seed)[2]["image"]
    gradient = untuned(jax.grad(lambda params, x: jnp.sum(fn(params, x) ** 2)))
    found = []
    for name, subject, args in (
        ("ConvNet, batch 128, gradient", gradient, (params, image)),
        ("4 convolutions, gradient", partial(stack_gradient, True), stack_arguments(seed)),
    ):
        program, seconds = compiled(subject, args)
        ways: dict[str, Candidate] = {
            "default": (partial(program, *args), seconds, {"difference": "0"})
        }
        for option, value in OPTIONS[jax.default_backend()].items():
            way = with_options(subject, args, {option: value}, program(*args))
            ways[f"{option}={value!r}"] = way
        found += rows("options", name, ways, rounds)
    return found


def with_options(fn: Callable, args: tuple, setting: dict[str, Any], wanted: Any) -> Candidate:
    try:
        program, seconds = compiled(fn, args, setting)
    except jax.errors.JaxRuntimeError as error:
        unknown = "No such compile option" in str(error)
        said = "unknown to this jaxlib" if unknown else str(error).splitlines()[0][:80]
        return (None, None, {"difference": said})
    pairs = zip(jax.tree.leaves(program(*args)), jax.tree.leaves(wanted), strict=True)
    difference = max(float(abs(a - b).max() / abs(b).max()) for a, b in pairs)
    return (partial(program, *args), seconds, {"difference": f"{difference:.0e}"})


def steps(seed: int, rounds: int) -> Rows:
    found = []
    for size in (16, 32, 128):
        step, state, batch = convnet(size, seed)
        single, seconds = compiled(step, (state, batch), donate_argnums=0)
        one = stepping(single, state, batch)
        many = lambda one=one: [one() for _ in range(K)][-1]
        ways: dict[str, Candidate] = {f"{K} calls": (many, seconds, loops(single))}
        batches = jax.tree.map(lambda x: jnp.stack([x] * K), batch)
        for name, form in several(step).items():
            program, seconds = compiled(form, (state, batches), donate_argnums=0)
            ways[name] = (stepping(program, state, batches), seconds, loops(program))
        found += rows("steps", f"ConvNet, batch {size}", ways, rounds, per=K)
    return found


def several(step: Callable) -> dict[str, Callable]:
    """Programs of K steps."""

    def scan(state: Any, batches: Any, unroll: int) -> Any:
        body = lambda state, batch: (step(state, batch), None)
        return lax.scan(body, state, batches, unroll=unroll)[0]

    def written_out(state: Any, batches: Any) -> Any:
        each = [jax.tree.map(lambda x, i=i: x[i], batches) for i in range(K)]
        return reduce(step, each, state)

    scans = {"lax.scan": partial(scan, unroll=1), f"lax.scan, unroll={K}": partial(scan, unroll=K)}
    return scans | {"written out": written_out}


def loops(program: Any) -> dict[str, Any]:
    return {"loops": program.as_text().count(" while(")}  # random bits are drawn in some


PARTS = {part.__name__: part for part in (donation, layouts, options, steps, cache, memory)}


def page(found: Rows, style: Any) -> str:
    return common.paragraphs(None, *(part_table(own, style) for own in by("part", found).values()))


def by(key: str, found: Rows) -> dict[str, Rows]:
    values = dict.fromkeys(row[key] for row in found)
    return {value: [row for row in found if row[key] == value] for value in values}


def part_table(own: Rows, style: Any) -> str:
    extra = list(own[0]["found"])
    columns = ("what", own[0]["part"], "ms", "ratio", "quartiles", "compile, s", *extra)
    lines = []
    for row in own:
        spread = "{:.2f}-{:.2f}".format(*row["quartiles"]) if row["quartiles"] else None
        ends = [row["compile_s"], *row["found"].values()]
        lines.append((row["subject"], row["setting"], row["ms"], row["ratio"], spread, *ends))
    return jx.measure.table(columns, lines, style)


def findings(results: dict[str, Any]) -> list[str]:
    """Of each part the settings that take the least and the most of the first one's time."""
    said = []
    for part, own in by("part", results["rows"]).items():
        firsts = [rows[0] for rows in by("subject", own).values()]
        others = [row for row in own if row not in firsts and row["ratio"]]
        ends = sorted(others, key=lambda row: row["ratio"])
        pair = " to ".join(map(ratio_words, ends[:1] + ends[1:][-1:]))
        settings = ", ".join(by("setting", firsts))
        said.append(f"{part.capitalize()}, time over that of {settings}: {pair or '0 others ran'}.")
    return said


def ratio_words(row: dict[str, Any]) -> str:
    spread = "{:.2f}-{:.2f}".format(*row["quartiles"])
    return f"{row['ratio']:.2f} ({spread}; {row['setting']}, {row['subject']})"


def plot(path: Path, found: Rows) -> None:
    """For each part, bars of its settings, one colour for each subject."""
    parts = by("part", [row for row in found if row["ratio"]])
    heights = [len(by("setting", own)) + 1.5 for own in parts.values()]
    figure = Figure(figsize=(9, 0.4 * sum(heights)), layout="constrained")
    every = figure.subplots(len(parts), squeeze=False, height_ratios=heights)[:, 0]
    for axes, (part, own) in zip(every, parts.items(), strict=True):
        names, subjects = list(by("setting", own)), by("subject", own)
        height = 0.8 / len(subjects)
        for i, (subject, bars) in enumerate(subjects.items()):
            shift = height * (i - (len(subjects) - 1) / 2)
            y = [names.index(row["setting"]) + shift for row in bars]
            x = [row["ratio"] for row in bars]
            error = np.abs(np.subtract([row["quartiles"] for row in bars], np.transpose([x]))).T
            axes.barh(y, x, height, xerr=error, capsize=2, label=subject)
        axes.axvline(1, color="black", linewidth=0.8)
        axes.set_yticks(range(len(names)), names, fontsize=8)
        axes.invert_yaxis()
        axes.set_title(part, fontsize=9, loc="left")
        axes.legend(fontsize=7, ncols=3, loc="lower right", bbox_to_anchor=(1, 1), frameon=False)
    every[-1].set_xlabel("time over the first setting's (median, quartiles)")
    figure.suptitle(common.machine_line(), fontsize=9)
    figure.savefig(path, dpi=130)


def main(argv: list[str] | None = None) -> None:
    parser = common.parser("dispatch", __doc__, "dispatch")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--rounds", type=partial(common.at_least, 2), default=20)
    args = parser.parse_args(argv)
    common.use_device(args.device, parser, keep_compiled=False)
    folder = common.make_folder(args.out, parser)
    found = []
    for name in args.parts:
        print(f"{name} ...", flush=True)
        found += PARTS[name](args.seed, args.rounds)
    common.write(folder / "dispatch", partial(page, found), {"rows": found}, findings)
    plot(folder / "dispatch.png", found)


if __name__ == "__main__":
    main()
