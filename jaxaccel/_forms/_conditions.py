"""What forms ask of a convolution."""

from collections.abc import Callable
from math import prod
from typing import TypeAlias

import jax
import numpy as np

from jaxaccel._forms._op import Op

Condition: TypeAlias = Callable[[Op], bool]

# Every tap or place is an operation of the compiled program: beyond 7x7 compiling costs more than
# it saves.
MAX_TAPS = 49
_MAX_GROUPS = 16  # of channels, with a convolution each
_MAX_PHASES = 9
_THIN = 32  # channels


def holds(condition: Condition, op: Op) -> bool:
    """Not where it depends on a symbolic size."""
    try:
        return condition(op)
    except jax.errors.InconclusiveDimensionOperation:
        return False


def both(*conditions: Condition) -> Condition:
    return lambda op: all(condition(op) for condition in conditions)


def always(op: Op) -> bool:
    return True


def flat(op: Op) -> bool:
    return len(op.params["window_strides"]) in (1, 2)


def sized(op: Op) -> bool:
    return all(map(prod, op.shapes))


def dense(op: Op) -> bool:
    return op.conv.groups == op.conv.batch_groups == 1


def few_taps(op: Op) -> bool:
    return prod(op.kernel[:2]) <= MAX_TAPS


def few_places(op: Op) -> bool:
    """What the gradient of a kernel is: a large window at few places."""
    return prod(op.places) <= MAX_TAPS and prod(op.kernel[:2]) >= prod(op.places)


def several_taps(op: Op) -> bool:
    return 1 < prod(op.kernel[:2]) <= MAX_TAPS


def several_places(op: Op) -> bool:
    return op.places > (1, 1)


def thin(place: int) -> Condition:
    """Few channels into the kernel (2) or out of it (3); with more, XLA's own is no slower."""
    return lambda op: op.kernel[place] <= _THIN


def thin_images(op: Op) -> bool:
    """The same for a kernel's gradient, whose images have the channels first."""
    return op.images[0] <= 2 * _THIN


def each_channel(op: Op) -> bool:
    return op.conv.groups == op.images[3] and op.kernel[2] == op.conv.batch_groups == 1


def each_image(op: Op) -> bool:
    return op.conv.batch_groups == op.images[0] > 1 == op.conv.groups


def few_groups(op: Op) -> bool:
    return 1 < op.conv.groups * op.conv.batch_groups <= _MAX_GROUPS


def no_more_groups(op: Op) -> bool:
    """Not a convolution of each channel alone, which both of XLA:CPU's libraries do badly."""
    return op.conv.groups * op.conv.batch_groups <= _MAX_GROUPS


def gaps(op: Op) -> bool:
    """Images spread by their dilation, under a kernel that is not, which moves by one."""
    spread, ones = op.conv.lhs_dilation, op.conv.strides + op.conv.rhs_dilation
    return 1 < prod(spread) <= _MAX_PHASES and set(ones) == {1}


def close(op: Op) -> bool:
    """Images that are not spread."""
    return op.conv.lhs_dilation == (1, 1)


def by_one(op: Op) -> bool:
    return op.conv.strides == (1, 1)


def single(op: Op) -> bool:
    """A dtype that XLA:CPU gives to one of two libraries."""
    return op.dtypes[0] == np.float32 and op.conv.dtype == np.float32


def one_tap(op: Op) -> bool:
    return dense(op) and op.kernel[:2] == (1, 1)


def depthwise(op: Op) -> bool:
    return each_channel(op) and few_taps(op)


def taps(op: Op) -> bool:
    """Several taps that a form may take one by one."""
    return dense(op) and several_taps(op)
