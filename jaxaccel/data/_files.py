"""Data sets on disk: MNIST's own files, and prepared TensorFlow Datasets."""

import gzip
import math
import os
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from jaxtyping import UInt8

from jaxaccel.data._arrays import Source, Splits, arrays

_MNIST_VALIDATION = 5_000
_MNIST_SIDE = 28
_MNIST_CLASSES = 10
_MAX_ITEMS = 2_000_000  # above every data set in this format; bounds what a header can ask for
_CHUNK = 1 << 20


def mnist(folder: str | Path) -> Splits:
    """Reads MNIST, or a set in its format such as Fashion-MNIST, from its four files.

    The last 5,000 training images are the validation split. Nothing is downloaded.

    Args:
        folder: Holds train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte and
            t10k-labels-idx1-ubyte; ".idx" for "-idx" and a further ".gz" are found too.

    Returns:
        The `Splits`: uint8 images [n, 28, 28, 1], labels 0..9. MNIST gives 55,000, 5,000, 10,000.

    Raises:
        FileNotFoundError: One of the files is missing.
        ValueError: A file is not what its name says; the message has its path and what is wrong.

    LeCun, Cortes and Burges, "The MNIST database of handwritten digits", 1998.

    >>> mnist("no/such/folder")
    Traceback (most recent call last):
    FileNotFoundError: no/such/folder/train-images-idx3-ubyte: no such file; expected it, or ...
    """
    images, labels = _mnist_part(Path(folder), "train")
    if len(labels) <= _MNIST_VALIDATION:
        raise ValueError(
            f"{folder}: {len(labels)} training images; expected more than the "
            f"{_MNIST_VALIDATION} that become the validation split"
        )
    cut = len(labels) - _MNIST_VALIDATION
    test = _mnist_part(Path(folder), "t10k")
    return Splits(
        arrays(images[:cut], labels[:cut]), arrays(images[cut:], labels[cut:]), arrays(*test)
    )


def _mnist_part(
    folder: Path, part: str
) -> tuple[UInt8[np.ndarray, "n 28 28"], UInt8[np.ndarray, " n"]]:
    image_path = _find(folder, f"{part}-images", "idx3-ubyte")
    label_path = _find(folder, f"{part}-labels", "idx1-ubyte")
    images, labels = _read_idx(image_path, 3), _read_idx(label_path, 1)
    if images.shape[1:] != (_MNIST_SIDE, _MNIST_SIDE):
        raise ValueError(f"{image_path}: images are {images.shape[1:]}; expected (28, 28)")
    if len(images) != len(labels) or len(labels) == 0:
        raise ValueError(
            f"{label_path}: {len(labels)} labels; expected as many as the {len(images)} images "
            f"of {image_path.name}, and at least one"
        )
    if labels.max() >= _MNIST_CLASSES:
        raise ValueError(f"{label_path}: label {labels.max()}; expected 0..{_MNIST_CLASSES - 1}")
    return images, labels


def _find(folder: Path, stem: str, kind: str) -> Path:
    names = [f"{stem}{dot}{kind}{suffix}" for dot in "-." for suffix in ("", ".gz")]
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(f"{folder / names[0]}: no such file; expected it, or {names[1:]}")


def _read_idx(path: Path, rank: int) -> UInt8[np.ndarray, "..."]:
    """Reads one IDX file of bytes, taking no more memory than its header rightly asks for."""
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rb") as stream:
            shape = _idx_shape(path, _read(stream, 4 + 4 * rank), rank)
            _check_size(path, 4 + 4 * rank, shape)
            # One byte more than is right tells a file that is too long.
            body = _read(stream, math.prod(shape) + 1)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path}: not a whole gzip file ({error}); fetch it again") from error
    if len(body) != math.prod(shape):
        found = f"{len(body)}" if len(body) < math.prod(shape) else "more"
        raise ValueError(
            f"{path}: {found} bytes after the header; expected {math.prod(shape)} for {shape}"
        )
    return np.frombuffer(body, np.uint8).reshape(shape)


def _idx_shape(path: Path, header: bytearray, rank: int) -> tuple[int, ...]:
    magic = bytes((0, 0, 8, rank))
    if len(header) < 4 + 4 * rank or header[:4] != magic:
        raise ValueError(
            f"{path}: starts with {header[:4].hex() or 'nothing'}; expected the IDX magic "
            f"{magic.hex()} (bytes, {rank} dimensions) and {rank} sizes"
        )
    shape = tuple(int(size) for size in np.frombuffer(header, ">u4", offset=4))
    if shape[0] > _MAX_ITEMS or math.prod(shape[1:]) > _MNIST_SIDE**2:
        raise ValueError(
            f"{path}: header says {shape}; expected at most {_MAX_ITEMS} items of 28x28"
        )
    return shape


