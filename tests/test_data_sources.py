"""Arrays and the digits."""

import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxaccel import data
from jaxaccel.data import _digits

OPTIONAL = ("sklearn", "tensorflow_datasets", "flax", "optax")


def rows_of(image: np.ndarray) -> set[bytes]:
    return {row.tobytes() for row in image}


def test_import_needs_no_optional_package():
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({OPTIONAL}));"
        "from jaxaccel.data import Arrays, prefetch; print('imported')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "imported\n", done.stderr


@pytest.mark.parametrize("dtype", [np.uint8, np.float32, np.float16, jnp.bfloat16])
def test_arrays_copies_nothing_that_fits(dtype):
    x, y = np.ones((3, 4, 5, 2), dtype), np.array([2, 0, 1], np.int32)
    both = data.arrays(x, y)
    assert np.shares_memory(both.image, x)
    assert np.shares_memory(both.label, y)
    assert both.image.dtype == dtype


def test_arrays_converts_what_the_device_would():
    both = data.arrays(np.full((2, 4, 5), 1 / 3), np.array([7, 8], np.uint8))
    assert both.image.shape == (2, 4, 5, 1)
    assert both.image.dtype == np.float32
    assert both.label.dtype == np.int32
    np.testing.assert_array_equal(both.image, np.float32(1 / 3))


def test_arrays_rows():
    x = np.arange(4 * 2 * 2, dtype=np.uint8).reshape(4, 2, 2, 1)
    both = data.arrays(x, np.array([5, 6, 7, 8]))
    assert len(both) == 4
    assert both[2]["label"] == 7
    assert [int(row["label"]) for row in both] == [5, 6, 7, 8]
    for index in (1, slice(1, 3), np.array([3, 0, 3])):
        np.testing.assert_array_equal(both[index]["image"], x[index])
    with pytest.raises(IndexError):
        both[4]


IMAGES, LABELS = np.zeros((3, 4, 4), np.uint8), np.arange(3)


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (IMAGES, LABELS[:2], r"^x has 3 images but y has 2 labels; pass one each$"),
        (IMAGES[:0], LABELS[:0], r"^x has shape \(0, 4, 4\); pass non-empty \[n, height, width\]"),
        (IMAGES[0], LABELS, r"^x has shape \(4, 4\)"),
        (IMAGES.astype(int), LABELS, r"^x has dtype int64; pass uint8 or float images$"),
        (IMAGES > 0, LABELS, r"^x has dtype bool"),
        (IMAGES + np.nan, LABELS, r"^x holds NaN or infinity; pass finite images$"),
        (IMAGES + np.inf, LABELS, r"^x holds NaN or infinity"),
        (IMAGES, LABELS[:, None], r"^y has shape \(3, 1\); pass one label per image, \[n\]$"),
        (IMAGES, LABELS / 2, r"^y has dtype float64; pass integer labels$"),
        (IMAGES, LABELS - 1, r"^y spans -1..1; pass labels from 0 that fit int32$"),
        (IMAGES, LABELS + 2**31, r"^y spans 2147483648..2147483650; pass labels from 0"),
    ],
)
def test_arrays_refuses(x, y, message):
    with pytest.raises(ValueError, match=message):
        data.arrays(x, y)


@given(st.integers(1, 6), st.integers(1, 4), st.integers(1, 4))
def test_to_arrays_equals_its_rows(n, height, width):
    image = np.random.default_rng(n).integers(0, 256, (n, height, width, 1)).astype(np.uint8)
    both = data.to_arrays([{"image": image[i], "label": np.int64(i)} for i in range(n)])
    np.testing.assert_array_equal(both.image, image)
    np.testing.assert_array_equal(both.label, np.arange(n))


def test_to_arrays_refuses():
    with pytest.raises(ValueError, match=r"^source is empty; give it at least one row$"):
        data.to_arrays([])
    rows = [{"image": np.zeros((4, side), np.uint8), "label": np.int32(0)} for side in (4, 5)]
    message = r"^source has images of shape \(4, 4\) and \(4, 5\); resize them to one shape$"
    with pytest.raises(ValueError, match=message):
        data.to_arrays(rows)


def test_digits_splits_are_disjoint_covering_and_stratified():
    from sklearn.datasets import load_digits

    splits = data.digits()
    assert [len(split) for split in splits] == [1260, 179, 358]
    # An enlarged image is one of the 8x8 ones sampled: match them by content and label.
    everything = np.concatenate([split.image for split in splits])
    labels = np.concatenate([split.label for split in splits])
    small, target = map(np.asarray, load_digits(return_X_y=True))
    enlarged = _digits._enlarge(small.reshape(-1, 8, 8) / 16)[..., None]
    expected = sorted(zip(map(bytes, enlarged), target, strict=True))
    assert sorted(zip(map(bytes, everything), labels, strict=True)) == expected
    assert sum(len(rows_of(split.image)) for split in splits) == len(rows_of(everything))
    for split, share in zip(splits, (0.7, 0.1, 0.2), strict=True):
        # Every tenth row of a class is within two rows of its share.
        expected_rows = share * np.bincount(labels)
        np.testing.assert_allclose(np.bincount(split.label), expected_rows, atol=2.11, rtol=0)
        assert np.any(np.diff(split.label) < 0), "sorted by class"


