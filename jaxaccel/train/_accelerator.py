"""The Accelerator: a model, an optimizer and a loss, compiled into one donated training step."""

import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, PyTree

from jaxaccel._functional import functional
from jaxaccel._select import flatten
from jaxaccel.train import _step
from jaxaccel.train._feed import Bar, feed, grouped
from jaxaccel.train._step import Batch, Metrics, Program, State, Totals

if TYPE_CHECKING:
    from flax import nnx

PRECISIONS = ("float32", "bfloat16", "float64")


@dataclasses.dataclass(frozen=True)
class Epoch:
    """One pass over the training data."""

    epoch: int
    train: Metrics  # as seen while training: with augmentation, dropout and moving weights
    validation: Metrics | None
    seconds: float  # of training alone
    images_per_second: float


class Accelerator:
    """Train and evaluate a classifier with one compiled, donated step.

    The model is split once into a pure function and a pytree; augmentation, forward, loss,
    gradient, optimizer and metrics are one XLA program, and the host only feeds it.

    >>> import jaxaccel as jx, optax
    >>> from flax import nnx
    >>> digits = jx.data.digits()
    >>> model = jx.nn.MLP(28 * 28, width=32, depth=1, num_classes=10, rngs=nnx.Rngs(0))
    >>> acc = jx.Accelerator(model, optax.adam(3e-3))
    >>> history = acc.fit(jx.data.device_loader(digits.train, 64), epochs=3, progress=False)
    >>> acc.evaluate(jx.data.device_loader(digits.test, 64, shuffle=False)).accuracy > 0.8
    True
    """

    def __init__(
        self,
        model: "nnx.Module | tuple[Callable, PyTree]",
        optimizer: optax.GradientTransformation,
        *,
        loss: Callable[..., Float[Array, " batch"]] = (
            optax.softmax_cross_entropy_with_integer_labels
        ),
        mesh: Mesh | None = None,
        precision: Literal["float32", "bfloat16", "float64"] = "float32",
        augment: Callable[[Array, Batch], Batch] | None = None,
        transform: Callable[[Callable], Callable] | None = None,
        teacher: tuple[Callable, PyTree] | None = None,
        steps_per_call: int | Literal["auto"] = "auto",
        seed: int = 0,
    ):
        """Split the model, place its parameters and build the step; nothing compiles yet.

        Args:
            model: a ``flax.nnx.Module``, or any ``(fn, params)``; ``fn(params, images)`` gives
                logits ``[batch, classes]``, or a tuple whose first entry they are. Where
                ``fn.train(params, key, images) -> (outputs, updates)`` exists, as after
                `jaxaccel.functional`, it is what is trained. The model and `params` are copied.
            optimizer: any optax transformation; only ``params["params"]`` is trained where the
                tree has it, else the whole tree.
            loss: ``(outputs, labels) -> [batch]``, one value per sample; with `teacher`,
                ``(outputs, teacher_outputs, labels) -> [batch]``.
            mesh: trains data-parallel over its axis ``"data"`` (or its first), with the
                parameters on every device and gradients summed by XLA. None: the default device.
            precision: the type in which forward and backward run; parameters, optimizer and loss
                keep the parameters' own type.
            augment: ``(key, batch) -> batch``, run inside the step, in training only.
            transform: applied to the forward functions, as ``jx.autotune``.
            teacher: ``(fn, params)`` of a trained network, run on the same augmented images.
            steps_per_call: how many steps one call of the device makes. ``"auto"``: 1 on CPU, 8
                elsewhere. On CPU the steps are unrolled, since XLA:CPU runs convolutions slowly
                inside a loop: the compile time grows in proportion.
            seed: of dropout and augmentation.

        Raises:
            TypeError: a trained leaf is not a floating-point array.
            ValueError: `precision` or `steps_per_call` is out of range.
        """
        if precision not in PRECISIONS:
            raise ValueError(f"precision={precision!r} must be one of {', '.join(PRECISIONS)}")
        if precision == "float64" and jnp.result_type(float) != jnp.float64:
            raise ValueError('precision="float64" needs jax.config.update("jax_enable_x64", True)')
        self.fn, params = model if isinstance(model, tuple) else functional(model)
        _check_trainable(params)
        forward, forward_train = _forwards(self.fn, transform)
        followed, teacher_params = teacher if teacher else (None, None)
        dtype = jnp.dtype(precision)
        program = Program(forward, forward_train, followed, loss, optimizer, augment, dtype)
        self._mesh = None if mesh is None else _automatic(mesh)
        self._steps_per_call = _resolve(steps_per_call)
        self._teacher_params = self._replicate(teacher_params)
        self._state: State = self._replicate(_step.initial(params, optimizer, seed))
        self._compile(program)

    def _compile(self, program: Program) -> None:
        whole = self._sharding()
        compiled = partial(jax.jit, out_shardings=whole)
        step, steps = (partial(f, program) for f in (_step.train, _step.train_many))
        self._train = compiled(_step.warn_of_traces(step), donate_argnums=0)
        self._train_many = compiled(_step.warn_of_traces(steps), donate_argnums=0)
        self._evaluate = compiled(partial(_step.evaluate, program), donate_argnums=1)
        self._predict = jax.jit(partial(_step.predict, program))

    def fit(
        self,
        train: Iterable,
        epochs: int = 1,
        *,
        validation: Iterable | None = None,
        progress: bool = True,
    ) -> list[Epoch]:
        """Train for some epochs, going on from where the last call stopped.

        Args:
            train: re-iterable batches: ``{"image", "label"}`` dicts, with ``"mask"`` False on
                padding, or ``(image, label)`` pairs. Integer images are scaled from [0, 255] to
                [0, 1] on the device. All batches take the shape of the first: a short last one is
                padded and masked, so that nothing compiles twice. Batch norm still sees the
                copies that pad it: give its loader ``drop_last=True``.
            epochs: passes over `train`, >= 1.
            validation: re-iterable batches to evaluate after each epoch.
            progress: show a bar with images per second, loss and accuracy.

        Returns:
            One `Epoch` for each pass.

        Raises:
            FloatingPointError: the loss became NaN or infinite; names the step.
            ValueError: `train` is empty or a one-shot iterator, or a batch does not fit.
        """
        if epochs < 1:
            raise ValueError(f"epochs={epochs!r} must be >= 1")
        for name, batches in {"train": train, "validation": validation}.items():
            if epochs > 1 and isinstance(batches, Iterator):
                raise ValueError(
                    f"{name} is a one-shot iterator but epochs={epochs}; "
                    "pass a list or a jx.data loader"
                )
        with Bar(epochs, train, progress) as bar:
            return [self._epoch(n, train, validation, bar) for n in range(1, epochs + 1)]

    def _epoch(self, number: int, train: Iterable, validation: Iterable | None, bar: Bar) -> Epoch:
        self._state = self._state._replace(totals=self._replicate(_step.zeros()))
        start = time.perf_counter()
        for group in grouped(feed(train, self._sharding("batch")), self._steps_per_call):
            self._run(group)
            if bar.advance(len(group)):
                self._show(number, start, bar)
        metrics = self._show(number, start, bar)
        seconds = time.perf_counter() - start
        validated = None if validation is None else self.evaluate(validation)
        return Epoch(number, metrics, validated, seconds, metrics.samples / seconds)

    def _run(self, group: list[Batch]) -> None:
        if len(group) == self._steps_per_call > 1:
            batches = _stack(*group)
            self._state = self._train_many(self._state, self._teacher_params, batches)
            return
        for batch in group:
            self._state = self._train(self._state, self._teacher_params, batch)

    def _show(self, epoch: int, start: float, bar: Bar) -> Metrics:
        """Wait for the device, look for a NaN, draw the bar."""
        totals = jax.device_get(self._state.totals)
        if totals.bad_step >= 0:
            raise FloatingPointError(
                f"step {totals.bad_step}: the loss is not finite; try a lower learning rate, "
                "optax.clip_by_global_norm(1.0) before the optimizer, or precision='float32'"
            )
        metrics, seconds = _metrics(totals), time.perf_counter() - start
        speed = f"{metrics.samples / seconds:,.0f} images/s"
        bar.show(epoch, f"{speed}  loss {metrics.loss:.4f}  accuracy {metrics.accuracy:.4f}")
        return metrics

    def evaluate(self, batches: Iterable) -> Metrics:
        """Loss and accuracy in inference mode over all batches, padding left out.

        Args:
            batches: as for `fit`.

        Raises:
            ValueError: `batches` is empty or a batch does not fit.
        """
        totals: Totals = self._replicate(_step.zeros())
        for batch in feed(batches, self._sharding("batch")):
            totals = self._evaluate(self._state.params, totals, self._teacher_params, batch)
        return _metrics(jax.device_get(totals))

    def predict(self, images: Array | np.ndarray) -> Any:
        """The model's outputs for ``[batch, height, width, channel]`` images, inference mode."""
        return self._predict(self._state.params, jnp.asarray(images))

    @property
    def params(self) -> PyTree:
        """A copy of the parameters: the next step gives its own buffers back to XLA."""
        return jax.tree.map(jnp.copy, self._state.params)

    @property
    def step(self) -> int:
        """Optimizer steps made so far."""
        return int(self._state.step)

    def module(self) -> Any:
        """A new Flax model with the trained parameters.

        Raises:
            TypeError: the Accelerator was built from a function that is not a Flax model's.
        """
        if not hasattr(self.fn, "module"):
            raise TypeError(
                "module() needs a Flax model; this Accelerator was built from a plain function"
            )
        return self.fn.module(self.params)  # pyright: ignore[reportFunctionMemberAccess]

    def _sharding(self, kind: Literal["whole", "batch"] = "whole") -> NamedSharding | None:
        if self._mesh is None:
            return None
        names = self._mesh.axis_names
        axis = "data" if "data" in names else names[0]
        return NamedSharding(
            self._mesh, PartitionSpec(axis) if kind == "batch" else PartitionSpec()
        )

    def _replicate(self, tree: PyTree) -> PyTree:
        return tree if self._mesh is None else jax.device_put(tree, self._sharding())


