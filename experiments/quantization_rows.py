"""The variants of `experiments.quantization`: a network as trained, and what 8 bits make of it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, PyTree

import jaxaccel as jx
from experiments import common, mnist, pruning
from jaxaccel._select import flatten, rebuild

Candidate: TypeAlias = tuple[Callable, Any]
Images: TypeAlias = Float[Array, "batch height width channel"]
Logits: TypeAlias = Float[np.ndarray, "batch classes"]
Run: TypeAlias = Callable[[Images], Any]

BATCHES, BATCH = 8, 64  # for calibration, from the training images
TUNE, TUNE_PEAK = 1, 2e-4  # epochs of fine-tuning, and the highest of its learning rates
SPREAD = 1000  # between the ranges of the channels of the hard case
WIDTH = 0.35  # of MobileNet's channels
PEAKS = {"ConvNet": 1e-2, "ResNet-20": 1e-2, "MobileNet": 2e-2}  # of the learning rates


def mobilenet(rngs: nnx.Rngs) -> nnx.Module:
    options = {"width": WIDTH, "stem_strides": 1, "dropout": 0.0, "rngs": rngs}
    return jx.nn.MobileNet(10, in_features=1, **options)


NETWORKS: dict[str, Callable[[nnx.Rngs], nnx.Module]] = {
    "ConvNet": pruning.convnet,
    "ResNet-20": pruning.resnet,
    "MobileNet": mobilenet,
}


@dataclass(frozen=True)
class Trial:
    """A network and a seed; what is trained is kept in a folder, so that it is trained once."""

    name: str
    seed: int
    splits: jx.data.Splits
    epochs: int
    folder: Path

    def build(self) -> nnx.Module:
        """Not yet trained."""
        return NETWORKS[self.name](nnx.Rngs(self.seed))

    @cached_property
    def batches(self) -> list[Images]:
        """For calibration; all tools get the same."""
        images = self.splits.train.image[: BATCHES * BATCH]
        return [common.scaled(part) for part in np.split(images, len(images) // BATCH)]

    @cached_property
    def whole(self) -> Candidate:
        """In float32, as trained."""
        fn, params = jx.functional(self.build())
        model = lambda: self.build()
        return fn, self.kept("float32", params, model, self.epochs, PEAKS[self.name])

    @cached_property
    def folded(self) -> Candidate:
        """The same without batch norm."""
        return folded(self.whole, self.batches[0])

    def kept(
        self,
        name: str,
        like: PyTree,
        model: Callable[[], Any],
        epochs: int,
        peak: float,
        *last: optax.GradientTransformation,
    ) -> PyTree:
        """The parameters of a training, from its file if that is there."""
        path = self.folder / f"{self.name}-{self.epochs}-{len(self.splits.train)}-{self.seed}"
        path = path.with_name(f"{path.name}-{name}-{epochs}-{peak}.npz")
        leaves, structure = jax.tree.flatten(like)
        if not path.exists():
            job = mnist.Job(self.splits, epochs, self.seed, progress=False)
            found = job.fit(name, f"{self.name}, seed {self.seed}", model(), *last, peak=peak)
            path.parent.mkdir(parents=True, exist_ok=True)
            partly = path.with_suffix(".partial")
            with partly.open("wb") as file:
                np.savez(file, *jax.tree.leaves(found.params))
            partly.replace(path)
        with np.load(path) as file:
            found = [jnp.asarray(file[f"arr_{i}"]) for i in range(len(leaves))]
        return jax.tree.unflatten(structure, found)


def folded(pair: Candidate, images: Images) -> Candidate:
    fn, params = pair
    norms = "batch_stats" in params
    return jx.fold.batchnorm(fn, params, images) if norms else (fn, params)


def compiled(pair: Candidate) -> Run:
    """In forms of the same arithmetic that are not slow on a CPU, chosen by rules."""
    fn, params = pair
    return partial(jax.jit(jx.autotune(fn, mode="rules")), params)


def int8(**options: Any) -> Callable[[Trial], Candidate]:
    """Both in 8 bits."""
    return lambda trial: jx.quantize.int8(*trial.whole, trial.batches, **options)


def equalized(**options: Any) -> Callable[[Trial], Candidate]:
    def made(trial: Trial) -> Candidate:
        pair = jx.quantize.equalize(*trial.whole, trial.batches)
        return jx.quantize.int8(*pair, trial.batches, **options)

    return made


def weights(**options: Any) -> Callable[[Trial], Candidate]:
    """Kernels alone, as they are stored; arithmetic in float32."""

    def made(trial: Trial) -> Candidate:
        fn, params = trial.folded
        packed = jx.quantize.weights(params, **options)
        return lambda params, x: fn(jx.quantize.dequantize(params), x), packed

    return made


def trained_on(trial: Trial) -> Candidate:
    """The control of QAT: the same fine-tuning, and nothing rounded."""
    fn, params = trial.folded
    return fn, trial.kept("trained on", params, lambda: (fn, params), TUNE, TUNE_PEAK)


def qat(**options: Any) -> Callable[[Trial], Candidate]:
    """Fine-tuned with everything rounded, its steps too, and converted."""

    def made(trial: Trial) -> Candidate:
        made = jx.quantize.fake(*trial.whole, trial.batches, **options)
        model = lambda: (made, made.params)
        name = " ".join(["QAT", *map(str, options.values())])
        return made.convert(trial.kept(name, made.params, model, TUNE, TUNE_PEAK, relative_steps()))

    return made


def relative_steps() -> optax.GradientTransformation:
    """Changes of quantization's steps in proportion to these, which are small numbers."""

    def update(updates: PyTree, state: Any, params: PyTree) -> tuple[PyTree, Any]:
        scales = jax.tree.map(lambda u, p: u * jnp.abs(p), updates["scales"], params["scales"])
        return {**updates, "scales": scales}, state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)  # pyright: ignore[reportArgumentType]


