"""Networks that others wrote, as their published packages have them, for `jx.compress`.

    pip install jax-resnet==0.0.4 'transformers>=4.57,<5' dm-haiku

Nothing of them is copied here: the code is what the package index serves. `SOURCES` has the hash of
each file that defines a network; `unmodified` compares it with what is installed. Only arguments
of the constructors are chosen: all take 28x28 images of one channel and tell 10 classes, as of
`experiments.pruning.load`. What one training on 8,000 of its cluttered digits reaches (`Job.fit` of
`experiments.mnist` with `jx.autotune` by rules, batch 64, seed 0, jax 0.11.2, 2 shared cores of an
AMD EPYC; accuracy on the validation set, last epoch):

    network    framework   parameters       MACs  epochs  seconds  accuracy
    resnet     Flax Linen      88,810  1,388,789      14       46    0.9085
    regnet     Flax Linen     105,530  1,450,581      20       61    0.9125
    mobilenet  Haiku           17,258    767,685      24       42    0.9115
    vit        Flax Linen      41,770  2,786,793      24      129    0.7535

RegNet's blocks keep the batch norm of their convolutions on running averages in training too, as
published. MobileNetV1's averages forget one part in a thousand per step: it needs the many epochs.
`initializer_range` of the ViT is 1 because it stayed at chance with the 0.02 of its default.
transformers 5 has no Flax networks.
"""

import hashlib
from collections.abc import Callable
from functools import partial
from importlib import import_module
from importlib.metadata import distribution
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import jaxaccel as jx

SHAPE = (28, 28, 1)
CLASSES = 10
Model = tuple[Callable[..., Any], Any]  # a function and its parameters


class Source(NamedTuple):
    """Where the code of a network comes from."""

    package: str
    version: str  # that was measured
    repository: str
    licence: str
    files: dict[str, str]  # path in the package -> SHA-256


class Network(NamedTuple):
    """How a network is built, and how it was trained."""

    build: Callable[[int], Model]
    shape: tuple[int, ...]  # of one image
    epochs: int
    peak: float  # of the learning rate


class Logits:
    """A function that returns a tuple, as one that returns the first of it."""

    def __init__(self, fn: Any) -> None:
        self._fn = fn

    def __call__(self, params: Any, images: jax.Array) -> jax.Array:
        """Inference mode."""
        return self._fn(params, images)[0]

    def train(self, params: Any, key: jax.Array, images: jax.Array) -> tuple[jax.Array, Any]:
        """Training mode: ``(logits, updates)``."""
        outputs, updates = self._fn.train(params, key, images)
        return outputs[0], updates


class HaikuFunction:
    """A transformed Haiku function of ``(images, is_training)``, called as a Flax one is here."""

    def __init__(self, net: Any) -> None:
        self._net = net

    def __call__(self, params: Any, images: jax.Array) -> jax.Array:
        """Inference mode."""
        return self._net.apply(params["params"], params["state"], None, images, False)[0]

    def train(self, params: Any, key: jax.Array, images: jax.Array) -> tuple[jax.Array, Any]:
        """Training mode: ``(logits, updates)``."""
        logits, state = self._net.apply(params["params"], params["state"], key, images, True)
        return logits, {"state": state}


def linen(module: Any, seed: int) -> tuple[Any, Any]:
    images = jnp.zeros((1, *SHAPE))
    return jx.functional(module, jax.jit(module.init)(jax.random.key(seed), images))


def resnet(seed: int) -> Model:
    package = import_module("jax_resnet")
    sizes = {"stage_sizes": (1, 1, 1), "hidden_sizes": (16, 32, 64)}
    return linen(package.ResNet18(n_classes=CLASSES, **sizes), seed)


def regnet(seed: int) -> Model:
    config = import_module("transformers").RegNetConfig(
        num_channels=SHAPE[-1],
        embedding_size=32,
        hidden_sizes=[32, 64, 128],
        depths=[1, 2, 1],
        groups_width=16,
        num_labels=CLASSES,
        return_dict=False,
    )
    package = import_module("transformers.models.regnet.modeling_flax_regnet")
    fn, params = linen(package.FlaxRegNetForImageClassificationModule(config), seed)
    return Logits(fn), params


def vit(seed: int) -> Model:
    config = import_module("transformers").ViTConfig(
        image_size=SHAPE[0],
        num_channels=SHAPE[-1],
        patch_size=4,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=1.0,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=CLASSES,
        return_dict=False,
    )
    package = import_module("transformers.models.vit.modeling_flax_vit")
    fn, params = linen(package.FlaxViTForImageClassificationModule(config), seed)
    return Logits(fn), params


def mobilenet(seed: int) -> Model:
    hk = import_module("haiku")
    build = partial(hk.nets.MobileNetV1, (1, 2, 1, 2), (32, 64, 64, 96), CLASSES)
    net = hk.transform_with_state(lambda images, is_training: build()(images, is_training))
    weights, state = net.init(jax.random.key(seed), jnp.zeros((1, *SHAPE)), True)
    return HaikuFunction(net), {"params": weights, "state": state}


NETWORKS = {
    "resnet": Network(resnet, SHAPE, 14, 5e-3),
    "regnet": Network(regnet, SHAPE, 20, 1e-2),
    "mobilenet": Network(mobilenet, SHAPE, 24, 1e-2),
    "vit": Network(vit, SHAPE, 24, 5e-3),
}

TRANSFORMERS = ("transformers", "4.57.6", "huggingface/transformers", "Apache-2.0")
SOURCES = {
    "resnet": Source(
        *("jax-resnet", "0.0.4", "n2cholas/jax-resnet", "MIT"),
        {
            "jax_resnet/common.py": (
                "1b5c81b880abe3b2cb4116d7509e341ccc27d10b11fa9741e6691de816e59b00"
            ),
            "jax_resnet/resnet.py": (
                "46c637d109dea39eefda27f3f70177b0d215ea0630227fb2d8273e9faae9732a"
            ),
        },
    ),
    "regnet": Source(
        *TRANSFORMERS,
        {
            "transformers/models/regnet/modeling_flax_regnet.py": (
                "a2fe925f25ed9055f03520bdaae5ad7b5bcc97a01991e278f6196aa74975ef59"
            )
        },
    ),
    "mobilenet": Source(
        *("dm-haiku", "0.0.17", "google-deepmind/dm-haiku", "Apache-2.0"),
        {
            "haiku/_src/nets/mobilenetv1.py": (
                "9bd5b5b7c61abea09a15071b146b09864357e0250d103d1fdfcb54c6c6dfda38"
            )
        },
    ),
    "vit": Source(
        *TRANSFORMERS,
        {
            "transformers/models/vit/modeling_flax_vit.py": (
                "f7948169bdc2008a03ddbc2059f37a63bbf8e1f47a107349543b8faa2f85397f"
            )
        },
    ),
}


def unmodified(source: Source) -> bool:
    """Whether the installed files are, byte for byte, those that were measured."""
    locate = distribution(source.package).locate_file
    digest = lambda path: hashlib.sha256(Path(str(locate(path))).read_bytes()).hexdigest()
    return all(digest(path) == expected for path, expected in source.files.items())
