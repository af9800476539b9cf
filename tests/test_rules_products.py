"""The rules of convolutions and other products."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxaccel as jx
from tests.rules import case, check, shape

IMAGES = (2, 4, 4, 3)
NHWC = ("NHWC", "HWIO", "NHWC")
SLIDES = "slides over it"
IN, OUT = ("free", SLIDES, SLIDES, "free"), (SLIDES, SLIDES, "free", "free")
DEPTHWISE = (SLIDES, SLIDES, "whole", "free")
SUMS = "sums over"


def conv(layout: tuple[str, str, str] = NHWC, strides=None, padding: Any = "SAME", **how: Any):
    strides = strides or (1,) * (len(layout[0]) - 2)
    how = {"dimension_numbers": layout, **how}
    return lambda x, kernel: lax.conv_general_dilated(x, kernel, strides, padding, **how)


def kernel_gradient(kernel: tuple[int, ...], **how: Any) -> Callable:
    """Of images and a cotangent."""
    return lambda x, g: jax.vjp(lambda k: conv(**how)(x, k), jnp.zeros(kernel))[1](g)


def input_gradient(images: tuple[int, ...], **how: Any) -> Callable:
    """Of a kernel and a cotangent."""
    return lambda k, g: jax.vjp(lambda x: conv(**how)(x, k), jnp.zeros(images))[1](g)


def transposed(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return lax.conv_transpose(x, kernel, (2, 2), "SAME", dimension_numbers=NHWC)


def of(constant: tuple[int, ...], fn: Callable) -> Callable:
    """`fn` of a constant and the parameter."""
    values = jnp.asarray(np.random.default_rng(0).normal(size=constant), "float32")
    return lambda x: fn(values, x)


def swapped(fn: Callable) -> Callable:
    return lambda x, y: fn(y, x)


PAIRS: dict[str, Any] = {"feature_group_count": 2}
EACH: dict[str, Any] = {"feature_group_count": 4}
BLUE = (2, 4, 4, 4)

CONVOLUTIONS = [
    case("NHWC", conv(), [IMAGES, (3, 3, 3, 4)], IN, OUT, classes=2 + 3 + 4),
    case(
        "NCHW",
        conv(("NCHW", "OIHW", "NCHW")),
        [(2, 3, 4, 4), (4, 3, 3, 3)],
        ("free", "free", SLIDES, SLIDES),
        ("free", "free", SLIDES, SLIDES),
        classes=9,
    ),
    case(
        "mixed layouts",
        conv(("HWNC", "OHWI", "NCHW")),
        [(4, 4, 2, 3), (4, 3, 3, 3)],
        (SLIDES, SLIDES, "free", "free"),
        ("free", SLIDES, SLIDES, "free"),
        classes=9,
    ),
    case(
        "1D",
        conv(("NWC", "WIO", "NWC")),
        [(2, 6, 3), (3, 3, 4)],
        ("free", SLIDES, "free"),
        (SLIDES, "free", "free"),
    ),
    case(
        "3D",
        conv(("NDHWC", "DHWIO", "NDHWC")),
        [(2, 3, 3, 3, 3), (2, 2, 2, 3, 4)],
        ("free", SLIDES, SLIDES, SLIDES, "free"),
        (SLIDES, SLIDES, SLIDES, "free", "free"),
    ),
    case("strides", conv(strides=(2, 1), padding="VALID"), [(2, 5, 5, 3), (3, 3, 3, 4)], IN, OUT),
    case("dilated kernel", conv(rhs_dilation=(2, 2)), [IMAGES, (3, 3, 3, 4)], IN, OUT),
    case(
        "dilated images",
        conv(lhs_dilation=(2, 2), padding=((1, 1), (1, 1))),
        [IMAGES, (3, 3, 3, 4)],
        IN,
        OUT,
    ),
    case("transposed", transposed, [IMAGES, (3, 3, 3, 4)], IN, OUT),
    case("groups", conv(**PAIRS), [(2, 4, 4, 8), (3, 3, 4, 6)], IN, OUT, classes=2 + 4 + 3),
    case("depthwise", conv(**EACH), [BLUE, (3, 3, 1, 4)], IN, DEPTHWISE, classes=2 + 4),
    case("depthwise, 2 each", conv(**EACH), [BLUE, (3, 3, 1, 8)], IN, DEPTHWISE, classes=2 + 4),
    case("constant images", of(IMAGES, conv()), [(3, 3, 3, 4)], OUT),
    case("constant images, depthwise", of(BLUE, conv(**EACH)), [(3, 3, 1, 4)], DEPTHWISE),
    case("constant kernel", of((3, 3, 3, 4), swapped(conv())), [IMAGES], IN),
    case("constant kernel, groups", of((3, 3, 4, 6), swapped(conv(**PAIRS))), [(2, 4, 4, 8)], IN),
    case("constant kernel, depthwise", of((3, 3, 1, 8), swapped(conv(**EACH))), [BLUE], IN),
    case(
        "a kernel of ones, groups",
        lambda x, b: conv(**PAIRS)(x, jnp.ones((3, 3, 4, 6))) + b.reshape(1, 1, 1, 6),
        [(2, 4, 4, 8), (6,)],
        IN,
        "free",
    ),
    case("kernel gradient", kernel_gradient((3, 3, 3, 4)), [IMAGES, BLUE], IN, IN, classes=9),
    case("input gradient", input_gradient(IMAGES), [(3, 3, 3, 4), BLUE], OUT, IN, classes=9),
    case(
        "kernel gradient, strides",
        kernel_gradient((3, 3, 3, 4), strides=(2, 2)),
        [IMAGES, (2, 2, 2, 4)],
        IN,
        IN,
    ),
    case(
        "input gradient, strides",
        input_gradient(IMAGES, strides=(2, 2)),
        [(3, 3, 3, 4), (2, 2, 2, 4)],
        OUT,
        IN,
    ),
    case(
        "kernel gradient, groups",
        kernel_gradient((3, 3, 2, 6), **PAIRS),
        [BLUE, (2, 4, 4, 6)],
        ("free", SLIDES, SLIDES, "groups it along the batch"),
        ("free", SLIDES, SLIDES, "groups it along the batch"),
    ),
    case(
        "input gradient, groups",
        input_gradient((2, 4, 4, 8), **PAIRS),
        [(3, 3, 4, 6), (2, 4, 4, 6)],
        OUT,
        IN,
        classes=9,
    ),
    case(
        "kernel gradient, depthwise",
        kernel_gradient((3, 3, 1, 4), **EACH),
        [BLUE, BLUE],
        IN,
        IN,
        classes=2 + 4,
    ),
    case(
        "kernel gradient, depthwise, 2 each",
        kernel_gradient((3, 3, 1, 8), **EACH),
        [BLUE, (2, 4, 4, 8)],
        IN,
        IN,
        classes=2 + 4,
    ),
    # Merely conservative: whole groups could go, or the constant could be cut.
    case(
        "input gradient, depthwise, 2 each",
        input_gradient(BLUE, **EACH),
        [(3, 3, 1, 8), (2, 4, 4, 8)],
        DEPTHWISE,
        IN,
        classes=2 + 2,
    ),
    case(
        "constant images, depthwise, 2 each",
        of(BLUE, conv(**EACH)),
        [(3, 3, 1, 8)],
        (SLIDES, SLIDES, "whole", "stays whole"),
    ),
    case(
        "constant images, groups",
        of((2, 4, 4, 8), conv(**PAIRS)),
        [(3, 3, 4, 6)],
        (SLIDES, SLIDES, "stays whole", "free"),
    ),
    case("a single tap", conv(), [IMAGES, (1, 1, 3, 4)], IN, ("whole", "whole", "free", "free")),
]


def dot(contract: Any, batch: Any = ((), ())) -> Callable:
    return lambda a, b: lax.dot_general(a, b, (contract, batch))


def ragged(x: jax.Array, w: jax.Array) -> jax.Array:
    return lax.ragged_dot(x, w, jnp.array([1, 3]))


COUNTS = "group sizes"

PRODUCTS = [
    case("dot", jnp.dot, [(3, 4), (4, 5)], "free", "free", classes=12),
    case("contract 2", dot(((1, 2), (0, 1))), [(3, 4, 5), (4, 5, 2)], "free", "free", classes=14),
    case(
        "contract 2 crosswise",
        dot(((2, 0), (0, 1))),
        [(3, 2, 4), (4, 3)],
        "free",
        "free",
        classes=9,
    ),
    case(
        "batch",
        dot(((2,), (1,)), ((0,), (0,))),
        [(3, 4, 5), (3, 5, 2)],
        "free",
        "free",
        classes=14,
    ),
    case(
        "batch of 2, crosswise",
        dot(((1,), (3,)), ((3, 0), (0, 2))),
        [(3, 4, 2, 2), (2, 2, 3, 4)],
        "free",
        "free",
        classes=13,
    ),
    case("outer", dot(((), ())), [(3,), (4,)], "free", "free", classes=7),
    case("constant left", of((3, 4), jnp.dot), [(4, 5)], "free"),
    case("constant right", of((4, 5), swapped(jnp.dot)), [(3, 4)], "free"),
    case("one side not zero", lambda a, b: jnp.exp(a) @ b, [(3, 4), (4, 5)], "free", "free"),
    case(
        "no side zero",
        lambda a, b: jnp.exp(a) @ jnp.exp(b),
        [(3, 4), (4, 5)],
        ("free", SUMS),
        (SUMS, "free"),
    ),
    case(
        "a batch of one side zero",
        lambda a, b: dot(((2,), (1,)), ((0,), (0,)))(jnp.exp(a), b).sum((0, 1)),
        [(3, 4, 5), (3, 5, 2)],
        ("free", SUMS, "free"),
        "free",
    ),
    case("ragged", ragged, [(4, 3), (2, 3, 5)], (COUNTS, "free"), (COUNTS, "free", "free")),
]

CASES = CONVOLUTIONS + PRODUCTS


@pytest.mark.parametrize(("fn", "operands", "wanted", "classes"), CASES)
def test_removed_is_set_to_zero(fn, operands, wanted, classes):
    check(fn, operands, wanted, classes)


@pytest.mark.parametrize(
    ("fn", "kernel"),
    [
        (conv(), (3, 3, 4, 2)),
        (conv(**PAIRS), (3, 3, 2, 4)),
        (conv(**EACH), (3, 3, 1, 4)),
    ],
    ids=["plain", "groups", "depthwise"],
)
def test_all_channels_of_a_convolution_may_go(fn, kernel):
    operands = [shape(*BLUE), shape(*kernel)]
    for seed in range(6):
        jx.check_rule(fn, *operands, seed=seed)
