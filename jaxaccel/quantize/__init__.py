"""Weights and whole functions in 8 bits and fewer."""

from jaxaccel.quantize._qtensor import QTensor as QTensor
from jaxaccel.quantize._qtensor import dequantize as dequantize
from jaxaccel.quantize._qtensor import weights as weights
