"""Affine chains folded into the kernels beside them: batch norm, layer scale, normalisation.

`batchnorm` reads the traced function, not the framework: Flax, Haiku, Equinox, Keras and
hand-written networks alike.
"""

from jaxaccel.fold._report import Report as Report
from jaxaccel.fold._transform import Folded as Folded
from jaxaccel.fold._transform import batchnorm as batchnorm
