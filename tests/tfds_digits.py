"""A small TensorFlow Datasets data set, prepared without TensorFlow.

TFDS wants its builders in an importable module, and never beside another of the same name.
"""

import io
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

ROWS = 20


def picture(row: int) -> np.ndarray:
    """An image that names its row in every pixel."""
    return (np.arange(6 * 5).reshape(6, 5, 1) * 7 + row).astype(np.uint8)


class _Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    VERSION = tfds.core.Version("1.0.0")

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(0), "test": self._generate_examples(100)}

    def _generate_examples(self, start):
        names: Any = self.info.supervised_keys
        for row in range(start, start + ROWS):
            yield row, dict(zip(names, (self._encode(picture(row)), row % 10), strict=True))

    def _encode(self, image):
        return image


class TensorDigits(_Builder, skip_registration=True):
    """Raw arrays under names of their own, found through the supervised keys."""

    VERSION = tfds.core.Version("1.2.0")

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(
                {
                    "picture": tfds.features.Tensor(shape=(6, 5, 1), dtype=np.uint8),
                    "digit": tfds.features.ClassLabel(num_classes=10),
                }
            ),
            supervised_keys=("picture", "digit"),
        )


class PngDigits(_Builder, skip_registration=True):
    """PNG images under the usual names; TFDS itself would encode them with TensorFlow."""

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(6, 5, 1)),
                    "label": tfds.features.ClassLabel(num_classes=10),
                }
            ),
            supervised_keys=("image", "label"),
        )

    def _encode(self, image):
        file = io.BytesIO()
        Image.fromarray(image[..., 0]).save(file, "png")
        return file.getvalue()


def prepare(folder: str) -> None:
    """Writes both data sets; none is registered, so that reading uses the files alone."""
    for builder in (TensorDigits, PngDigits):
        builder(data_dir=folder, file_format="array_record").download_and_prepare(
            download_config=tfds.download.DownloadConfig(try_download_gcs=False)
        )
