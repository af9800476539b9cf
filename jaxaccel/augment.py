"""Random image transforms for a whole batch on the device, with torchvision's names and meaning.

Each is a pure function ``(key, batch) -> batch`` for use inside a compiled step, and each sample
draws its own randomness: the draw depends on the key and the sample's place in the batch only,
not on the number of devices. A batch is an image array ``[batch, height, width, channel]``,
integer or float, or a dict with one under ``"image"``, whose other entries pass through.

>>> import jax, jax.numpy as jnp
>>> augment = chain(random_horizontal_flip(), random_rotation(15))
>>> batch = {"image": jnp.zeros((8, 28, 28, 1), jnp.uint8), "label": jnp.arange(8)}
>>> batch = jax.jit(augment)(jax.random.key(0), batch)
>>> batch["image"].shape, batch["image"].dtype
((8, 28, 28, 1), dtype('uint8'))
"""

import math
from collections.abc import Callable, Mapping
from itertools import product
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num, PRNGKeyArray, Scalar

Images = Num[Array, "batch height width channel"]
Image = Num[Array, "height width channel"]
Coordinates = Float[Array, "height width"]
Transform = Callable[[PRNGKeyArray, Any], Any]
Interpolation = Literal["nearest", "bilinear"]


def chain(*transforms: Transform) -> Transform:
    """Applies transforms one after the other, each with a key of its own.

    Args:
        *transforms: functions ``(key, batch) -> batch``; none of them is the identity.

    Returns:
        A function ``(key, batch) -> batch``.

    >>> import jax, jax.numpy as jnp
    >>> both = chain(random_horizontal_flip(1.0), random_vertical_flip(1.0))
    >>> both(jax.random.key(0), jnp.arange(4).reshape(1, 2, 2, 1))[0, :, :, 0]
    Array([[3, 2],
           [1, 0]], dtype=int32)
    """

    def apply(key: PRNGKeyArray, batch: Any) -> Any:
        for own, transform in zip(jax.random.split(key, len(transforms)), transforms, strict=True):
            batch = transform(own, batch)
        return batch

    return apply


def random_horizontal_flip(p: float = 0.5) -> Transform:
    """Mirrors each image left to right with probability ``p`` (RandomHorizontalFlip).

    Args:
        p: a probability in [0, 1].

    Returns:
        A function ``(key, batch) -> batch``.

    Raises:
        ValueError: for ``p`` outside [0, 1].

    >>> import jax, jax.numpy as jnp
    >>> random_horizontal_flip(1.0)(jax.random.key(0), jnp.arange(3).reshape(1, 1, 3, 1)).ravel()
    Array([2, 1, 0], dtype=int32)
    """
    return _random_flip(p, axis=2)


def random_vertical_flip(p: float = 0.5) -> Transform:
    """Mirrors each image top to bottom with probability ``p`` (RandomVerticalFlip).

    Args:
        p: a probability in [0, 1].

    Returns:
        A function ``(key, batch) -> batch``.

    Raises:
        ValueError: for ``p`` outside [0, 1].

    >>> import jax, jax.numpy as jnp
    >>> random_vertical_flip(1.0)(jax.random.key(0), jnp.arange(3).reshape(1, 3, 1, 1)).ravel()
    Array([2, 1, 0], dtype=int32)
    """
    return _random_flip(p, axis=1)


def random_rotation(
    degrees: float | tuple[float, float],
    interpolation: Interpolation = "nearest",
    fill: float = 0.0,
) -> Transform:
    """Rotates each image about its centre by a random angle (RandomRotation).

    The image keeps its size; what comes from outside it is ``fill``. Angles are uniform and
    counter-clockwise; multiples of 90 degrees are exact. Integer images are interpolated in
    float32 and rounded half to even. Bilinear results are torchvision's, at the border too: the
    mean there takes the outside as 0, and is then blended with ``fill`` by the share inside.
    Nearest results are too, but for places exactly between two pixels, where rounding decides.

    Args:
        degrees: the range of angles, ``(min, max)``, or a number d for ``(-d, d)``.
        interpolation: ``"nearest"`` or ``"bilinear"``.
        fill: the value of pixels from outside, in the unit of the image.

    Returns:
        A function ``(key, batch) -> batch``.

    Raises:
        ValueError: for a negative or non-finite angle, a range with min > max, an unknown
            interpolation, a fill that is not finite or that the image's type does not hold.

    >>> import jax, jax.numpy as jnp
    >>> quarter_turn = random_rotation((90, 90))
    >>> quarter_turn(jax.random.key(0), jnp.arange(4).reshape(1, 2, 2, 1))[0, :, :, 0]
    Array([[1, 3],
           [0, 2]], dtype=int32)
    """
    low, high = _range(degrees)
    if interpolation not in ("nearest", "bilinear"):
        raise ValueError(f"interpolation: {interpolation!r}; give 'nearest' or 'bilinear'")
    if not math.isfinite(fill):
        raise ValueError(f"fill: {fill!r}; give a finite number")
    sample = _nearest if interpolation == "nearest" else _bilinear

    def rotate(key: PRNGKeyArray, images: Images) -> Images:
        _check_fill(fill, images.dtype)
        angles = jax.random.uniform(key, images.shape[:1], jnp.float32, low, high)
        return jax.vmap(lambda image, angle: _rotate(image, angle, sample, fill))(images, angles)

    return _on_images(rotate)