def _check_size(path: Path, header: int, shape: tuple[int, ...]) -> None:
    """A file that is not compressed must have the very size its header announces."""
    expected, found = header + math.prod(shape), os.path.getsize(path)
    if path.suffix != ".gz" and found != expected:
        raise ValueError(f"{path}: {found} bytes; expected {expected} for {shape}")


def _read(stream: gzip.GzipFile | BinaryIO, size: int) -> bytearray:
    """Up to `size` bytes, by chunks: a single read would first allocate `size`."""
    body = bytearray()
    while len(body) < size and (chunk := stream.read(min(_CHUNK, size - len(body)))):
        body += chunk
    return body


@dataclass(frozen=True)
class _Rows:
    """The image and label of each record of a TensorFlow Datasets source."""

    records: Any
    image: str
    label: str

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int, /) -> dict[str, np.ndarray]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        record = self.records[index % len(self)]
        return {"image": np.asarray(record[self.image]), "label": np.asarray(record[self.label])}


def tfds(name: str, split: str, data_dir: str | Path | None = None) -> Source:
    """Opens a prepared TensorFlow Datasets data set for random access, without TensorFlow.

    Nothing is downloaded or prepared. Its features must be named image and label, or its supervised
    keys are taken as (image, label).

    Args:
        name: "mnist", "mnist:3.0.1" or "name/config:1.0.0"; without a version the latest.
        split: For instance "train" or "train[:90%]".
        data_dir: Where it was prepared; None means $TFDS_DATA_DIR or ~/tensorflow_datasets.

    Returns:
        Rows ``{"image", "label"}`` as NumPy, for `stream_loader` or `to_arrays`.

    Raises:
        ImportError: tensorflow-datasets is not installed.
        FileNotFoundError: The data set is not prepared there; the message has the command.
        ValueError: It is prepared in a format without random access, or has no image and label.

    https://www.tensorflow.org/datasets/data_source

    >>> tfds("mnist", "train", "no/such/folder")
    Traceback (most recent call last):
    FileNotFoundError: mnist is not prepared in no/such/folder; run tfds build mnist ...
    """
    try:
        # TFDS survives a failed import of its own, but then lacks its names.
        from tensorflow_datasets import builder_from_directory
    except ImportError as error:
        raise ImportError(
            f"tensorflow-datasets cannot be imported ({error}); pip install 'jaxaccel[experiments]'"
        ) from error
    root = Path(data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()
    command = (
        f"tfds build {name} --data_dir {root} --file_format array_record "
        "(which needs TensorFlow; reading does not)"
    )
    # Not tfds.builder: for a data set that is not prepared it asks the network.
    builder: Any = builder_from_directory(_prepared(root, name, command))
    image, label = _image_and_label(name, builder.info)
    try:
        return _Rows(builder.as_data_source(split), image, label)
    except NotImplementedError as error:  # how TFDS says that the records are TFRecords
        # Without --overwrite the command would find them and do nothing.
        again = command.replace(" --data_dir", " --overwrite --data_dir", 1)
        raise ValueError(f"{name} in {root} has no random access; run {again}") from error


def _prepared(root: Path, name: str, command: str) -> Path:
    """The folder of the version asked for, else of the latest."""
    path, _, version = name.partition(":")
    found = sorted((root / path).glob(f"{version or '*.*.*'}/features.json"), key=_version)
    if not found:
        raise FileNotFoundError(f"{name} is not prepared in {root}; run {command}")
    return found[-1].parent


def _version(features: Path) -> tuple[int, ...]:
    return tuple(int(part) for part in features.parent.name.split(".") if part.isdecimal())


def _image_and_label(name: str, info: Any) -> tuple[str, str]:
    keys = info.supervised_keys
    if {"image", "label"} <= set(info.features):
        return "image", "label"
    if keys and len(keys) == 2 and all(isinstance(key, str) for key in keys):
        return keys
    raise ValueError(
        f"{name} has features {sorted(info.features)} and supervised keys {keys}; expected image "
        "and label, or a pair of keys"
    )
