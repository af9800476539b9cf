"""Where the time of one call goes: the kernels of a case of `experiments.benchmark`.

    python -m experiments.profile
    python -m experiments.profile --case train-mobilenet-96px-batch32 --candidate plain

Times are from a trace of JAX's profiler, for one call of many; each is a kernel's own, without
what it calls. What a kernel holds and the bytes it moves are those of `jx.measure.fusions`; kernels
that hold the same are one line. Kernels may run side by side, and between them there is dispatch
and waiting: they need not add up to the call.
"""

import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
from jax.profiler import ProfileData
from matplotlib.figure import Figure

from experiments import benchmark_jax, common
from experiments.benchmark_networks import CASES, problem
from experiments.benchmark_timing import clocked
from jaxaccel.measure._fusions import Fusions, _summary, read

COLUMNS = ("kernels", "operations of each", "MB moved", "ms", "share", "GB/s")
CANDIDATES: dict[str, Callable] = {
    "jaxaccel": partial(benchmark_jax.our_call, mode="measure"),
    "rules": partial(benchmark_jax.our_call, mode="rules"),
    "plain": benchmark_jax.plain_call,
}
Row = dict[str, Any]


def traced(run: Callable[[int], None], calls: int) -> tuple[dict[str, float], float]:
    """Milliseconds of each operation of the compiled program, and of all, for one call."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            _, seconds = clocked(lambda: run(calls))
        (file,) = Path(folder).rglob("*.xplane.pb")
        found = own_times(ProfileData.from_file(str(file)))
    return {name: ns / calls / 1e6 for name, ns in found.items()}, 1e3 * seconds / calls


def own_times(data: Any) -> dict[str, float]:
    """Nanoseconds of each operation, without what stands inside of it on the same thread."""
    found: dict[str, float] = defaultdict(float)
    for line in (line for plane in data.planes for line in plane.lines):
        around: list[tuple[float, str]] = []  # ends and names of those that are not over
        for start, end, name in sorted(events(line.events), key=lambda e: (e[0], -e[1])):
            while around and around[-1][0] <= start:
                around.pop()
            found[name] += end - start
            if around:
                found[around[-1][1]] -= end - start
            around.append((end, name))
    return found


def events(every: Iterable[Any]) -> Iterator[tuple[float, float, str]]:
    """Start, end and name of those that are operations of a compiled program."""
    for event in every:
        name = dict(event.stats).get("hlo_op")
        if name is not None:
            yield event.start_ns, event.start_ns + event.duration_ns, str(name)


def rows(found: Fusions, times: dict[str, float]) -> list[Row]:
    """Kernels that hold the same together, those that take longest first."""
    groups: dict[str, Row] = {}
    for kernel in found.kernels:
        ops = _summary(kernel.ops)
        row = groups.setdefault(ops, {"kernels": 0, "ops": ops, "bytes": 0, "ms": 0.0})
        row["kernels"] += 1
        row["bytes"] += kernel.bytes_read + kernel.bytes_written
        row["ms"] += times.get(kernel.name, 0.0)
    return sorted(groups.values(), key=lambda row: -row["ms"])


def summed(every: list[Row], name: str) -> Row:
    return {"ops": name} | {k: sum(row[k] for row in every) for k in ("kernels", "bytes", "ms")}


def lines(every: list[Row], total: float, top: int) -> Iterator[tuple]:
    """The first `top`, all others in one, and the sum."""
    shown, others = every[:top], every[top:]
    if others:
        shown = [*shown, summed(others, f"{len(others)} others")]
    for row in (*shown, summed(every, "all kernels")):
        yield (
            *(f"{row['kernels']:,}", row["ops"], f"{row['bytes'] / 1e6:.2f}"),
            *(f"{row['ms']:.2f}", f"{row['ms'] / total:.1%}"),
            f"{row['bytes'] / row['ms'] / 1e6:.1f}" if row["ms"] > 0 else "-",
        )


def findings(results: dict[str, Any]) -> list[str]:
    total, every = results["ms"], results["kernels"]
    longest = "; ".join(f"{row['ops']} {row['ms'] / total:.0%}" for row in every[:3])
    sums = summed(every, "all")
    return [
        f"A call takes {total:.2f} ms under the profiler; {sums['kernels']:,} kernels move "
        f"{sums['bytes'] / 1e6:,.0f} MB.",
        f"What takes longest, as shares of the call: {longest}.",
    ]


def plot(path: Path, every: list[Row], total: float, top: int, title: str) -> None:
    shown = every[:top]
    figure = Figure(figsize=(9, 0.3 * len(shown) + 1.2), layout="constrained")
    axes = figure.subplots()
    axes.barh(range(len(shown)), [row["ms"] for row in shown])
    names = [f"{row['ops'][:70]} ({row['kernels']})" for row in shown]
    axes.set_yticks(range(len(shown)), names, fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel(f"ms of {total:.1f} ms for a call")
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, dpi=130)


def main(argv: list[str] | None = None) -> None:
    parser = common.parser("profile", __doc__, "profile")
    parser.add_argument("--case", choices=CASES, default=next(iter(CASES)), metavar="CASE")
    parser.add_argument("--candidate", choices=CANDIDATES, default="jaxaccel")
    parser.add_argument("--calls", type=common.positive, default=10)
    parser.add_argument("--top", type=common.positive, default=20, help="kernels in the table")
    args = parser.parse_args(argv)
    common.use_device(args.device, parser)
    folder = common.make_folder(args.out, parser)
    given = problem(CASES[args.case], args.seed)
    fn, values = CANDIDATES[args.candidate](given)
    lowered = benchmark_jax.jitted(given, fn).lower(*values)
    program = lowered.compile()
    found = read(lowered.as_text(dialect="hlo"), program.as_text(), jax.default_backend())
    run = benchmark_jax.engine(given, program, values).run
    run(2)
    times, total = traced(run, args.calls)
    every = rows(found, times)
    elsewhere = sum(times.values()) - sum(row["ms"] for row in every)
    stem = folder / f"profile-{args.case}-{args.candidate}"
    title = f"{args.case}, {args.candidate}; {common.machine_line()}"
    note = (
        f"{total:.2f} ms for a call, the mean of {args.calls} under the profiler; "
        f"{elsewhere:.2f} ms in operations that are not kernels. {common.malloc()}"
    )
    shown = list(lines(every, total, args.top))
    results = {"ms": total, "elsewhere_ms": elsewhere, "kernels": every}
    common.publish(stem, COLUMNS, shown, results, findings, title, note)
    plot(stem.with_suffix(".png"), every, total, args.top, title)


if __name__ == "__main__":
    common.with_huge_pages()
    main()
