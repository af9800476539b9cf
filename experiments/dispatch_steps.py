"""What `experiments.dispatch` measures: training steps, and times set beside each other."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import jaxaccel as jx
from jaxaccel._tuned import untuned
from jaxaccel.measure._compare import _interleave

Rows = list[dict[str, Any]]
# What is called (None: it does not compile), the seconds of compiling, and what that told.
Candidate = tuple[Callable[[], Any] | None, float | None, dict[str, Any]]


def rows(part: str, subject: str, ways: dict[str, Candidate], rounds: int, per: int = 1) -> Rows:
    """One line for each way; times are divided by the steps in a call."""
    calls = {name: call for name, (call, _, _) in ways.items() if call}
    seconds = _interleave(calls, rounds, min_time=0.02)
    base = seconds[next(iter(ways))]
    found = []
    for name, (_, compile_s, told) in ways.items():
        row = {"part": part, "subject": subject, "setting": name, "compile_s": compile_s}
        found.append(row | {"found": told} | times(seconds.get(name), base, per))
    return found


def times(seconds: list[float] | None, base: list[float], per: int = 1) -> dict[str, Any]:
    if seconds is None:
        return {"ms": None, "ratio": None, "quartiles": None}
    ratios = [own / first for own, first in zip(seconds, base, strict=True)]
    low, ratio, high = statistics.quantiles(ratios, n=4, method="inclusive")
    ms = 1e3 * statistics.median(seconds) / per
    return {"ms": ms, "ratio": ratio, "quartiles": [low, high]}


def compiled(fn: Callable, args: tuple, options: Any = None, **jit: Any) -> tuple[Any, float]:
    """The program, and the seconds of tracing, lowering and compiling it."""
    start = time.perf_counter()
    program = jax.jit(fn, **jit).lower(*args).compile(compiler_options=options)
    return program, time.perf_counter() - start


def stepping(program: Callable, state: Any, batch: Any) -> Callable[[], Any]:
    """A call makes a step from where the last one stopped; the state may be donated."""
    state = jax.tree.map(jnp.copy, state)

    def call() -> Any:
        nonlocal state
        state = program(state, batch)
        return state

    return call


def training(module: nnx.Module, shape: tuple, seed: int) -> tuple[Callable, Any, dict]:
    """A step ``(state, batch) -> state`` with Adam, its state and a batch."""
    fn, params = jx.functional(module)
    tx = optax.adam(1e-3)

    def step(state: tuple, batch: dict) -> tuple:
        params, moments, key = state
        key, dropout = jax.random.split(key)

        def objective(trained: Any) -> tuple[jax.Array, Any]:
            logits, updates = fn.train(params | {"params": trained}, dropout, batch["image"])
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
            return losses.mean(), updates

        grads, updates = jax.grad(objective, has_aux=True)(params["params"])
        changes, moments = tx.update(grads, moments, params["params"])
        trained = optax.apply_updates(params["params"], changes)
        return params | updates | {"params": trained}, moments, key

    rng = np.random.default_rng(seed)
    image = jnp.asarray(rng.random(shape), jnp.float32)
    batch = {"image": image, "label": jnp.asarray(rng.integers(0, 10, shape[0]))}
    return step, (params, tx.init(params["params"]), jax.random.key(seed)), batch


def convnet(batch: int, seed: int) -> tuple[Callable, Any, dict]:
    """In XLA's own ops."""
    made = training(jx.nn.ConvNet(rngs=nnx.Rngs(seed)), (batch, 28, 28, 1), seed)
    return untuned(made[0]), *made[1:]


def mobilenet(batch: int, seed: int) -> tuple[Callable, Any, dict]:
    return training(jx.nn.MobileNet(10, rngs=nnx.Rngs(seed)), (batch, 96, 96, 3), seed)