def test_enlarging_is_cubic_interpolation():
    # Keys' kernel reproduces quadratics: sampled well inside, x^2 stays x^2.
    x = np.arange(8) / 10
    image = np.broadcast_to(x**2, (1, 8, 8))
    at = (np.arange(20) + 0.5) * 8 / 20 - 0.5
    inside = slice(6, 14)
    got = _digits._enlarge(image)[0, 4:24, 4:24][inside, inside] / 255
    np.testing.assert_allclose(got, np.broadcast_to((at[inside] / 10) ** 2, (8, 8)), atol=0.5 / 255)
    framed = _digits._enlarge(np.ones((1, 8, 8)))[0]
    assert framed[4:24, 4:24].min() > 100
    assert framed.sum() == framed[4:24, 4:24].sum()


COUNTS = {"train_images": 1100, "validation_images": 30, "test_images": 40}


def test_cluttered_is_deterministic_and_the_seed_varies_training_alone():
    first = data.digits("cluttered", **COUNTS)
    again = data.digits("cluttered", **COUNTS)
    other = data.digits("cluttered", **COUNTS, seed=1)
    assert [split.image.shape for split in first] == [(n, 56, 56, 1) for n in COUNTS.values()]
    assert {split.image.dtype for split in first} == {np.dtype(np.uint8)}
    for one, two in zip(first, again, strict=True):
        np.testing.assert_array_equal(one.image, two.image)
        np.testing.assert_array_equal(one.label, two.label)
    for one, two in zip(first[1:], other[1:], strict=True):
        np.testing.assert_array_equal(one.image, two.image)
    assert not rows_of(first.train.image) & rows_of(other.train.image)
    assert not rows_of(first.validation.image) & rows_of(first.test.image)


@pytest.mark.parametrize("left", ["train", "validation", "test"])
def test_cluttered_split_is_drawn_from_its_own_digits(left):
    """Blank the digits of the two other splits: the one that is left must not change a bit."""
    plain = data.digits()
    blank = {
        name: data.Arrays(np.zeros_like(split.image), np.zeros_like(split.label))
        for name, split in plain._asdict().items()
        if name != left
    }
    counts = (30, 30, 30)
    whole = _digits._cluttered(plain, counts, 0)._asdict()
    without = _digits._cluttered(plain._replace(**blank), counts, 0)._asdict()
    np.testing.assert_array_equal(whole[left].image, without[left].image)
    np.testing.assert_array_equal(whole[left].label, without[left].label)
    for name in blank:
        assert np.any(whole[name].image != without[name].image)


def test_cluttered_holds_its_digit_in_full(monkeypatch):
    """Without noise, at full contrast and before clutter, some window is the very digit."""
    monkeypatch.setattr(_digits, "_NOISE", 0.0)
    monkeypatch.setattr(_digits, "_CONTRAST", (1.0, 1.0))
    monkeypatch.setattr(_digits, "_DISTRACTORS", 0)
    plain = data.digits()
    cluttered = _digits._cluttered(plain, (30, 30, 30), 0)
    for split, pool in zip(cluttered, plain, strict=True):
        digits_of = {pool.image[i].tobytes(): pool.label[i] for i in range(len(pool))}
        for image, label in zip(split.image, split.label, strict=True):
            windows = np.lib.stride_tricks.sliding_window_view(image[..., 0], (28, 28))
            found = {digits_of.get(w.tobytes()) for line in windows for w in line}
            assert label in found


def test_cluttered_distractors_are_patches_of_other_digits(monkeypatch):
    """A pool of two constant digits: a canvas holds its own level and patches of the other's."""
    monkeypatch.setattr(_digits, "_NOISE", 0.0)
    monkeypatch.setattr(_digits, "_CONTRAST", (1.0, 1.0))
    image = np.zeros((2, 28, 28, 1), np.uint8)
    image[:, 4:24, 4:24] = np.array([50, 200], np.uint8)[:, None, None, None]
    pool = data.arrays(image, np.arange(2))
    canvases = _digits._clutter(pool, 50, np.random.default_rng(0))
    patch = _digits._DISTRACTORS * _digits._PATCH**2
    assert set(np.bincount(canvases.label)) == {25}
    for canvas, label in zip(canvases.image, canvases.label, strict=True):
        own, foreign = (50, 200) if label == 0 else (200, 50)
        assert set(np.unique(canvas)) - {0, own, foreign} == set()
        assert np.sum(canvas == own) <= 400
        assert 0 < np.sum(canvas == 200) + np.sum(canvas == 50) <= 400 + patch
        assert np.sum(canvas == foreign) <= patch
    assert np.mean(canvases.image == 0) < 1 - 400 / 56**2, "no distractors"


def test_digits_refuses():
    with pytest.raises(
        ValueError, match=r"^variant is 'blurred'; pass \"plain\" or \"cluttered\"$"
    ):
        data.digits("blurred")  # pyright: ignore[reportArgumentType]
    for name in COUNTS:
        with pytest.raises(ValueError, match=rf"^{name} is 0; draw at least 1$"):
            data.digits("cluttered", **{**COUNTS, name: 0})
    with pytest.raises(ValueError, match=r"^seed is -1; pass an integer from 0$"):
        data.digits("cluttered", **COUNTS, seed=-1)
