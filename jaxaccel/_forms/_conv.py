"""A convolution with its axes in one order, and the ways to make it of other convolutions."""

from collections.abc import Callable, Mapping, Sequence
from itertools import product
from typing import Any, NamedTuple, TypeAlias

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from jaxaccel._apart import apart

Pads: TypeAlias = tuple[tuple[int, int], ...]
LAYOUT = ("NHWC", "HWIO", "NHWC")


class Conv(NamedTuple):
    """How a HWIO kernel moves over NHWC images; one number per spatial axis, height first."""

    strides: tuple[int, ...]
    pads: Pads
    lhs_dilation: tuple[int, ...]
    rhs_dilation: tuple[int, ...]
    groups: int
    batch_groups: int
    precision: Any
    dtype: Any  # of the result

    def __call__(self, x: Array, kernel: Array) -> Array:
        """As `jax.lax.conv_general_dilated` does it."""
        return lax.conv_general_dilated(
            x,
            kernel,
            self.strides,
            self.pads,
            self.lhs_dilation,
            self.rhs_dilation,
            LAYOUT,
            self.groups,
            self.batch_groups,
            self.precision,
            self.dtype,
        )


ConvForm: TypeAlias = Callable[[Array, Array, Conv], Array]


def conv_of(params: Mapping[str, Any], operand: Any) -> Conv:
    """The static parameters of the primitive; a convolution along one axis is one of height 1."""
    lead = (1,) * (2 - len(params["window_strides"]))
    return Conv(
        (*lead, *params["window_strides"]),
        (*((0, 0) for _ in lead), *((int(a), int(b)) for a, b in params["padding"])),
        (*lead, *params["lhs_dilation"]),
        (*lead, *params["rhs_dilation"]),
        params["feature_group_count"],
        params["batch_group_count"],
        params["precision"],
        params["preferred_element_type"] or operand,
    )


