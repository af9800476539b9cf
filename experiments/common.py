"""What all experiments share: command line, the machine they ran on, how results are kept.

An experiment has ``findings(results) -> list[str]``: short sentences with figures, computed from
its results alone. `publish`, `write` and `write_json` take both: all results have one format.
"""

import argparse
import datetime
import errno
import hashlib
import json
import os
import platform
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

import jax
import jax.numpy as jnp

import jaxaccel
from jaxaccel._choices import default_folder, environment
from jaxaccel._graph import Graph
from jaxaccel.measure import table

NOT_MEASURED = "not measured"
FORMAT = 1  # of the JSON of results, which `experiments.index` reads
Findings = Callable[[dict[str, Any]], list[str]]
# Of glibc: memory comes in pages of 2 MiB, not 4 KiB, of which each must be zeroed at first touch.
HUGE_PAGES = "glibc.malloc.hugetlb=1"


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Exit with status 2."""
        self.exit(2, f"{self.prog}: error: {message} (--help lists the options)\n")


def parser(module: str, description: str | None, out: str) -> Parser:
    """The options that every experiment has."""
    found = Parser(prog=f"python -m experiments.{module}", description=description)
    found.add_argument("--device", choices=("auto", "cpu", "gpu"), default="auto")
    found.add_argument("--seed", type=natural, default=0, help="of initialisation and training")
    found.add_argument("--out", type=Path, default=Path("out") / out, help="folder for results")
    return found


def at_least(least: int, text: str) -> int:
    """An integer from `least` on, for argparse."""
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
    if value < least:
        raise argparse.ArgumentTypeError(f"{text} is below {least}")
    return value


natural, positive = partial(at_least, 0), partial(at_least, 1)


def use_device(device: str, parser: Parser, *, keep_compiled: bool = True) -> None:
    """Put everything that follows on this kind of device; call it before any other use of JAX.

    What is compiled is kept on disk for the next run; not where compile times are measured.
    """
    if device != "auto":
        jax.config.update("jax_platforms", "cpu" if device == "cpu" else "cuda")
        try:
            jax.devices()
        except (RuntimeError, AssertionError):  # the second where no CUDA plugin is installed
            parser.exit(3, f"{parser.prog}: {NOT_MEASURED}: no {device} was found by JAX\n")
    if keep_compiled:
        _keep_compiled()
    else:
        jax.config.update("jax_enable_compilation_cache", False)


def with_huge_pages() -> None:
    """Starts the program again with `HUGE_PAGES`, which glibc reads at its start only.

    What the user set for glibc stands. Elsewhere than on Linux nothing happens.
    """
    if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
        os.environ["GLIBC_TUNABLES"] = HUGE_PAGES
        os.execv(sys.executable, sys.orig_argv)


def malloc() -> str:
    """What glibc was told, by `with_huge_pages` or by the user."""
    return f"GLIBC_TUNABLES={os.environ.get('GLIBC_TUNABLES', '')}"


def _keep_compiled() -> None:
    """JAX's persistent compilation cache, in our folder; what the user set for it stands."""
    if {"JAX_COMPILATION_CACHE_DIR", "JAX_ENABLE_COMPILATION_CACHE"} & set(os.environ):
        return
    folder = default_folder() / f"xla-{_compiled_for()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(errno.EACCES, "not writable")
    except OSError as error:
        print(f"{folder}: {error.strerror}; compiled code is not kept", file=sys.stderr)
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def _compiled_for() -> str:
    """A digest of what compiled code runs on: another CPU model may crash on it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if os.access(info, os.R_OK) else []
    flags = [line for line in lines if line.startswith(("flags", "Features"))][:1]
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count()
    found = [version("jax"), version("jaxlib"), jax.default_backend(), *flags, cores]
    return hashlib.sha256(repr(found).encode()).hexdigest()[:12]


def packages(parser: Parser, *names: str) -> list[Any]:
    """The modules of peers, or an exit with one line where one is not installed."""
    try:
        return [import_module(name) for name in names]
    except ImportError as error:
        parser.exit(
            3,
            f"{parser.prog}: {NOT_MEASURED}: {error.name} is not installed; in the folder of the "
            "repository, pip install -e '.[bench]'\n",
        )


def equations(graph: Graph) -> int:
    """Those of a traced function, with those inside of calls."""
    return sum(1 + sum(map(equations, node.bodies)) for node in graph.nodes)


def make_folder(path: Path, parser: Parser) -> Path:
    """Create the folder for results, or exit with one line."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out {path}: {error.strerror}")
    if not os.access(path, os.W_OK):
        parser.error(f"--out {path}: not writable")
    return path