def hard(trial: Trial) -> Candidate:
    """The same function, with ranges of channels that differ 1000-fold in one tensor."""
    fn, params = trial.folded
    leaves = flatten(params)
    for first, second in pairs(leaves):
        count = leaves[f"{first}/kernel"].shape[-1]
        factors = np.geomspace(SPREAD**-0.5, SPREAD**0.5, count, dtype=np.float32)
        factors = np.random.default_rng(trial.seed).permutation(factors)
        for name in ("kernel", "bias"):
            leaves[f"{first}/{name}"] = leaves[f"{first}/{name}"] * factors
        leaves[f"{second}/kernel"] = leaves[f"{second}/kernel"] / factors[:, None]
    return fn, rebuild(params, leaves)


def pairs(leaves: Mapping[str, Array]) -> list[tuple[str, str]]:
    """A convolution and the one that alone reads it, with a relu between."""
    firsts = [path.removesuffix("/conv1/kernel") for path in leaves if "conv1/kernel" in path]
    inner = [path for path in firsts if "blocks" in path] or firsts
    return [(f"{path}/conv1", f"{path}/conv2") for path in inner]


def hard_int8(trial: Trial) -> Candidate:
    return jx.quantize.int8(*hard(trial), trial.batches, calibration="minmax")


def hard_equalized(trial: Trial) -> Candidate:
    pair = jx.quantize.equalize(*hard(trial), trial.batches)
    return jx.quantize.int8(*pair, trial.batches, calibration="minmax")


POWER: dict[str, Any] = {"scales": "power_of_two"}
HARD = ("hard, float32", "hard, int8", "hard, int8 equalized")
ROWS: dict[str, Callable[[Trial], Candidate]] = {
    "float32": lambda trial: trial.whole,
    "int8": int8(),
    "int8, dynamic": int8(activations="dynamic"),
    "int8, shifts": int8(**POWER),
    "int8 weights": weights(bits=8),
    "int4 weights": weights(bits=4, small=0),
    "int4 weights, small in 8": weights(bits=4),
    "trained on": trained_on,
    "QAT": qat(),
    HARD[0]: hard,
    HARD[1]: hard_int8,
    HARD[2]: hard_equalized,
}
# After those of all seeds.
LATER: dict[str, Callable[[Trial], Candidate]] = {
    "int8, minmax": int8(calibration="minmax"),
    "int8, equalized": equalized(),
    "int8, bias correction": int8(bias_correction=True),
    "int8, AdaRound": int8(rounding="adaround"),
    "int4 weights, per channel": weights(bits=4, group=None, small=0),
    "float8 weights": weights(bits=8, kind="float8_e4m3fn"),
    "int8, percentile": int8(calibration="percentile"),
    "int8, entropy": int8(calibration="entropy"),
    "int8, shifts, equalized": equalized(**POWER),
    "int8, shifts, AdaRound": int8(rounding="adaround", **POWER),
    "QAT, shifts": qat(**POWER),
}
