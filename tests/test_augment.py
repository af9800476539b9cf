"""Augmentations against NumPy, per-pixel loops, and numbers from torchvision."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from scipy import stats

from jaxaccel import augment

KEY = jax.random.key(7)
MODES = ("nearest", "bilinear")


def noise(shape, dtype: Any = np.uint8, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape).astype(dtype)


def turned(image, angle, mode, fill, tie=1e-3):
    """torchvision's rotation one pixel at a time in float64; NaN at ties between pixels."""
    height, width, _ = image.shape
    cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    out = np.empty(image.shape)

    def pixel(row, column):
        within = 0 <= row < height and 0 <= column < width
        return (image[row, column].astype(float), 1.0) if within else (0.0, 0.0)

    for i, j in np.ndindex(height, width):
        dy, dx = i - (height - 1) / 2, j - (width - 1) / 2
        y, x = sin * dx + cos * dy + (height - 1) / 2, cos * dx - sin * dy + (width - 1) / 2
        if mode == "nearest":
            value, within = pixel(math.floor(y + 0.5), math.floor(x + 0.5))
            out[i, j] = value if within else fill
            near = min(abs(y % 1 - 0.5), abs(x % 1 - 0.5)) < tie
            out[i, j] = np.nan if near else out[i, j]
            continue
        mean, share = 0.0, 0.0
        for row in (math.floor(y), math.floor(y) + 1):
            for column in (math.floor(x), math.floor(x) + 1):
                weight = (1 - abs(y - row)) * (1 - abs(x - column))
                value, within = pixel(row, column)
                mean, share = mean + weight * value, share + weight * within
        out[i, j] = share * (mean - fill) + fill
    return out


def angles_of(transform, batch: int, key=KEY):
    """The angles drawn, in degrees, read off a picture of its own coordinates."""
    ramp = np.stack(np.meshgrid(np.arange(9.0), np.arange(9.0)), -1).astype(np.float32)
    out = transform(key, jnp.broadcast_to(ramp, (batch, 9, 9, 2)))
    cos, sin = np.moveaxis(np.asarray(out[:, 4, 5] - out[:, 4, 4]), -1, 0)
    return np.degrees(np.arctan2(sin, cos))


# --- flips


@pytest.mark.parametrize(
    ("transform", "mirror"),
    [
        (augment.random_horizontal_flip, lambda x: x[:, :, ::-1]),
        (augment.random_vertical_flip, lambda x: x[:, ::-1]),
    ],
)
@pytest.mark.parametrize("p", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_each_sample_is_itself_or_its_mirror(transform, mirror, p, dtype):
    images = noise((400, 4, 5, 2), dtype)
    out = np.asarray(transform(p)(KEY, images))
    mirrored = (out == mirror(images)).all((1, 2, 3))
    assert (mirrored ^ (out == images).all((1, 2, 3))).all()
    assert out.dtype == dtype
    low, high = stats.binom.interval(0.9999, 400, p) if 0 < p < 1 else (400 * p, 400 * p)
    assert low <= mirrored.sum() <= high


def test_flips_of_a_chain_are_independent():
    images = noise((400, 3, 4, 1))
    twice = augment.chain(augment.random_horizontal_flip(), augment.random_horizontal_flip())
    changed = np.asarray((twice(KEY, images) != images).any((1, 2, 3)))
    low, high = stats.binom.interval(0.9999, 400, 0.5)
    assert low <= changed.sum() <= high


# --- rotation


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("side", "dtype"), [(1, np.int32), (6, np.uint8), (6, jnp.bfloat16), (7, np.float32)]
)
@pytest.mark.parametrize("quarters", [-1, 0, 1, 2, 3])
def test_right_angles_are_exact(mode, side, dtype, quarters):
    images = noise((2, side, side, 3), dtype)
    rotate = augment.random_rotation((90 * quarters, 90 * quarters), mode, fill=3)
    np.testing.assert_array_equal(rotate(KEY, images), np.rot90(images, quarters, axes=(1, 2)))


@pytest.mark.parametrize("mode", MODES)
def test_half_turn_of_an_oblong_image_is_exact(mode):
    images = noise((2, 4, 7, 1))
    out = augment.random_rotation((180, 180), mode)(KEY, images)
    np.testing.assert_array_equal(out, images[:, ::-1, ::-1])


