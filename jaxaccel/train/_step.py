"""One training step and one evaluation step as pure functions of a state and a batch."""

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, PyTree

from jaxaccel._select import flatten

Batch = dict[str, Any]


class Totals(NamedTuple):
    """Sums over samples, kept on the device so that no step waits for the host."""

    loss: Array
    correct: Array
    samples: Array
    bad_step: Array  # the first step whose loss was not finite, else -1


class State(NamedTuple):
    """All that a training step changes; donated to it."""

    params: PyTree
    optimizer: PyTree
    key: Array
    step: Array
    totals: Totals


class Metrics(NamedTuple):
    """Mean loss, accuracy in [0, 1] and the number of samples they were taken over."""

    loss: float
    accuracy: float
    samples: int


class Program(NamedTuple):
    """What the compiled steps are made of; see `Accelerator` for the meaning of each."""

    forward: Callable[..., Any]  # (params, images) -> outputs
    forward_train: Callable[..., Any]  # (params, key, images) -> (outputs, updates)
    teacher: Callable[..., Any] | None
    loss: Callable[..., Any]
    optimizer: optax.GradientTransformation
    augment: Callable[[Array, Batch], Batch] | None
    dtype: Any  # of the forward and backward pass


def initial(params: PyTree, optimizer: optax.GradientTransformation, seed: int) -> State:
    """A state that owns copies of `params`, since its buffers will be donated."""
    params = jax.tree.map(jnp.array, params)
    trained, _ = split(params)
    key = jax.random.key(seed)
    # Some optimizers keep the parameters themselves; no buffer may be donated twice.
    # Nor may a type be weak: it would not be after the first step, and the second would compile.
    moments = jax.tree.map(lambda x: jnp.array(x, jax.typeof(x).dtype), optimizer.init(trained))
    return State(params, moments, key, jnp.int32(0), zeros())


def zeros() -> Totals:
    """Totals of no samples."""
    return Totals(jnp.float32(0), jnp.int32(0), jnp.int32(0), jnp.int32(-1))


def train(program: Program, state: State, teacher_params: PyTree, batch: Batch) -> State:
    """Augment, run forward and backward, update the parameters, add to the totals."""
    key, augment_key, model_key = jax.random.split(state.key, 3)
    if program.augment is not None:
        batch = program.augment(augment_key, batch)
    images = _to_float(batch["image"], program.dtype)
    trained, fixed = split(state.params)

    def objective(trained: PyTree) -> tuple[Array, tuple[Any, PyTree, Array]]:
        params = join(_cast(trained, program.dtype), fixed)
        outputs, updates = program.forward_train(params, model_key, images)
        outputs = _cast(outputs, _result_dtype(program.dtype))
        values = _losses(program, outputs, teacher_params, images, batch)
        return _masked_sum(values, batch) / _count(batch), (outputs, updates, values)

    (loss, kept), gradients = jax.value_and_grad(objective, has_aux=True)(trained)
    outputs, updates, values = kept
    # What line searches and plateau schedules ask for; other optimizers ignore it.
    extra = {"value": loss, "grad": gradients, "value_fn": lambda trained: objective(trained)[0]}
    update = optax.with_extra_args_support(program.optimizer).update
    changes, optimizer = update(gradients, state.optimizer, trained, **extra)
    params = join(optax.apply_updates(trained, changes), _updated(fixed, updates))
    totals = _add(state.totals, outputs, values, batch, state.step)
    return State(params, optimizer, key, state.step + 1, totals)


def train_many(program: Program, state: State, teacher_params: PyTree, batches: Batch) -> State:
    """One step for each entry of the leading axis of `batches`."""

    def body(state: State, batch: Batch) -> tuple[State, None]:
        return train(program, state, teacher_params, batch), None

    # XLA:CPU runs a convolution several times slower inside a loop body than outside of it.
    return jax.lax.scan(body, state, batches, unroll=jax.default_backend() == "cpu" or 1)[0]


def warn_of_traces(step: Callable[..., State]) -> Callable[..., State]:
    """`step`, which warns where JAX traces it again, and says for which argument."""
    types: dict[str, str] = {}  # of the arguments when last traced

    def traced(state: State, teacher_params: PyTree, batch: Batch) -> State:
        now = {"batch": batch, "state": state, "teacher": teacher_params}
        now = {path: str(jax.typeof(leaf)) for path, leaf in flatten(now).items()}
        if types and (changes := _changes(types, now)):
            warnings.warn(
                f"training step: traced and compiled again: {changes}. Every set of shapes and "
                "types compiles anew: keep to one batch size and one type of images",
                stacklevel=2,
            )
        stepped = step(state, teacher_params, batch)
        types.clear()
        types.update(now)
        return stepped

    return traced


