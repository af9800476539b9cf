"""Labelled images in memory."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol, SupportsIndex

import jax.numpy as jnp
import numpy as np
from jaxtyping import Int, Int32, Shaped


class Source(Protocol):
    """Random access to labelled images: a length, and rows ``{"image", "label"}`` by index."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> dict[str, np.ndarray]: ...


@dataclass(frozen=True, eq=False)
class Arrays:
    """Labelled images in memory; `jaxaccel.data.arrays` builds a validated one.

    Indexing with an integer, a slice or an integer array gives ``{"image", "label"}``.

    Args:
        image: uint8 or float, [n, height, width, channel].
        label: int32, [n], from 0.
    """

    image: Shaped[np.ndarray, "n height width channel"]
    label: Int32[np.ndarray, " n"]

    def __len__(self) -> int:
        return len(self.label)

    def __getitem__(
        self, index: SupportsIndex | slice | Int[np.ndarray, "..."], /
    ) -> dict[str, np.ndarray]:
        return {"image": self.image[index], "label": self.label[index]}

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        return (self[row] for row in range(len(self)))

    def __repr__(self) -> str:
        return f"Arrays(image={self.image.dtype}{list(self.image.shape)}, label=int32[{len(self)}])"


class Splits(NamedTuple):
    """Three disjoint sets: fit on `train`, choose on `validation`, read `test` once."""

    train: Arrays
    validation: Arrays
    test: Arrays


def arrays(x: Shaped[np.ndarray, "n ..."], y: Shaped[np.ndarray, " n"]) -> Arrays:
    """Checks images and labels, and joins them without a copy where the types already fit.

    Args:
        x: Images, uint8 or finite floats, [n, height, width] or [n, height, width, channel].
            float64 becomes float32, as on the device.
        y: Integer class labels from 0, [n].

    Returns:
        The `Arrays`: images with a channel axis, int32 labels.

    Raises:
        ValueError: The shapes, types or values are not as above.

    >>> arrays(np.zeros((3, 8, 8), np.uint8), np.arange(3))
    Arrays(image=uint8[3, 8, 8, 1], label=int32[3])
    """
    image, label = _images(np.asarray(x)), _labels(np.asarray(y))
    if len(image) != len(label):
        raise ValueError(f"x has {len(image)} images but y has {len(label)} labels; pass one each")
    return Arrays(image, label)


def to_arrays(source: Source) -> Arrays:
    """Reads a whole source into memory, for instance for `device_loader`.

    Args:
        source: Rows ``{"image", "label"}`` whose images share one shape.

    Returns:
        The validated `Arrays`, in the order of the source.

    Raises:
        ValueError: The source is empty, or its images differ in shape.

    >>> to_arrays([{"image": np.zeros((8, 8, 1), np.uint8), "label": 4}])
    Arrays(image=uint8[1, 8, 8, 1], label=int32[1])
    """
    return read(source, range(len(source)))


def read(source: Source, rows: Iterable[int]) -> Arrays:
    """Reads the rows asked for, one by one."""
    read_rows = [source[row] for row in rows]
    if not read_rows:
        raise ValueError("source is empty; give it at least one row")
    images = [np.asarray(row["image"]) for row in read_rows]
    for image in images:
        if image.shape != images[0].shape:
            raise ValueError(
                f"source has images of shape {images[0].shape} and {image.shape}; "
                "resize them to one shape"
            )
    return arrays(np.stack(images), np.asarray([row["label"] for row in read_rows]))


def _images(x: np.ndarray) -> np.ndarray:
    if x.ndim not in (3, 4) or x.size == 0:
        raise ValueError(
            f"x has shape {x.shape}; pass non-empty [n, height, width] or [.., channel]"
        )
    image = x[..., None] if x.ndim == 3 else x
    if image.dtype == np.uint8:
        return image
    if not jnp.issubdtype(image.dtype, jnp.floating):
        raise ValueError(f"x has dtype {x.dtype}; pass uint8 or float images")
    if not np.isfinite(image).all():
        raise ValueError("x holds NaN or infinity; pass finite images")
    return image.astype(np.float32) if image.dtype == np.float64 else image


def _labels(y: np.ndarray) -> np.ndarray:
    if y.ndim != 1:
        raise ValueError(f"y has shape {y.shape}; pass one label per image, [n]")
    if not np.issubdtype(y.dtype, np.integer):
        raise ValueError(f"y has dtype {y.dtype}; pass integer labels")
    if y.size and (y.min() < 0 or y.max() > np.iinfo(np.int32).max):
        raise ValueError(f"y spans {y.min()}..{y.max()}; pass labels from 0 that fit int32")
    return y.astype(np.int32, copy=False)
