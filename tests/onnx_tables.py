"""How near engines come to XLA on the networks of the tests, in float32 and int8.

    python -m tests.onnx_tables  # about 20 minutes

Of float32: the largest difference of a result, in units of its largest element, over two batch
sizes. Of int8 (`jx.quantize.int8`, static): the same, and how many of all integers that the steps
of the network give differ, and by how many steps of their grid; then how many of the first batch
do where each step reads what XLA has before it, so that nothing adds up. "jax" runs the graph that
is written in JAX: what differs there already is how ONNX says it (halves round to even, biases are
whole numbers), not the engine. Writes experiments/results/onnx-zoo.md.
"""

from collections import Counter
from functools import partial
from typing import Any

import jax

import jaxaccel as jx
from experiments import common
from jaxaccel.export._onnx import model
from tests.export_tables import RESULTS
from tests.models import ZOO
from tests.networks import frameworks, sequence, vision
from tests.onnx_engines import feeds, run_by
from tests.onnx_int8 import ENGINES, alone, apart, expected, steps_apart, written
from tests.test_onnx import two

CASES = (*ZOO, *vision.CASES, *sequence.CASES, *frameworks.CASES)
COLUMNS = (
    *("network", "arithmetic", "engine", "largest difference", "integers", "one step off", "more"),
    *("most steps", "alone: one step off", "most steps"),
)
SCALES: dict[str, Any] = {"int8": "float", "int8, power of two": "power_of_two"}


def float_rows(name, fn, params, batches):
    made = model(fn, params, batches[0])
    wanted = [{"results": jax.jit(fn)(params, *args)} for args in batches]
    for engine in ENGINES[1:]:
        given = [feeds(made, *args) for args in batches]
        found = [{"results": results} for results in run_by(engine, made, given)]
        worst = max(apart(a, b) for a, b in zip(found, wanted, strict=True))
        yield name, "float32", engine, f"{worst:.1e}", *[None] * 6


def int8_rows(name, kind, fn, params, batches):
    quantized = jx.quantize.int8(fn, params, [batches[0]], scales=SCALES[kind], progress=False)
    engines = written(*quantized, *batches[0])
    wanted = [expected(*quantized, *args) for args in batches]
    apart_each = alone(*quantized, batches[0], *wanted[0])
    for engine, run in engines.items():
        found = [run(*args) for args in batches]
        pairs = list(zip(found, wanted, strict=True))
        worst, single = max(apart(a, b) for a, (b, _) in pairs), apart_each[engine]
        counts = sum((steps_apart(a, b, grids) for a, (b, grids) in pairs), Counter())
        more = sum(n for off, n in counts.items() if off > 1)
        yield (name, kind, engine, f"{worst:.1e}", f"{counts.total():,}", f"{counts[1]:,}",
               f"{more:,}", str(max(counts, default=0)), f"{single[1]:,}",
               str(max(single, default=0)))  # fmt: skip


def rows():
    for case in CASES:
        fn, params = case.build()
        batches = two(case.shape)
        yield from float_rows(case.name, fn, params, batches)
        for kind in SCALES:
            try:
                yield from int8_rows(case.name, kind, fn, params, batches)
            except (NotImplementedError, ValueError) as error:
                yield case.name, kind, f"refused: {str(error).splitlines()[0]}", *[None] * 7
        jax.clear_caches()


def findings(results):
    real = [row for row in results["rows"] if row[1] == "float32"]
    alone = [int(row[9]) for row in results["rows"] if row[9]]
    return [
        f"float32: at most {max(float(row[3]) for row in real):.1e} of the largest element from "
        f"XLA's, in {len(real)} pairs of network and engine.",
        *(total(results["rows"], kind, engine) for kind in SCALES for engine in ENGINES[1:]),
        f"Where each step reads what XLA has before it, integers are at most {max(alone)} apart.",
    ]


def total(found, kind, engine):
    """Of all networks."""
    whole = [row for row in found if row[1] == kind and row[2] == engine and row[4]]
    number = lambda place: sum(int(row[place].replace(",", "")) for row in whole)
    integers, one, more = map(number, (4, 5, 6))
    return (
        f"{kind}, {engine}: of {integers:,} integers in {len(whole)} networks {one:,} "
        f"({one / integers:.2%}) are one step off, {more:,} ({more / integers:.3%}) more."
    )


if __name__ == "__main__":
    found = []
    for one in rows():
        print(*one, flush=True)
        found.append(one)
    note = "\n".join(total(found, kind, engine) for kind in SCALES for engine in ENGINES)
    publish = partial(common.publish, RESULTS / "onnx-zoo", COLUMNS, found)
    publish({"columns": COLUMNS, "rows": found}, findings, note=note)