@settings(max_examples=12)
@given(
    shape=st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 3)),
    angle=st.floats(-400, 400, width=32),
    mode=st.sampled_from(MODES),
    fill=st.sampled_from([0.0, 7.5, 200.0]),
    dtype=st.sampled_from([np.uint8, np.float32]),
)
def test_rotation_is_the_loop_over_pixels(shape, angle, mode, fill, dtype):
    images = noise((1, *shape), dtype)
    out = augment.random_rotation((angle, angle), mode, fill)(KEY, images)
    assert out.dtype == dtype
    expected = turned(images[0], angle, mode, fill)
    known = np.isfinite(expected)
    assume(known.any())
    whole = dtype == np.uint8
    difference = np.abs(np.asarray(out[0], float) - (np.round(expected) if whole else expected))
    assert difference[known].max() <= (1 if whole and mode == "bilinear" else 0.02)


# F.rotate of torchvision 0.28.0 by 33 degrees, of arange(35) * 7 as a 5x7 image of uint8.
NEAREST = [
    [100, 100, 21, 28, 84, 91, 100],
    [7, 14, 70, 77, 126, 133, 189],
    [0, 56, 63, 119, 175, 182, 238],
    [49, 105, 112, 161, 168, 224, 231],
    [100, 147, 154, 210, 217, 100, 100],
]
BILINEAR = [
    [100, 78, 36, 44, 77, 110, 82],
    [49, 17, 49, 82, 114, 147, 164],
    [21, 54, 86, 119, 152, 184, 217],
    [58, 91, 124, 156, 189, 221, 111],
    [76, 128, 161, 194, 152, 89, 100],
]
# The same divided by 100 as float32, with fill=1 in the place of 100.
BILINEAR_FLOAT = [
    [1.0, 0.77582, 0.35972, 0.44435, 0.76993, 1.09551, 0.82009],
    [0.49262, 0.16602, 0.4916, 0.81718, 1.14276, 1.46834, 1.63981],
    [0.21326, 0.53884, 0.86442, 1.19, 1.51558, 1.84116, 2.16674],
    [0.58154, 0.91166, 1.23724, 1.56282, 1.8884, 2.21398, 1.11459],
    [0.76129, 1.28449, 1.61007, 1.93565, 1.52489, 0.88705, 1.0],
]


@pytest.mark.parametrize(("mode", "expected"), [("nearest", NEAREST), ("bilinear", BILINEAR)])
def test_rotation_is_torchvisions(mode, expected):
    image = jnp.arange(35, dtype=jnp.uint8).reshape(1, 5, 7, 1) * 7
    out = augment.random_rotation((33, 33), mode, fill=100)(KEY, image)
    np.testing.assert_array_equal(out[0, :, :, 0], expected)


def test_float_rotation_is_torchvisions():
    image = jnp.arange(35, dtype=jnp.float32).reshape(1, 5, 7, 1) * 0.07
    out = augment.random_rotation((33, 33), "bilinear", fill=1)(KEY, image)
    np.testing.assert_allclose(out[0, :, :, 0], BILINEAR_FLOAT, atol=1e-5)


@pytest.mark.parametrize(("degrees", "low", "high"), [(30, -30, 30), ((10.0, 50.0), 10, 50)])
def test_angles_are_uniform_and_counter_clockwise(degrees, low, high):
    angles = angles_of(augment.random_rotation(degrees, "bilinear"), 500)
    assert low - 1e-3 <= angles.min() < angles.max() <= high + 1e-3
    assert stats.kstest(angles, "uniform", (low, high - low)).pvalue > 1e-3


def test_a_draw_depends_on_the_place_only():
    rotate = augment.random_rotation(30, "bilinear")
    images = noise((16, 5, 6, 1), np.float32)
    out = rotate(KEY, images)
    np.testing.assert_array_equal(rotate(KEY, images[:5]), out[:5])
    np.testing.assert_array_equal(rotate(KEY, np.stack([images[0], *images[:0:-1]]))[0], out[0])
    flip = augment.random_horizontal_flip()
    np.testing.assert_array_equal(flip(KEY, images[:5]), flip(KEY, images)[:5])


def test_bilinear_gradient_is_the_transpose():
    rotate = augment.random_rotation(60, "bilinear")
    images, weights = (noise((3, 5, 6, 2), np.float32, seed) for seed in (1, 2))
    value, gradient = jax.value_and_grad(lambda x: jnp.vdot(rotate(KEY, x), weights))(images)
    # The rotation is linear in the image, so <gradient, images> is the value itself.
    np.testing.assert_allclose(jnp.vdot(gradient, images), value, rtol=1e-4)
    assert float(jnp.abs(gradient).sum(axis=(1, 2, 3)).min()) > 0


# --- all of them

ALL = {
    "horizontal": augment.random_horizontal_flip(),
    "vertical": augment.random_vertical_flip(),
    "nearest": augment.random_rotation(30),
    "bilinear": augment.random_rotation(30, "bilinear", fill=9),
}
ALL["chain"] = augment.chain(*ALL.values())


