"""The parts of `experiments.dispatch` that need processes of their own."""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from experiments import common
from experiments.dispatch_steps import Rows, compiled, mobilenet, stepping, times

STEPS = 7
_KEPT = "glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=100000000000"
MALLOC = {
    "as it is": "",
    "huge pages": common.HUGE_PAGES,
    "blocks kept": _KEPT,
    "huge pages, blocks kept": f"{common.HUGE_PAGES}:{_KEPT}",
}


def cache(seed: int, rounds: int) -> Rows:
    """Each process of a pair starts anew; the second finds what the first one left."""
    pairs: list[list[dict[str, float]]] = []
    for _ in range(max(2, rounds // 5)):
        with tempfile.TemporaryDirectory() as folder:
            pairs.append([elsewhere(f"first_step({seed})", folder) for _ in range(2)])
    runs = {name: [pair[i] for pair in pairs] for i, name in enumerate(("nothing kept", "kept"))}
    return _rows("cache", "MobileNet 96x96, batch 8, first step", runs)


def memory(seed: int, rounds: int) -> Rows:
    """In turn, in processes that find the compiled program of the first."""
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in MALLOC}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(max(2, rounds // 5)):
            for name, tunables in MALLOC.items():
                made = elsewhere(f"later_step({seed})", folder, {"GLIBC_TUNABLES": tunables})
                runs[name].append(made)
    return _rows("memory", "MobileNet 96x96, batch 32", runs)


def _rows(part: str, subject: str, runs: Mapping[str, list[dict[str, float]]]) -> Rows:
    first = next(iter(runs.values()))
    found = []
    for setting, made in runs.items():
        row = {"part": part, "subject": subject, "setting": setting}
        row |= {"found": {"checksum": made[0]["checksum"]}}
        row |= {"compile_s": statistics.median(run["compile_s"] for run in made)}
        seconds, base = ([run["seconds"] for run in some] for some in (made, first))
        found.append(row | times(seconds, base))
    return found


def elsewhere(call: str, folder: str, environment: Mapping[str, str] | None = None) -> dict:
    """What a function of this file prints in a process of its own."""
    settings = {
        "JAX_PLATFORMS": "cpu" if jax.default_backend() == "cpu" else "cuda,cpu",
        "JAX_ENABLE_COMPILATION_CACHE": "true",
        "JAX_COMPILATION_CACHE_DIR": folder,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        **(environment or {}),
    }
    command = [sys.executable, "-c", f"from experiments import dispatch_processes as p; p.{call}"]
    out = subprocess.run(command, env=os.environ | settings, stdout=subprocess.PIPE, check=True)
    return json.loads(out.stdout.splitlines()[-1])


def first_step(seed: int) -> None:
    """Prints what it took, of which how much to compile, and whether all of it is the same."""
    step, state, batch = mobilenet(8, seed)
    start = time.perf_counter()
    program, compile_s = compiled(step, (state, batch))
    params = jax.block_until_ready(program(state, batch))[0]
    _print(time.perf_counter() - start, compile_s, params)


def later_step(seed: int) -> None:
    """The same for the median of some steps behind the first two."""
    step, state, batch = mobilenet(32, seed)
    program, compile_s = compiled(step, (state, batch), donate_argnums=0)
    call, seconds = stepping(program, state, batch), []
    for _ in range(2 + STEPS):
        start = time.perf_counter()
        state = jax.block_until_ready(call())
        seconds.append(time.perf_counter() - start)
    _print(statistics.median(seconds[2:]), compile_s, state[0])


def _print(seconds: float, compile_s: float, params: dict) -> None:
    checksum = sum(float(jnp.abs(leaf).sum()) for leaf in jax.tree.leaves(params))
    print(json.dumps({"seconds": seconds, "compile_s": compile_s, "checksum": checksum}))
