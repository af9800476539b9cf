"""Real handwritten digits that need no download, plain and cluttered."""

from typing import Literal

import numpy as np
from jaxtyping import Float, Int, UInt8
from numpy.lib.stride_tricks import sliding_window_view

from jaxaccel.data._arrays import Arrays, Splits, arrays

# All that follow are part of the data sets' definition: another value is another data set.
_SPLIT_SEED = 2014
_TRAIN_STREAM, _VALIDATION_STREAM, _TEST_STREAM = 1, 2, 3

_SIDE = 28  # of a plain image, as in MNIST
_BOX = 20  # the digit within it, as in MNIST

_CANVAS = 56  # side of a cluttered image
_DISTRACTORS = 3  # patches of other digits on each canvas
_PATCH = 8  # side of a patch
_CONTRAST = (0.7, 1.0)  # range of a digit's and each patch's brightness, relative to the source
_NOISE = 16.0  # standard deviation, in grey levels of 255
_BLOCK = 250  # canvases drawn at once: bounds the float32 noise to 3 MB


def digits(
    variant: Literal["plain", "cluttered"] = "plain",
    *,
    train_images: int = 20_000,
    validation_images: int = 2_000,
    test_images: int = 10_000,
    seed: int = 0,
) -> Splits:
    """Handwritten digits in ten classes, offline.

    "plain" is scikit-learn's 1,797 real digits, enlarged from 8x8 to 28x28x1 as in MNIST: 1,260 for
    training, 179 for validation, 358 for test, stratified by class. Digits of one writer may
    stand in several splits. "cluttered" draws 56x56x1 canvases: one digit of the split at a
    random place, among patches of other digits of the same split, under noise.

    Args:
        variant: "plain", or "cluttered" (hard enough to tell good models from better ones).
        train_images: Canvases to draw for training, at least 1; like the two below it matters
            only to "cluttered".
        validation_images: Canvases to draw for validation, at least 1.
        test_images: Canvases to draw for test, at least 1.
        seed: From 0; varies the training canvases only, never the validation or test
            canvases or which digits they are drawn from.

    Returns:
        The `Splits`, uint8 images.

    Raises:
        ValueError: The variant is unknown, a count is below 1 or the seed below 0.

    Alpaydin and Kaynak, "Optical Recognition of Handwritten Digits", UCI 1998. The clutter is that
    of Mnih et al., "Recurrent Models of Visual Attention", NeurIPS 2014, section 4.1. A ConvNet of
    three 5x5 convolutions (8, 16, 32 channels) and a dense layer of 50 reached 90.7% test accuracy
    on the default "cluttered" after 8 epochs (Adam 1e-3, batch 128, one run).

    >>> digits().test
    Arrays(image=uint8[358, 28, 28, 1], label=int32[358])
    """
    if variant == "plain":
        return _plain()
    if variant != "cluttered":
        raise ValueError(f'variant is {variant!r}; pass "plain" or "cluttered"')
    if seed < 0:
        raise ValueError(f"seed is {seed}; pass an integer from 0")
    return _cluttered(_plain(), (train_images, validation_images, test_images), seed)


def _plain() -> Splits:
    from sklearn.datasets import load_digits

    flat, label = map(np.asarray, load_digits(return_X_y=True))
    image = _enlarge(flat.reshape(-1, 8, 8) / 16)
    # Sorted by class in random order within it, every tenth digit is a stratified tenth.
    order = np.random.default_rng(_SPLIT_SEED).permutation(len(label))
    order = order[np.argsort(label[order], kind="stable")]
    tenth = np.arange(len(order)) % 10
    parts = (order[tenth < 7], order[tenth == 7], order[tenth > 7])
    return Splits(*(arrays(image[rows], label[rows]) for rows in map(np.sort, parts)))


def _enlarge(small: Float[np.ndarray, "n 8 8"]) -> UInt8[np.ndarray, "n 28 28"]:
    """Cubic interpolation of values in 0..1 to the box, centred on a black image."""
    at = (np.arange(_BOX) + 0.5) * 8 / _BOX - 0.5
    weight = _cubic(at[:, None] - np.arange(8))
    box = np.clip(np.einsum("rh,nhw,cw->nrc", weight, small, weight, optimize=True), 0, 1)
    margin = (_SIDE - _BOX) // 2
    return np.pad(np.rint(255 * box).astype(np.uint8), ((0, 0), (margin, margin), (margin, margin)))


def _cubic(distance: Float[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
    """Keys, "Cubic convolution interpolation for digital image processing", IEEE 1981."""
    d = np.abs(distance)
    near, far = (1.5 * d - 2.5) * d**2 + 1, ((2.5 - 0.5 * d) * d - 4) * d + 2
    return np.where(d <= 1, near, np.where(d < 2, far, 0.0))


def _cluttered(plain: Splits, counts: tuple[int, int, int], seed: int) -> Splits:
    for name, count in zip(("train", "validation", "test"), counts, strict=True):
        if count < 1:
            raise ValueError(f"{name}_images is {count}; draw at least 1")
    streams = ((_TRAIN_STREAM, seed), (_VALIDATION_STREAM,), (_TEST_STREAM,))
    return Splits(*map(_clutter, plain, counts, map(np.random.default_rng, streams)))


def _clutter(pool: Arrays, count: int, rng: np.random.Generator) -> Arrays:
    chosen = rng.permutation(count) % len(pool)  # every digit equally often
    image = np.empty((count, _CANVAS, _CANVAS), np.uint8)
    for start in range(0, count, _BLOCK):
        block = slice(start, start + _BLOCK)
        image[block] = _canvases(pool.image[..., 0], chosen[block], rng)
    return arrays(image, pool.label[chosen])


def _canvases(
    pool: UInt8[np.ndarray, "digits 28 28"], chosen: Int[np.ndarray, " n"], rng: np.random.Generator
) -> UInt8[np.ndarray, "n 56 56"]:
    canvas = np.zeros((len(chosen), _CANVAS, _CANVAS), np.float32)
    _paste(canvas, pool[chosen], rng)
    for _ in range(_DISTRACTORS):
        other = (chosen + rng.integers(1, len(pool), len(chosen))) % len(pool)
        _paste(canvas, _crops(pool[other], rng), rng)
    canvas += _NOISE * rng.standard_normal(canvas.shape, np.float32)
    return np.clip(np.rint(canvas), 0, 255).astype(np.uint8)


def _paste(
    canvas: Float[np.ndarray, "n 56 56"],
    patch: UInt8[np.ndarray, "n side side"],
    rng: np.random.Generator,
) -> None:
    """Lays each patch over its canvas at a random place and contrast; the brighter pixel wins."""
    n, side = patch.shape[:2]
    row, column = rng.integers(0, _CANVAS - side + 1, (2, n))
    contrast = rng.uniform(*_CONTRAST, (n, 1, 1)).astype(np.float32)
    place = np.arange(n), row, column
    views = sliding_window_view(canvas, (side, side), axis=(1, 2), writeable=True)
    views[place] = np.maximum(views[place], contrast * patch)


def _crops(
    image: UInt8[np.ndarray, "n 28 28"], rng: np.random.Generator
) -> UInt8[np.ndarray, "n patch patch"]:
    """A random window within the box of each digit."""
    margin = (_SIDE - _BOX) // 2
    row, column = rng.integers(margin, margin + _BOX - _PATCH + 1, (2, len(image)))
    return sliding_window_view(image, (_PATCH, _PATCH), axis=(1, 2))[
        np.arange(len(image)), row, column
    ]
