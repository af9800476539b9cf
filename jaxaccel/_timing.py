"""Compiled candidates timed against each other, outside of any trace that is under way."""

import os
import random
import statistics
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

_ROUNDS = 7
_SAMPLE_SECONDS = 2e-3
_HOPELESS = 2.0  # times the fastest of the first two calls: not timed again
_SHORT = 0.01  # seconds
# Largest difference from the original as a share of its largest number; else 4 eps.
_TOLERANCES = {"float32": 1e-5, "float64": 1e-11}
_MANY_TERMS = 10_000
T = TypeVar("T")


class Timed(NamedTuple):
    """Median seconds of each candidate that is right; why each other one is not there."""

    seconds: dict[str, float]
    dropped: dict[str, str]


def timed(
    candidates: Mapping[str, Callable],
    operands: Sequence[Any],
    rounds: int = _ROUNDS,
    terms: int | None = 1,
) -> Timed:
    """The first candidate is the original: the others must equal it, sums of so many terms.

    Nothing is compared if `terms` is None.
    """
    return _outside(lambda: _timed(candidates, operands, rounds, terms))


def _outside(work: Callable[[], T]) -> T:
    """In a thread of its own, where nothing is being traced, under this thread's settings."""
    config: Any = jax.config
    x64, precision = config.jax_enable_x64, config.jax_default_matmul_precision
    device = config.jax_default_device
    found: list[Any] = []

    def run() -> None:
        try:
            with (
                jax.enable_x64(x64),
                jax.default_matmul_precision(precision),
                jax.default_device(device),
            ):
                found.append((work(), None))
        except BaseException as error:
            found.append((None, error))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    result, error = found[0]
    if error is not None:
        raise error
    return result


def _timed(
    candidates: Mapping[str, Callable], operands: Sequence[Any], rounds: int, terms: int | None
) -> Timed:
    ready, dropped = _compiled(candidates, operands)
    original = next(iter(candidates))
    if original not in ready:
        return Timed({}, dropped)
    expected, calls = None, {}
    try:
        operands = jax.device_put(tuple(operands))
    except jax.errors.JaxRuntimeError as error:
        return Timed({}, dict.fromkeys(candidates, _first_line(error)))
    for name, call in ready.items():
        try:
            found = jax.block_until_ready(call(*operands))
        except jax.errors.JaxRuntimeError as error:
            dropped[name] = _first_line(error)
            continue
        if expected is None:
            expected = found
        difference = None if terms is None else _difference(found, expected, terms)
        if difference is not None:
            dropped[name] = difference
        else:
            calls[name] = partial(call, *operands)
    if original not in calls:
        return Timed({}, dropped)
    return Timed(_interleaved(calls, rounds), dropped)


def _compiled(
    candidates: Mapping[str, Callable], operands: Sequence[Any]
) -> tuple[dict[str, Callable], dict[str, str]]:
    """Traced one by one, compiled beside each other."""
    avals = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in operands]
    lowered, ready, dropped = {}, {}, {}
    for name, fn in candidates.items():
        lowered[name] = jax.jit(fn).lower(*avals)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        futures = {name: pool.submit(one.compile) for name, one in lowered.items()}
    for name, future in futures.items():
        error = future.exception()
        if error is None:
            ready[name] = future.result()
        elif isinstance(error, jax.errors.JaxRuntimeError):
            dropped[name] = _first_line(error)
        else:
            raise error
    return ready, dropped


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0][:200]


def _difference(found: Any, expected: Any, terms: int) -> str | None:
    """None where the results are equal, of floats but for rounding, by the root of the terms."""
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        if not jnp.issubdtype(b.dtype, jnp.floating):
            count = int(np.sum(np.asarray(a) != np.asarray(b)))
            if count:
                return f"differs in {count} of {b.size} integers"
            continue
        a64, b64 = np.asarray(a, np.float64), np.asarray(b, np.float64)
        tolerance = _TOLERANCES.get(b.dtype.name, 4 * float(jnp.finfo(b.dtype).eps))
        largest = np.max(np.abs(b64), initial=0)
        apart = np.max(np.abs(a64 - b64), initial=0)
        if not apart <= tolerance * max(1, (terms / _MANY_TERMS) ** 0.5) * largest:
            return f"differs by {apart / largest if largest else apart:.1e} of the largest number"
    return None


def _interleaved(calls: Mapping[str, Callable], rounds: int) -> dict[str, float]:
    order, shuffle = list(calls), random.Random(0)
    first = {name: _sample(calls[name], 1) for name in order}
    once = max(_SHORT, 2 * _HOPELESS * min(first.values()))  # a first call may be slow
    first = {n: s if s > once else min(s, _sample(calls[n], 1)) for n, s in first.items()}
    limit = _HOPELESS * min(first.values())
    kept = [name for name in order if first[name] <= limit]
    if len(kept) == 1:  # nothing is left to decide
        return first
    counts = {name: max(1, min(50, int(_SAMPLE_SECONDS / first[name]))) for name in kept}
    seconds: dict[str, list[float]] = {name: [first[name]] for name in order}
    seconds |= {name: [] for name in kept}
    for _ in range(rounds):
        for name in shuffle.sample(kept, len(kept)):
            seconds[name].append(_sample(calls[name], counts[name]))
    return {name: statistics.median(values) for name, values in seconds.items()}


def _sample(call: Callable, count: int) -> float:
    start, out = time.perf_counter(), None
    for _ in range(count):
        out = call()
    jax.block_until_ready(out)
    return (time.perf_counter() - start) / count


def synthetic(avals: Sequence[Any]) -> list[Any]:
    """Operands of these shapes and dtypes: normal numbers, any int8, other zeros, random keys."""
    random_, made = np.random.default_rng(0), []
    for aval in avals:
        if jnp.issubdtype(aval.dtype, jax.dtypes.prng_key):
            made.append(_outside(lambda aval=aval: _keys(aval)))
        elif jnp.issubdtype(aval.dtype, jnp.floating):
            values = random_.standard_normal(aval.shape, np.float32)
            made.append(values.astype(aval.dtype))
        elif aval.dtype == np.int8:
            made.append(random_.integers(-128, 128, aval.shape, np.int8))
        else:
            made.append(np.zeros(aval.shape, aval.dtype))
    return made


def _keys(aval: Any) -> Any:
    made = (jax.random.key(0, impl=name) for name in ("threefry2x32", "rbg", "unsafe_rbg"))
    (key,) = (key for key in made if key.dtype == aval.dtype)
    return jnp.broadcast_to(key, aval.shape)