def _on_images(transform: Callable[[PRNGKeyArray, Images], Images]) -> Transform:
    """The same transform for a bare image array and for a batch dict."""
    compiled = jax.jit(transform)  # for calls outside of a compiled step

    def apply(key: PRNGKeyArray, batch: Any) -> Any:
        if not isinstance(batch, Mapping):
            return compiled(key, _checked(batch))
        if "image" not in batch:
            raise ValueError(f"batch: no 'image' among {sorted(batch)}; rename the entry")
        return {**batch, "image": compiled(key, _checked(batch["image"]))}

    return apply


def _checked(image: Any) -> Images:
    image = jnp.asarray(image)
    if image.ndim != 4:
        raise ValueError(f"image: shape {image.shape}; give [batch, height, width, channel]")
    if not any(jnp.issubdtype(image.dtype, kind) for kind in (jnp.integer, jnp.floating)):
        raise ValueError(f"image: {image.dtype}; give an integer (such as uint8) or float array")
    return image


def _random_flip(p: float, axis: int) -> Transform:
    if not 0 <= p <= 1:
        raise ValueError(f"p: {p!r}; give a probability between 0 and 1")

    def flip(key: PRNGKeyArray, images: Images) -> Images:
        chosen = jax.random.bernoulli(key, p, (len(images), 1, 1, 1))
        return jnp.where(chosen, jnp.flip(images, axis), images)

    return _on_images(flip)


def _range(degrees: float | tuple[float, float]) -> tuple[float, float]:
    pair = isinstance(degrees, tuple | list)
    ends = tuple(degrees) if isinstance(degrees, tuple | list) else (-degrees, degrees)
    if len(ends) != 2:
        raise ValueError(f"degrees: {degrees!r}; give a number or a pair (min, max)")
    if not all(map(math.isfinite, ends)):
        raise ValueError(f"degrees: {degrees!r}; give finite angles")
    if ends[0] > ends[1]:
        fix = "a pair (min, max) with min <= max" if pair else "a number of at least 0"
        raise ValueError(f"degrees: {degrees!r}; give {fix}")
    return ends


def _check_fill(fill: float, dtype: Any) -> None:
    if jnp.issubdtype(dtype, jnp.integer):
        span = jnp.iinfo(dtype)
        if not span.min <= fill <= span.max:
            raise ValueError(f"fill: {fill!r}; {dtype} images hold {span.min} to {span.max}")


def _rotate(
    image: Image, angle: Float[Scalar, ""], sample: Callable[..., Image], fill: float
) -> Image:
    """Each output pixel looks up the place that the rotation brings to it."""
    height, width, _ = image.shape
    middle_y, middle_x = (height - 1) / 2, (width - 1) / 2
    y = jnp.arange(height, dtype=jnp.float32)[:, None] - middle_y
    x = jnp.arange(width, dtype=jnp.float32)[None, :] - middle_x
    cos, sin = _cos_sin(angle)
    return sample(image, y * cos + x * sin + middle_y, x * cos - y * sin + middle_x, fill)


def _cos_sin(degrees: Float[Scalar, ""]) -> tuple[Float[Scalar, ""], Float[Scalar, ""]]:
    """Cosine and sine by quadrant, so that those of right angles are exact."""
    quarters = jnp.round(degrees / 90)
    rest = jnp.deg2rad(degrees - 90 * quarters)
    cos, sin = jnp.cos(rest), jnp.sin(rest)
    turn = quarters.astype(jnp.int32) % 4
    return jnp.stack([cos, -sin, -cos, sin])[turn], jnp.stack([sin, cos, -sin, -cos])[turn]


def _nearest(image: Image, y: Coordinates, x: Coordinates, fill: float) -> Image:
    return _look_up(
        _framed(image, _cast(jnp.float32(fill), image.dtype)), jnp.round(y), jnp.round(x)
    )


def _bilinear(image: Image, y: Coordinates, x: Coordinates, fill: float) -> Image:
    framed = _framed(image.astype(jnp.promote_types(image.dtype, jnp.float32)), 0)
    top, left = jnp.floor(y), jnp.floor(x)
    rows = ((top, top + 1 - y), (top + 1, y - top))
    columns = ((left, left + 1 - x), (left + 1, x - left))
    mean = sum(
        (down * across)[..., None] * _look_up(framed, row, column)
        for (row, down), (column, across) in product(rows, columns)
    )
    inside = _inside(y, image.shape[0]) * _inside(x, image.shape[1])
    return _cast(inside[..., None] * (mean - fill) + fill, image.dtype)


def _cast(values: Float[Array, "..."], dtype: Any) -> Num[Array, "..."]:
    """Integers are rounded, a half to the even one, as torchvision does."""
    return (jnp.round(values) if jnp.issubdtype(dtype, jnp.integer) else values).astype(dtype)


def _framed(image: Image, value: Any) -> Image:
    """The image in a frame of one pixel, which is where `_look_up` finds the outside."""
    return jnp.pad(image, ((1, 1), (1, 1), (0, 0)), constant_values=value)


def _look_up(framed: Image, y: Coordinates, x: Coordinates) -> Image:
    at = _place(y, framed.shape[0]), _place(x, framed.shape[1])
    # The places are in bounds: the default mode would check each of them again.
    return framed.at[at].get(mode="promise_in_bounds")


def _place(coordinate: Coordinates, size: int) -> Int[Array, "height width"]:
    return jnp.clip(coordinate + 1, 0, size - 1).astype(jnp.int32)


def _inside(coordinate: Coordinates, size: int) -> Coordinates:
    """The share of the two nearest pixels' weight that lies within the image."""
    return jnp.clip(jnp.minimum(coordinate + 1, size - coordinate), 0, 1)
