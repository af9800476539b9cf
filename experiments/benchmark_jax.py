"""The candidates of `experiments.benchmark` that run in JAX: plain Flax, and jaxaccel."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxaccel as jx
from experiments.benchmark_networks import Problem
from experiments.benchmark_timing import Engine, clocked, repeated
from jaxaccel._tuned import untuned

Mode = Literal["measure", "rules"]
Transform = Callable[[Callable], Callable]
Call = tuple[Callable, tuple]  # a function and its arguments
LEARNING_RATE = 1e-3


def tuned(fn: Callable, mode: Mode = "measure") -> Callable:
    """The function in the forms that are fastest here."""
    return jx.autotune(fn, mode=mode, progress=False)


def plain(problem: Problem) -> Engine:
    """Flax, optax and `jax.jit`; XLA's own operations; inference with batch norm and all."""
    return _engine(problem, lambda: plain_call(problem))


def ours(problem: Problem, mode: Mode = "measure", bfloat16: bool = False) -> Engine:
    """`jx.autotune` of the step, or of the network with batch norm folded."""
    return _engine(problem, lambda: our_call(problem, mode, bfloat16))


def plain_call(problem: Problem) -> Call:
    """The function that `plain` runs, and its arguments."""
    return _call(problem._replace(fn=problem.plain), untuned, fold=False)


def our_call(problem: Problem, mode: Mode, bfloat16: bool = False) -> Call:
    """The function that `ours` runs, and its arguments."""
    return _call(problem, partial(tuned, mode=mode), fold=True, bfloat16=bfloat16)


def work(problem: Problem) -> dict[str, int | None]:
    """What one call is: FLOPs as written, bytes of arguments and results, of the plain form."""
    fn, args = plain_call(problem)
    results = jax.eval_shape(fn, *args)
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves((args, results)))
    return {"flops": jx.measure.cost(fn, *args).flops, "bytes": size}


def _call(problem: Problem, transform: Transform, fold: bool, bfloat16: bool = False) -> Call:
    images, labels = jax.device_put((problem.images, problem.labels))
    if problem.case.train:
        step, state = training_step(problem, bfloat16)
        return transform(step), (state, images, labels)
    fn, params = problem.fn, problem.params
    if fold and "batch_stats" in params:
        fn, params = jx.fold.batchnorm(fn, params, problem.images)
    return transform(fn), (halved((params, images)) if bfloat16 else (params, images))


def _engine(problem: Problem, make: Callable[[], Call]) -> Engine:
    """`make` is asked twice: the second time, what was chosen by measuring is known."""
    fn, args = make()
    found = engine(problem, jitted(problem, fn), args)
    again, _ = make()
    _, compile_s = clocked(lambda: jitted(problem, again).lower(*args).compile())
    return found._replace(compile_s=compile_s)


def jitted(problem: Problem, fn: Callable) -> Any:
    """A training step gives the buffers of its state back."""
    return jax.jit(fn, donate_argnums=0 if problem.case.train else ())


def engine(problem: Problem, compiled: Callable, args: tuple) -> Engine:
    """Such a function, called."""
    return (_trained if problem.case.train else _served)(compiled, *args)


def _served(compiled: Callable, params: Any, images: Any) -> Engine:
    call = lambda: compiled(params, images)
    logits, first = clocked(lambda: jax.block_until_ready(call()))
    run = repeated(call, jax.block_until_ready, each=jax.default_backend() == "cpu")
    return Engine(run, lambda: None, np.asarray(logits, np.float32), first)


def _trained(compiled: Callable, initial: Any, images: Any, labels: Any) -> Engine:
    state = jax.tree.map(jnp.copy, initial)

    def call() -> Any:
        nonlocal state
        state, loss = compiled(state, images, labels)
        return state, loss

    def restart() -> None:
        nonlocal state
        state = jax.block_until_ready(jax.tree.map(jnp.copy, initial))

    (_, loss), first = clocked(lambda: jax.block_until_ready(call()))
    losses = [float(loss), *(float(call()[1]) for _ in range(2))]
    run = repeated(call, jax.block_until_ready, each=False)
    return Engine(run, restart, np.array(losses), first)


def training_step(problem: Problem, bfloat16: bool = False) -> tuple[Callable, Any]:
    """``step(state, images, labels) -> (state, loss)`` with Adam, and the initial state."""
    fn, tx, key = problem.fn, optax.adam(LEARNING_RATE), jax.random.key(0)
    cast = halved if bfloat16 else lambda tree: tree

    def step(state: tuple, images: Any, labels: Any) -> tuple[tuple, Any]:
        params, moments = state

        def objective(trained: Any) -> tuple[Any, Any]:
            given = {**params, "params": cast(trained)}
            logits, updates = fn.train(given, key, cast(images))
            losses = optax.softmax_cross_entropy_with_integer_labels(
                logits.astype(jnp.float32), labels
            )
            return losses.mean(), updates

        (loss, updates), grads = jax.value_and_grad(objective, has_aux=True)(params["params"])
        changes, moments = tx.update(grads, moments, params["params"])
        trained = optax.apply_updates(params["params"], changes)
        return ({**params, **updates, "params": trained}, moments), loss

    return step, (problem.params, tx.init(problem.params["params"]))


def halved(tree: Any) -> Any:
    """Every float as bfloat16."""
    return jax.tree.map(
        lambda leaf: (
            leaf.astype(jnp.bfloat16) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf
        ),
        tree,
    )