def scaled(images: Any) -> jax.Array:
    """Images as the Accelerator gives them to a network: integers from [0, 255] to [0, 1]."""
    integer = jnp.issubdtype(images.dtype, jnp.integer)
    return jnp.asarray(images, jnp.float32) / (255 if integer else 1)


def machine() -> dict[str, Any]:
    """Date, device and versions: what a figure means nothing without."""
    device = jax.devices()[0]
    return {
        "date": datetime.date.today().isoformat(),
        "device": f"{device.platform}: {device.device_kind}",
        "cores": os.cpu_count(),
        "processor": environment()["processor"],
        "python": platform.python_version(),
        **{name: version(name) for name in ("jax", "flax", "optax")},
        "jaxaccel": jaxaccel.__version__,
    }


def machine_line(found: dict[str, Any] | None = None) -> str:
    """The same in one line, for tables and plots."""
    m = found or machine()
    on = f"{m['device']}, {m['cores']} cores ({m['processor']})"
    return f"{on}, jax {m['jax']}, flax {m['flax']}, {m['date']}"


def machines(records: Iterable[dict[str, Any]]) -> list[str]:
    """The lines under "machine" of records that were kept, each once; without one, of this run."""
    return list(dict.fromkeys(record.get("machine") or machine_line() for record in records))


def write_json(
    path: Path, results: dict[str, Any], findings: Findings, measured: Sequence[str] = ()
) -> None:
    """Results and what they say, in the one format of all experiments.

    Args:
        path: of the file.
        results: whatever JSON holds.
        findings: a function of the experiment's own module, which it names.
        measured: the lines of the machines that measured, where earlier runs did (`machines`).
    """
    module = sys.modules[findings.__module__]
    results = json.loads(json.dumps(results))  # as readers of the file have them
    content = {
        "format": FORMAT,
        "experiment": module.__spec__.name if module.__spec__ else module.__name__,
        "title": title(module.__doc__),
        "command": f"python {shlex.join(sys.orig_argv[1:])}",
        "measured": list(measured) or [machine_line()],
        "machine": machine(),
        "findings": [],
        "results": results,
    }
    replace(path, content)  # a mistake in the words does not lose what was measured
    replace(path, content | {"findings": findings(results)})


def title(docstring: str | None) -> str:
    """A module's first line."""
    return (docstring or "").strip().partition("\n")[0]


def store(path: Path, content: dict[str, Any]) -> None:
    """What runs found so far, for those that go on from it: ``NAME-runs.json``, of no format."""
    replace(path, {"machine": machine(), **content})


def replace(path: Path, content: dict[str, Any]) -> None:
    """Writes JSON whole or not at all."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=2) + "\n")
    partial.replace(path)


def publish(
    stem: Path,
    columns: Sequence[str],
    lines: Sequence[Sequence[object]],
    results: dict[str, Any],
    findings: Findings,
    head: str | None = None,
    note: str = "",
) -> None:
    """Prints a table; writes it to ``stem.md`` and the results to ``stem.json``."""
    page = lambda style: paragraphs(head, table(columns, lines, style), note)
    write(stem, page, results, findings)


def paragraphs(head: str | None, *parts: str) -> str:
    """A page; what is empty is left out, the head is otherwise the machine."""
    return "\n\n".join(filter(None, (head or machine_line(), *parts)))


def write(
    stem: Path,
    page: Callable[[Any], str],
    results: dict[str, Any],
    findings: Findings,
    measured: Sequence[str] = (),
) -> None:
    """Prints a page as text; writes it as Markdown, and the results beside it (`write_json`)."""
    print(f"\n{page('text')}")
    stem.with_suffix(".md").write_text(page("markdown") + "\n")
    write_json(stem.with_suffix(".json"), results, findings, measured)
