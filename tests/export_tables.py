"""What the networks of the tests take on disk, as they are and after each transform.

    python -m tests.export_tables  # a few minutes

For each network, and what each transform makes of it: the bytes of its parameters, and of the
artefact, of which the function is a part. Writes experiments/results/export-bytes.md.
"""

import os
import statistics
import tempfile
import warnings
from pathlib import Path

import jax

import jaxaccel as jx
from experiments import common
from tests.models import ZOO
from tests.networks import frameworks, sequence, vision
from tests.test_export_alone import TRANSFORMS

RESULTS = Path(__file__).parents[1] / "experiments" / "results"
LARGE = 100_000  # bytes of parameters, beside which the function is small
COLUMNS = ("network", "transform", "parameters", "function", "folder", "zip", "folder/parameters")


def row(name, transform, made, x, folder):
    jx.export.save(folder / "net", *made, x)
    jx.export.save(folder / "net.zip", *made, x)
    manifest = jx.export.manifest(folder / "net")
    whole = sum(file.stat().st_size for file in (folder / "net").iterdir())
    parts = (manifest.parameter_bytes, manifest.files["function"].bytes, whole,
             os.path.getsize(folder / "net.zip"))  # fmt: skip
    return (name, transform, *(f"{part:,}" for part in parts), f"{whole / parts[0]:.3f}")


def rows():
    for case in (*ZOO, *vision.CASES, *sequence.CASES, *frameworks.CASES):
        transforms = TRANSFORMS if case in ZOO else {}
        fn, params = case.build()
        x = case.images()
        with tempfile.TemporaryDirectory() as folder:
            yield row(case.name, "none", (fn, params), x, Path(folder))
        for name, transform in transforms.items():
            with tempfile.TemporaryDirectory() as folder:
                yield row(case.name, name, transform(fn, params, x), x, Path(folder))
        jax.clear_caches()


def findings(results):
    number = lambda text: float(text.replace(",", ""))
    functions = [number(row[3]) for row in results["rows"]]
    times = [(number(row[2]), number(row[6])) for row in results["rows"]]
    large = [ratio for size, ratio in times if size >= LARGE]
    return [
        f"The function adds {min(functions):,.0f} to {max(functions):,.0f} bytes, in the median "
        f"{statistics.median(functions):,.0f}, over {len(functions)} networks and transforms.",
        f"The folder is {min(large):.2f} to {max(large):.2f} times as large as parameters of at "
        f"least {LARGE:,} bytes, {len(large)} of {len(times)}, and up to "
        f"{max(ratio for _, ratio in times):.2f} times as large as smaller ones.",
    ]


if __name__ == "__main__":
    warnings.filterwarnings("ignore", "jx.fold.batchnorm: nothing to fold")
    found = []
    for one in rows():
        print(*one, flush=True)
        found.append(one)
    content = {"columns": COLUMNS, "rows": found}
    common.publish(RESULTS / "export-bytes", COLUMNS, found, content, findings)
