"""Small image networks, for training from scratch and for the transforms to work on.

Every model is a plain `flax.nnx.Module` for float images in NHWC, with ``model.train()`` and
``model.eval()`` for dropout and batch norm. Kernels before a relu start from He's normal
distribution (He et al. 2015, https://arxiv.org/abs/1502.01852), classifiers from flax's default.
Batch norm has torchvision's epsilon (1e-5) and momentum (0.9 of the old statistics are kept).
Convolutions and max pooling take the form that the rules of `jaxaccel.autotune` choose.
"""

from jaxaccel.nn._convnet import MLP as MLP
from jaxaccel.nn._convnet import ConvNet as ConvNet
from jaxaccel.nn._layers import BatchNorm as BatchNorm
from jaxaccel.nn._layers import ConvReLU as ConvReLU
from jaxaccel.nn._layers import DepthwiseSeparable as DepthwiseSeparable
from jaxaccel.nn._residual import MobileNet as MobileNet
from jaxaccel.nn._residual import ResNet as ResNet