def _changes(before: dict[str, str], now: dict[str, str]) -> str:
    """Of the types at each path, in words; the batch, which is sorted first, is the usual one."""
    paths = [path for path in sorted(before | now) if before.get(path) != now.get(path)]
    words = [
        f"{path} is {now.get(path, 'absent')}, was {before.get(path, 'absent')}"
        for path in paths[:3]
    ]
    return "; ".join(words) + f"; and {len(paths) - 3} more" * (len(paths) > 3)


def evaluate(
    program: Program, params: PyTree, totals: Totals, teacher_params: PyTree, batch: Batch
) -> Totals:
    """Run forward in inference mode and add to the totals."""
    outputs = predict(program, params, batch["image"])
    images = _to_float(batch["image"], program.dtype)
    values = _losses(program, outputs, teacher_params, images, batch)
    return _add(totals, outputs, values, batch, jnp.int32(0))


def predict(program: Program, params: PyTree, images: Array) -> Any:
    """Outputs in inference mode, in float32 (float64 for float64)."""
    trained, fixed = split(params)
    params = join(_cast(trained, program.dtype), fixed)
    outputs = program.forward(params, _to_float(images, program.dtype))
    return _cast(outputs, _result_dtype(program.dtype))


def split(params: PyTree) -> tuple[PyTree, PyTree]:
    """What the optimizer sees, and the other collections."""
    if isinstance(params, dict) and "params" in params:
        return params["params"], {k: v for k, v in params.items() if k != "params"}
    return params, None


def join(trained: PyTree, fixed: PyTree) -> PyTree:
    """The inverse of `split`."""
    return trained if fixed is None else {"params": trained, **fixed}


def _updated(fixed: PyTree, updates: PyTree) -> PyTree:
    """The other collections with their new values, in the types they had."""
    if not updates:
        return fixed
    changed = {name: fixed[name] for name in updates}
    return {**fixed, **jax.tree.map(lambda old, new: new.astype(old.dtype), changed, updates)}


def _to_float(images: Array, dtype: Any) -> Float[Array, "..."]:
    """Integers are pixels in [0, 255] and become [0, 1]."""
    if jnp.issubdtype(images.dtype, jnp.integer):
        images = images.astype(_result_dtype(dtype)) / 255
    return images.astype(dtype)


def _cast(tree: PyTree, dtype: Any) -> PyTree:
    def cast(leaf: Array) -> Array:
        return leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    return jax.tree.map(cast, tree)


def _result_dtype(dtype: Any) -> Any:
    return jnp.promote_types(dtype, jnp.float32)


def logits(outputs: Any) -> Float[Array, "batch classes"]:
    """The outputs themselves, or the first of a tuple."""
    return outputs[0] if isinstance(outputs, tuple | list) else outputs


def _losses(
    program: Program, outputs: Any, teacher_params: PyTree, images: Array, batch: Batch
) -> Float[Array, " batch"]:
    arguments = [outputs, batch["label"]]
    if program.teacher is not None:
        trained, fixed = split(teacher_params)
        followed = program.teacher(join(_cast(trained, program.dtype), fixed), images)
        followed = jax.lax.stop_gradient(_cast(followed, _result_dtype(program.dtype)))
        arguments.insert(1, followed)
    values = program.loss(*arguments)
    if values.shape != batch["mask"].shape:
        raise ValueError(
            f"loss must return one value per sample, shape {batch['mask'].shape}, "
            f"got shape {values.shape}; do not average inside it"
        )
    return values


def _masked_sum(values: Float[Array, " batch"], batch: Batch) -> Array:
    return jnp.sum(jnp.where(batch["mask"], values, 0))


def _count(batch: Batch) -> Array:
    return jnp.maximum(jnp.sum(batch["mask"]), 1)


def _add(totals: Totals, outputs: Any, values: Array, batch: Batch, step: Array) -> Totals:
    correct: Bool[Array, " batch"] = jnp.argmax(logits(outputs), axis=-1) == batch["label"]
    loss = _masked_sum(values, batch)
    new_bad = (totals.bad_step < 0) & ~jnp.isfinite(loss)
    return Totals(
        totals.loss + loss.astype(jnp.float32),
        totals.correct + jnp.sum(correct & batch["mask"]).astype(jnp.int32),
        totals.samples + jnp.sum(batch["mask"]).astype(jnp.int32),
        jnp.where(new_bad, step, totals.bad_step),
    )
