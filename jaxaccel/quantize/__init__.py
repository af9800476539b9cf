"""Weights and whole functions in 8 bits and fewer."""

from jaxaccel.quantize._equalize import equalize as equalize
from jaxaccel.quantize._fake import fake as fake
from jaxaccel.quantize._mixed import mixed as mixed
from jaxaccel.quantize._mixed import sensitivity as sensitivity
from jaxaccel.quantize._qtensor import QTensor as QTensor
from jaxaccel.quantize._qtensor import dequantize as dequantize
from jaxaccel.quantize._transform import int8 as int8
from jaxaccel.quantize._weights import weights as weights
