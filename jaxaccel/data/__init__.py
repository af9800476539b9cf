"""Data: sources of labelled images, loaders of batches, and prefetching to the device.

A source has a length and rows ``{"image", "label"}``: `digits` (offline), `mnist` (its files),
`tfds` (prepared TensorFlow Datasets) or `arrays` (your own). A loader gives batches
``{"image", "label", "mask"}`` of one shape; `prefetch` moves them to the device ahead of use.

>>> from jaxaccel import data
>>> train = data.device_loader(data.digits().train, 128)
>>> batch = next(iter(train))
>>> len(train), batch["image"].shape, batch["image"].dtype
(10, (128, 28, 28, 1), dtype('uint8'))
"""

from jaxaccel.data._arrays import Arrays as Arrays
from jaxaccel.data._arrays import Source as Source
from jaxaccel.data._arrays import Splits as Splits
from jaxaccel.data._arrays import arrays as arrays
from jaxaccel.data._arrays import to_arrays as to_arrays
from jaxaccel.data._digits import digits as digits
from jaxaccel.data._files import mnist as mnist
from jaxaccel.data._files import tfds as tfds
from jaxaccel.data._loaders import Loader as Loader
from jaxaccel.data._loaders import device_loader as device_loader
from jaxaccel.data._loaders import stream_loader as stream_loader
from jaxaccel.data._prefetch import Prefetch as Prefetch
from jaxaccel.data._prefetch import prefetch as prefetch
