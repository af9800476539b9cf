"""A function as a model of ONNX: float, or 8-bit integers with their scales."""

from jaxaccel.export._onnx._model import checked as checked
from jaxaccel.export._onnx._model import model as model
from jaxaccel.export._onnx._model import onnx as onnx
from jaxaccel.export._onnx._model import written as written