@pytest.mark.parametrize("name", ALL)
def test_same_key_same_result_compiled_or_not(name):
    images = noise((8, 6, 7, 3))
    out = ALL[name](KEY, images)
    np.testing.assert_array_equal(jax.jit(ALL[name])(KEY, images), out)
    np.testing.assert_array_equal(ALL[name](KEY, images), out)
    assert (np.asarray(ALL[name](jax.random.key(8), images)) != out).any()


@pytest.mark.parametrize("name", ALL)
def test_sharded_equals_single_device(name):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    images = noise((16, 6, 7, 1), np.float32)
    sharded = jax.device_put(images, NamedSharding(mesh, PartitionSpec("data")))
    step = jax.jit(ALL[name])
    out = step(KEY, sharded)
    np.testing.assert_array_equal(out, step(KEY, images))
    assert out.sharding.is_equivalent_to(sharded.sharding, 4)
    # Every device draws for, and looks up in, its own samples only.
    text = step.lower(KEY, sharded).compile().as_text() or ""
    assert "HloModule" in text
    assert not any(word in text for word in ("all-gather", "all-reduce", "all-to-all"))


@settings(max_examples=10)
@given(
    shape=st.tuples(st.integers(0, 4), st.integers(1, 9), st.integers(1, 9), st.integers(1, 4)),
    name=st.sampled_from(sorted(ALL)),
    dtype=st.sampled_from([np.uint8, np.float32, jnp.bfloat16]),
)
def test_shape_and_dtype_stay(shape, name, dtype):
    out = jax.eval_shape(ALL[name], KEY, jax.ShapeDtypeStruct(shape, dtype))
    assert (out.shape, out.dtype) == (shape, dtype)


@pytest.mark.parametrize("name", ALL)
def test_a_batch_dict(name):
    batch = {"image": noise((4, 5, 6, 1)), "label": jnp.arange(4), "mask": jnp.ones(4, bool)}
    given = dict(batch)
    out = ALL[name](KEY, batch)
    assert list(out) == list(batch)
    np.testing.assert_array_equal(out["image"], ALL[name](KEY, batch["image"]))
    assert out["label"] is batch["label"]
    assert out["mask"] is batch["mask"]
    assert all(batch[entry] is given[entry] for entry in given)


def test_an_empty_chain_is_the_identity():
    batch = {"image": noise((2, 3, 3, 1))}
    assert augment.chain()(KEY, batch) is batch


def test_a_chain_applies_in_order_with_split_keys():
    flip, rotate = augment.random_horizontal_flip(), augment.random_rotation(90)
    first, second = jax.random.split(KEY)
    images = noise((8, 5, 5, 1))
    out = augment.chain(flip, rotate)(KEY, images)
    np.testing.assert_array_equal(out, rotate(second, flip(first, images)))


FLIP = augment.random_horizontal_flip()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: augment.random_horizontal_flip(1.5), "p: 1.5; give a probability between 0 and 1"),
        (lambda: augment.random_vertical_flip(-0.1), "p: -0.1; give a probability"),
        (lambda: augment.random_vertical_flip(math.nan), "p: nan; give a probability"),
        (lambda: augment.random_rotation(-5), "degrees: -5; give a number of at least 0"),
        (lambda: augment.random_rotation((9, 3)), r"degrees: \(9, 3\); give a pair \(min, max\)"),
        (lambda: augment.random_rotation(math.inf), "degrees: inf; give finite angles"),
        (lambda: augment.random_rotation((0, math.nan)), r"degrees: \(0, nan\); give finite"),
        (
            lambda: augment.random_rotation((1, 2, 3)),  # pyright: ignore[reportArgumentType]
            r"degrees: \(1, 2, 3\); give a number or a pair \(min, max\)",
        ),
        (
            lambda: augment.random_rotation(5, "cubic"),  # pyright: ignore[reportArgumentType]
            "interpolation: 'cubic'; give 'nearest' or 'bilinear'",
        ),
        (lambda: augment.random_rotation(5, fill=math.nan), "fill: nan; give a finite number"),
        (
            lambda: augment.random_rotation(5, fill=300)(KEY, noise((1, 2, 2, 1))),
            "fill: 300; uint8 images hold 0 to 255",
        ),
        (
            lambda: FLIP(KEY, noise((28, 28, 1))),
            r"image: shape \(28, 28, 1\); give \[batch, height, width, channel\]",
        ),
        (lambda: FLIP(KEY, jnp.ones((1, 2, 2, 1), bool)), "image: bool; give an integer"),
        (lambda: FLIP(KEY, {"x": 0}), r"batch: no 'image' among \['x'\]; rename the entry"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()