@jax.jit
def _stack(*batches: Batch) -> Batch:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *batches)


def _forwards(fn: Callable, transform: Callable | None) -> tuple[Callable, Callable]:
    """The inference and training form of a function, each transformed."""
    forward = transform(fn) if transform else fn
    if hasattr(fn, "train"):
        train = fn.train  # pyright: ignore[reportFunctionMemberAccess]
        return forward, transform(train) if transform else train
    return forward, lambda params, key, images: (forward(params, images), {})


def _automatic(mesh: Mesh) -> Mesh:
    """The same devices with Auto axes: on Explicit ones the gradient of a dot raises."""
    axes = (AxisType.Auto,) * len(mesh.axis_names)
    return Mesh(mesh.devices, mesh.axis_names, axis_types=axes)


def _resolve(steps_per_call: int | str) -> int:
    if steps_per_call == "auto":
        return 1 if jax.default_backend() == "cpu" else 8
    if not isinstance(steps_per_call, int) or steps_per_call < 1:
        raise ValueError(f'steps_per_call={steps_per_call!r} must be an integer >= 1 or "auto"')
    return steps_per_call


def _check_trainable(params: PyTree) -> None:
    for path, leaf in flatten(_step.split(params)[0]).items():
        if not hasattr(leaf, "dtype") or not jnp.issubdtype(leaf.dtype, jnp.floating):
            kind = getattr(leaf, "dtype", type(leaf).__name__)
            raise TypeError(
                f"{path}: cannot train a leaf of type {kind}, only floating-point arrays; "
                "a quantized tree goes through jx.quantize.dequantize first"
            )


def _metrics(totals: Totals) -> Metrics:
    samples = max(int(totals.samples), 1)
    loss = float(totals.loss) / samples
    return Metrics(loss, int(totals.correct) / samples, int(totals.samples))
