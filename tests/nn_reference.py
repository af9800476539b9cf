"""Layers in NumPy and SciPy: one image and one channel at a time, in float64."""

import numpy as np
from scipy.signal import correlate


def numpy_conv(x, layer, groups=1) -> np.ndarray:
    """VALID convolution of stride 1."""
    kernel = np.asarray(layer.kernel[...], np.float64)
    batch, out = x.shape[0], kernel.shape[3]
    share = out // groups
    rows, columns = (n - k + 1 for n, k in zip(x.shape[1:3], kernel.shape, strict=False))
    y = np.zeros((batch, rows, columns, out))
    for b, o, i in np.ndindex(batch, out, kernel.shape[2]):
        plane = x[b, :, :, o // share * kernel.shape[2] + i]
        y[b, :, :, o] += correlate(plane, kernel[:, :, i, o], "valid")
    return y if layer.bias is None else y + np.asarray(layer.bias[...])


def numpy_pool(x, side=2):
    rows, columns = x.shape[1] // side, x.shape[2] // side
    return np.stack(
        [
            np.stack(
                [
                    x[:, side * i : side * (i + 1), side * j : side * (j + 1)].max((1, 2))
                    for j in range(columns)
                ],
                1,
            )
            for i in range(rows)
        ],
        1,
    )


def numpy_norm(x, norm):
    scale, bias, mean, var = (
        np.asarray(v[...], np.float64) for v in (norm.scale, norm.bias, norm.mean, norm.var)
    )
    return (x - mean) / np.sqrt(var + 1e-5) * scale + bias


def numpy_dense(x, layer):
    return x @ np.asarray(layer.kernel[...], np.float64) + np.asarray(layer.bias[...])


def relu(x):
    return np.maximum(x, 0)


def numpy_separable(x, layer):
    x = relu(numpy_conv(x, layer.depthwise, groups=x.shape[3]))
    return relu(numpy_conv(x, layer.pointwise))


def numpy_convnet(x, model):
    x = relu(numpy_pool(numpy_conv(x, model.conv1)))
    if hasattr(model, "conv2"):
        conv = numpy_separable if hasattr(model.conv2, "depthwise") else numpy_conv
        x = relu(numpy_pool(conv(x, model.conv2)))
    x = x.reshape(len(x), -1)
    for name in ("dense1", "dense2"):
        if hasattr(model, name):
            x = relu(numpy_dense(x, getattr(model, name)))
    return numpy_dense(x, model.classifier)
