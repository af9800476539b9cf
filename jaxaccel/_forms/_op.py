"""One call of a primitive, as forms and rules see it."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

import numpy as np

from jaxaccel._forms._conv import Conv, conv_of, out_size, shapes_of

_FLOATS = ("float16", "bfloat16", "float32", "float64")


@dataclass(frozen=True, eq=False)
class Op:
    """One call of a primitive: its operands' shapes and dtypes, and its static parameters."""

    name: str
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[Any, ...]
    params: Mapping[str, Any]

    @cached_property
    def floats(self) -> bool:
        """Whether all operands are of floating point."""
        return all(np.dtype(d).name in _FLOATS for d in self.dtypes)

    @cached_property
    def int8(self) -> bool:
        """Whether it sums products of int8 in int32, or is a maximum of int8."""
        exact = self.name == "reduce_window_max" or (
            self.params.get("preferred_element_type") == np.int32
        )
        return exact and all(d == np.int8 for d in self.dtypes)

    @cached_property
    def conv(self) -> Conv:
        return conv_of(self.params, self.dtypes[0])

    @cached_property
    def images(self) -> tuple[int, ...]:
        """NHWC."""
        return shapes_of(self.params, *self.shapes)[0]

    @cached_property
    def kernel(self) -> tuple[int, ...]:
        """HWIO."""
        return shapes_of(self.params, *self.shapes)[1]

    @cached_property
    def places(self) -> tuple[int, ...]:
        """Height and width of a convolution's result."""
        return out_size(self.images, self.kernel, self.conv)

    @cached_property
    def terms(self) -> int:
        """How many products are summed for one number of the result."""
        return prod(self.kernel[:3]) if self.name == "conv_general_dilated" else 1

    @cached_property
    def summed(self) -> int:
        """Over how many numbers a matrix product without a batch sums; 0 for another one."""
        (left, _), (batch, _) = self.params["dimension_numbers"]
        return self.shapes[0][left[0]] if len(left) == 1 and not batch else 0

    @cached_property
    def free(self) -> list[int]:
        """How many rows and columns a matrix product without a batch has."""
        summed, _ = self.params["dimension_numbers"]
        return [
            prod(n for i, n in enumerate(shape) if i not in axes)
            for shape, axes in zip(self.shapes, summed, strict=True)
        ]

    @cached_property
    def key(self) -> str:
        """Equal for equal calls: what a timing is kept under."""
        operands = zip(self.dtypes, self.shapes, strict=True)
        written = (f"{np.dtype(d).name}[{','.join(map(str, s))}]" for d, s in operands)
        static = (f"{k}={_plain(v)}" for k, v in sorted(self.params.items()) if v is not None)
        return " ".join((self.name, *written, *static))


def _plain(value: Any) -> str:
    """Static parameters as text; NumPy's integers like Python's."""
    if isinstance(value, tuple | list):
        return "(" + ",".join(map(_plain, value)) + ")"
    return getattr(value, "name", None) or str(value)