def shapes_of(
    params: Mapping[str, Any], lhs: Sequence[int], rhs: Sequence[int]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes of images (NHWC) and kernel (HWIO) in the order of axes that forms take."""
    layout = params["dimension_numbers"]
    (batch, channels, *pixels), (out, into, *taps) = layout.lhs_spec, layout.rhs_spec
    lead = (1,) * (2 - len(pixels))
    x = (lhs[batch], *lead, *(lhs[i] for i in pixels), lhs[channels])
    return x, (*lead, *(rhs[i] for i in taps), rhs[into], rhs[out])


def canonical(form: ConvForm, product: bool = False) -> Callable[..., Array]:
    """The form as a function of the primitive's own operands and parameters.

    A `product` is of all pixels, and XLA may fold its kernel's transpose. Other forms gather
    pixels; of int8 they find them in memory, or XLA would compute what these come from anew for
    each tap, and without vector code.
    """

    def run(lhs: Array, rhs: Array, **params: Any) -> Array:
        layout = params["dimension_numbers"]
        (batch, channels, *pixels), (out, into, *taps) = layout.lhs_spec, layout.rhs_spec
        x, kernel = shapes_of(params, lhs.shape, rhs.shape)
        images = ordered(lhs, (batch, *pixels, channels)).reshape(x)
        axes = (*taps, into, out)
        weights = (rhs.transpose(axes) if product else ordered(rhs, axes)).reshape(kernel)
        if lhs.dtype == np.int8 and not product:
            images = apart(lambda x: x, images)
        y = form(images, weights, conv_of(params, lhs.dtype))
        if len(pixels) == 1:
            y = y.reshape(y.shape[0], *y.shape[2:])
        made = (layout.out_spec[0], *layout.out_spec[2:], layout.out_spec[1])
        return y.transpose([made.index(i) for i in range(y.ndim)])

    return run


def ordered(x: Array, axes: Sequence[int]) -> Array:
    """The transpose; of int8 in memory too, as XLA:CPU's library of int8 products needs it.

    XLA gives a transpose, and what follows it, another order instead. A flat array has only one.
    """
    found = x.transpose(axes)
    if x.dtype != np.int8 or list(axes) == sorted(axes):
        return found
    return lax.optimization_barrier(found.reshape(-1)).reshape(found.shape)


def accumulator(dtype: Any) -> Any:
    """The dtype to sum a result of this one in: float32 at least, of integers their own."""
    return dtype if jnp.issubdtype(dtype, jnp.integer) else jnp.promote_types(dtype, jnp.float32)


def out_size(x: Sequence[int], kernel: Sequence[int], conv: Conv) -> tuple[int, ...]:
    """Height and width of the result; below 1 where there is none."""
    return tuple(
        ((size - 1) * gap + 1 + low + high - (k - 1) * d - 1) // s + 1 if size else 0
        for size, k, s, (low, high), gap, d in zip(x[1:3], kernel[:2], *conv[:4], strict=True)
    )


def spread(x: Array, kernel: Array, conv: Conv) -> Array:
    """Every second column of the same sum: twice the stride, the dilations and the padding.

    XLA:CPU gives a convolution without dilation to one library, with it to another, and which
    is faster differs by up to five times.
    """
    twice = lambda pair: (pair[0], 2 * pair[1])
    (top, bottom), (left, right) = conv.pads
    return conv._replace(
        strides=twice(conv.strides),
        pads=((top, bottom), (2 * left, 2 * right)),
        lhs_dilation=twice(conv.lhs_dilation),
        rhs_dilation=twice(conv.rhs_dilation),
    )(x, kernel)


def split(form: ConvForm) -> ConvForm:
    """One convolution for each group of channels."""

    def run(x: Array, kernel: Array, conv: Conv) -> Array:
        alone = conv._replace(groups=1, batch_groups=1)
        axis = 3 if conv.groups > 1 else 0
        images = jnp.split(x, conv.groups * conv.batch_groups, axis)
        kernels = jnp.split(kernel, conv.groups * conv.batch_groups, 3)
        return jnp.concatenate([form(a, b, alone) for a, b in zip(images, kernels, strict=True)], 3)

    return run


def alone(form: ConvForm) -> ConvForm:
    """A form that XLA may not fuse: of multiplications and additions alone.

    It would be computed anew in each of the loops that read its result.
    """
    return lambda x, kernel, conv: apart(lambda x, kernel: form(x, kernel, conv), x, kernel)


def edged(form: ConvForm) -> ConvForm:
    """The form of images with their edges, which another form of the same images may share."""
    without = {"pads": ((0, 0), (0, 0)), "lhs_dilation": (1, 1)}
    return lambda x, kernel, conv: form(padded(x, conv), kernel, conv._replace(**without))


def phases(form: ConvForm) -> ConvForm:
    """A convolution of spread images, as one convolution for each place between two pixels.

    It is what the input gradient of a strided convolution is. Where the images are spread by d,
    a place meets every d-th tap only; the others multiply zeros, and are left out.
    """

    def run(x: Array, kernel: Array, conv: Conv) -> Array:
        gaps, out = conv.lhs_dilation, out_size(x.shape, kernel.shape, conv)
        places = list(product(*(range(gap) for gap in gaps)))
        size = [-(-n // gap) for n, gap in zip(out, gaps, strict=True)]
        parts = [_phase(form, x, kernel, conv, place, size) for place in places]
        grid = jnp.stack(parts, 1).reshape(x.shape[0], *gaps, *size, parts[0].shape[3])
        whole = grid.transpose(0, 3, 1, 4, 2, 5)
        whole = whole.reshape(x.shape[0], size[0] * gaps[0], size[1] * gaps[1], -1)
        return whole[:, : out[0], : out[1]]

    return run


def _phase(
    form: ConvForm, x: Array, kernel: Array, conv: Conv, place: Sequence[int], size: Sequence[int]
) -> Array:
    """The results at every d-th place from `place` on."""
    taps, pads = [], []
    for axis, (r, n, gap, (low, _)) in enumerate(
        zip(place, size, conv.lhs_dilation, conv.pads, strict=True)
    ):
        first = (low - r) % gap
        count = len(range(first, kernel.shape[axis], gap))
        before = (low - r - first) // gap
        taps.append(slice(first, None, gap))
        pads.append((before, n + count - 1 - before - x.shape[axis + 1]))
        if count == 0:
            zeros = (x.shape[0], *size, kernel.shape[3])
            return jnp.zeros(zeros, conv.dtype)
    plain = conv._replace(pads=tuple(pads), lhs_dilation=(1, 1))
    return form(x, kernel[taps[0], taps[1]], plain)


def space_to_depth(form: ConvForm) -> ConvForm:
    """A convolution as one that moves by one: the pixels of a stride become channels.

    Of images that are not spread, under a kernel that is not.
    """

    def run(x: Array, kernel: Array, conv: Conv) -> Array:
        axes = zip(
            out_size(x.shape, kernel.shape, conv), kernel.shape[:2], x.shape[1:3],
            conv.strides, conv.pads, strict=True,
        )  # fmt: skip
        pads, more = [], []
        for places, taps, pixels, step, (low, _) in axes:
            wide = -(-taps // step) * step
            pads.append((low, (places - 1) * step + wide - low - pixels))
            more.append((0, wide - taps, 0))
        zero, none = jnp.zeros((), kernel.dtype), (0, 0, 0)
        kernel = lax.pad(kernel, zero, [*more, none, none])
        height, width, channels, out = kernel.shape
        # Not with the outputs first: XLA would transpose the convolution, which no library takes.
        blocks = _deep(kernel.reshape(1, height, width, channels * out), conv.strides)
        return form(
            _deep(padded(x, conv._replace(pads=tuple(pads))), conv.strides),
            blocks.reshape(*blocks.shape[1:3], -1, out),
            conv._replace(strides=(1, 1), pads=((0, 0), (0, 0))),
        )

    return run


def _deep(x: Array, steps: Sequence[int]) -> Array:
    """[n, height * a, width * b, channels] -> [n, height, width, a * b * channels]."""
    (a, b), (n, height, width, channels) = steps, x.shape
    blocks = x.reshape(n, height // a, a, width // b, b, channels).transpose(0, 1, 3, 2, 4, 5)
    return blocks.reshape(n, height // a, width // b, a * b * channels)


def padded(x: Array, conv: Conv) -> Array:
    """The images spread by their dilation, with their edges."""
    spatial = [
        (low, high, gap - 1) for (low, high), gap in zip(conv.pads, conv.lhs_dilation, strict=True)
    ]
    if not any(map(any, spatial)):
        return x
    return lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *spatial, (0, 0, 0)])


def tap(
    x: Array,
    index: Sequence[int],
    size: Sequence[int],
    strides: Sequence[int],
    steps: Sequence[int] = (1, 1),
) -> Array:
    """`size` pixels of padded images from ``index * steps`` on, `strides` apart."""
    start = [i * d for i, d in zip(index, steps, strict=True)]
    stop = [a + (n - 1) * s + 1 for a, n, s in zip(start, size, strides, strict=True)]
    return lax.slice(x, (0, *start, 0), (x.shape[0], *stop, x.shape[3]), (1, *strides, 1))


def indices(shape: Sequence[int]) -> list[tuple[int, ...]]:
    return list(product(*(range(n) for n in shape)))
