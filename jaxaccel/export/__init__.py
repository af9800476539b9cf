"""Functions that leave Python: saved, loaded without their code, and run by other engines."""

from jaxaccel.export._engines import Compiled as Compiled
from jaxaccel.export._engines import compile as compile
from jaxaccel.export._load import Loaded as Loaded
from jaxaccel.export._load import load as load
from jaxaccel.export._load import manifest as manifest
from jaxaccel.export._load import params as params
from jaxaccel.export._manifest import Manifest as Manifest
from jaxaccel.export._onnx import onnx as onnx
from jaxaccel.export._save import save as save
