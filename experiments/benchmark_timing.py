"""How `experiments.benchmark` takes times, and what the machine itself can do."""

import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

# Engines have thread pools of their own, which spin for some milliseconds after a call; turned
# off, spinning would slow its owner down. So every change of the engine begins with a pause.
PAUSE = 0.2
LEAST = 0.1  # seconds that the calls of one sample fill


class Engine(NamedTuple):
    """A candidate that is ready.

    Attributes:
        run: makes this many calls and waits until all are done.
        restart: sets what it trains back to the initial values, outside of the clock.
        outputs: the logits, or the losses of the first three steps: what is checked.
        first_s: seconds from nothing to the first result.
        compile_s: the compiler's share, where it can be had apart.
        mode: the fastest of those that were tried.
    """

    run: Callable[[int], None]
    restart: Callable[[], object]
    outputs: np.ndarray
    first_s: float
    compile_s: float | None = None
    mode: str = ""


def repeated(call: Callable[[], Any], wait: Callable[[Any], Any], each: bool) -> Callable:
    """`Engine.run`; `each` call is waited for, else the last one."""

    def run(count: int) -> None:
        result = None
        for _ in range(count):
            result = call()
            if each:
                wait(result)
        wait(result)

    return run


def clocked(call: Callable[[], Any]) -> tuple[Any, float]:
    """The result, and the seconds it took."""
    start = time.perf_counter()
    result = call()
    return result, time.perf_counter() - start


def interleaved(
    engines: Mapping[str, Engine],
    rounds: int,
    tick: Callable[[], object] = lambda: None,
    pause: float = PAUSE,
) -> dict[str, list[float]]:
    """Seconds per call of each engine, one for each round, in an order shuffled anew."""
    shuffle, seconds = random.Random(0), {name: [] for name in engines}
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        counts = {name: _count(engine) for name, engine in engines.items()}
        for _ in range(rounds):
            for name in shuffle.sample(list(engines), len(engines)):
                time.sleep(pause)
                seconds[name].append(_sample(engines[name], counts[name]))
            tick()
    finally:
        if enabled:
            gc.enable()
    return seconds


def _count(engine: Engine) -> int:
    """How many calls fill a sample."""
    return max(1, math.ceil(LEAST / min(_sample(engine, 1) for _ in range(2))))


def _sample(engine: Engine, count: int) -> float:
    """Every sample times the same calls, after one that fetches what another engine displaced."""
    engine.restart()
    engine.run(1)
    _, seconds = clocked(lambda: engine.run(count))
    return seconds / count


def fastest(makers: Mapping[str, Callable[[], Engine]]) -> Engine:
    """The mode with the lowest median of three; one that cannot be made is counted in the name."""
    engines, failed = {}, []
    for mode, make in makers.items():
        try:
            engines[mode] = make()
        except Exception as error:
            failed.append(error)
    if not engines:
        raise failed[0]
    best = next(iter(engines))
    if len(engines) > 1:
        seconds = interleaved(engines, 3, pause=0)
        best = min(engines, key=lambda mode: statistics.median(seconds[mode]))
    lost = f" ({len(failed)} of {len(makers)} modes failed)" if failed else ""
    return engines[best]._replace(mode=f"{best}{lost}")


def limits(torch: Any | None, gpu: bool) -> dict[str, Any]:
    """What the machine reaches: GFLOP/s of matrix products, GB/s of copies, and with what."""
    dtypes = ("float32", "bfloat16") if gpu else ("float32",)
    torch = None if gpu else torch
    return {
        "gflops": {dtype: max(_products(torch, dtype, gpu)) for dtype in dtypes},
        "gigabytes": max(_copies(torch, gpu)),
    }


def _products(torch: Any | None, dtype: str, gpu: bool) -> list[tuple[float, str]]:
    product, found = jax.jit(lambda a: a @ a), []
    for n in (4096, 8192, 16384) if gpu else (1024, 2048, 4096):
        square = jnp.ones((n, n), dtype)
        runs: dict[str, Callable] = {"jax": lambda a=square: jax.block_until_ready(product(a))}
        if torch is not None:
            runs["torch"] = partial(torch.mm, torch.ones(n, n), torch.ones(n, n))
        found += [(2e-9 * n**3 / _best(run), f"{name}, {n}x{n}") for name, run in runs.items()]
    return found


def _copies(torch: Any | None, gpu: bool) -> list[tuple[float, str]]:
    size = 2**30 if gpu else 2**28  # bytes, far beyond any cache
    array = jnp.ones(size // 4, jnp.float32)
    runs = {"jax": lambda: jax.block_until_ready(jnp.copy(array))}
    if not gpu:
        source, target = np.ones(size, np.uint8), np.ones(size, np.uint8)
        runs["numpy"] = lambda: np.copyto(target, source)
    if torch is not None:
        a, b = torch.ones(size // 4), torch.ones(size // 4)
        runs["torch"] = lambda: b.copy_(a)
    return [(2e-9 * size / _best(run), name) for name, run in runs.items()]


def _best(run: Callable[[], Any]) -> float:
    run()
    return min(clocked(run)[1] for _ in range(5))
