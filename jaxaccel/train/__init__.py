"""Training: the Accelerator and what it returns."""

from jaxaccel.train._accelerator import Accelerator as Accelerator
from jaxaccel.train._accelerator import Epoch as Epoch
from jaxaccel.train._step import Metrics as Metrics
