"""jaxaccel: make JAX networks train faster and ship smaller, with the measured proof.

This file is the table of contents. Every name loads on first use, so that ``import jaxaccel``
itself imports neither flax nor optax.

>>> import jaxaccel as jx
>>> sorted(name for name in dir(jx) if not name.startswith("_"))
['Accelerator', 'Recipe', 'augment', 'autotune', 'check_rule', 'compress', 'data', 'distill',
 'export', 'fold', 'functional', 'groups', 'measure', 'nn', 'prune', 'quantize', 'register_rule']
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaxaccel import augment as augment
    from jaxaccel import data as data
    from jaxaccel import distill as distill
    from jaxaccel import export as export
    from jaxaccel import fold as fold
    from jaxaccel import measure as measure
    from jaxaccel import nn as nn
    from jaxaccel import prune as prune
    from jaxaccel import quantize as quantize
    from jaxaccel._autotune import autotune as autotune
    from jaxaccel._check_rule import check_rule as check_rule
    from jaxaccel._compress import Recipe as Recipe
    from jaxaccel._compress import compress as compress
    from jaxaccel._functional import functional as functional
    from jaxaccel._groups import groups as groups
    from jaxaccel._rules import register_rule as register_rule
    from jaxaccel.train import Accelerator as Accelerator

__version__ = "0.1.0"

_MODULES = ("augment", "data", "distill", "export", "fold", "measure", "nn", "prune", "quantize")
_NAMES = {
    "Accelerator": "train",
    "Recipe": "_compress",
    "autotune": "_autotune",
    "check_rule": "_check_rule",
    "compress": "_compress",
    "functional": "_functional",
    "groups": "_groups",
    "register_rule": "_rules",
}


def __getattr__(name: str):
    if name in _MODULES:
        return import_module(f"jaxaccel.{name}")
    if name in _NAMES:
        return getattr(import_module(f"jaxaccel.{_NAMES[name]}"), name)
    raise AttributeError(f"module 'jaxaccel' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*_MODULES, *_NAMES, "__version__"]
