"""jx.quantize.weights: a tree of parameters with its kernels in 8 or 4 bits."""

import functools
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import PyTree

from jaxaccel._select import Where, flatten, is_kernel, rebuild, select
from jaxaccel.quantize._qtensor import Calibration, Kind, QTensor, all_finite, is_qtensor, quantized

_GROUP = 32  # at 4 bits: the usual size, 4.5 bits a number
_SMALL = 4096  # numbers of a leaf that keeps 8 bits where others get 4


def weights(
    params: PyTree,
    bits: int = 8,
    *,
    kind: Kind = "int",
    group: int | Literal["auto"] | None = "auto",
    small: int | Literal["auto"] = "auto",
    calibration: Calibration | Literal["auto"] = "auto",
    where: Where | None = None,
) -> PyTree:
    """Quantize the weights: a tree like `params` with `QTensor` leaves.

    Args:
        params: a tree of parameters.
        bits: 8, or 4: two numbers to a byte.
        kind: "int", or at 8 bits "float8_e4m3fn" (finer) or "float8_e5m2" (wider in range).
        group: at 4 bits, how many consecutive numbers along the flattened axes before the last
            share a scale, >= 1; None: all, so that each output channel has one scale, as it always
            has at 8 bits. "auto": 32 at 4 bits.
        small: at 4 bits, a leaf of fewer numbers gets 8, >= 0. First layers and depthwise kernels
            have few numbers and lose most: a MobileNet of 0.4 million numbers loses 10.0 points
            of accuracy with 0, and with 4096 0.2, for 14% more bytes (`experiments.quantization`).
            "auto": 4096 at 4 bits.
        calibration: "max": the scale leaves the largest number in range; "mse": it is the one of
            15 with the least squared error, which may clip (of "int" only). "auto": "mse" at 4
            bits (normal numbers in groups of 32: an error of 9.2% of their norm for 9.7%, in
            channels of 4096: 11.4% for 15.8%), "max" at 8.
        where: which leaves: a glob over paths, a predicate ``(path, leaf) -> bool``, or a mapping
            from globs to True or False; a glob chooses among floating-point leaves with two or
            more axes. By default all of these; biases, scales and statistics stay as they are.

    Returns:
        The tree with a `QTensor` for each selected leaf; its docstring states what it stores. One
        leaf is worked on at a time.

    Raises:
        ValueError: an argument is not one of the above or does not go with the others, nothing
            is selected, or a leaf is not floating point, has fewer than two axes, is quantized
            already, or holds a value that is not finite in float32.
        NotImplementedError: the default device has no float8.

    Source: Dettmers et al., "The case for 4-bit precision", 2023 (groups); Micikevicius et al.,
    "FP8 formats for deep learning", 2022.

    >>> import jax.numpy as jnp
    >>> q = weights({"kernel": jnp.array([[1.0, 0.5], [-2.0, 0.25]])})["kernel"]
    >>> q.values
    Array([[  64,  127],
           [-127,   64]], dtype=int8)
    >>> q.scale.shape
    (1, 2)
    >>> q = weights({"kernel": jnp.ones((3, 3, 16, 8))}, bits=4, small=0)["kernel"]
    >>> q.values.shape, q.scale.shape, q.shape, q.nbytes
    ((72, 8), (5, 8), (3, 3, 16, 8), 656)
    """
    _check_options(bits, kind, group, calibration)
    _check_small(bits, small)
    least = (_SMALL if bits == 4 else 0) if small == "auto" else small
    leaves = flatten(params, is_qtensor)
    chosen = select(leaves, where, is_kernel)
    if not chosen:
        raise ValueError("weights: no leaf to quantize; pass where= to choose leaves")
    for path in chosen:
        _check_leaf(path, leaves[path])
    done = {}
    for path in chosen:
        four = bits == 4 and leaves[path].size >= least
        options = {
            "bits": 4 if four else 8,
            "kind": kind,
            "group": (_GROUP if group == "auto" else group) if four else None,
            "calibration": ("mse" if four else "max") if calibration == "auto" else calibration,
        }
        done[path] = _quantized(path, leaves[path], options)
    return rebuild(params, {**leaves, **done}, is_qtensor)


def _check_options(bits: Any, kind: Any, group: Any, calibration: Any) -> None:
    if bits not in (4, 8):
        raise ValueError(f"bits={bits!r} must be 4 or 8")
    if kind not in get_args(Kind):
        raise ValueError(f"kind={kind!r} must be one of {', '.join(map(repr, get_args(Kind)))}")
    if calibration not in ("auto", *get_args(Calibration)):
        raise ValueError(f"calibration={calibration!r} must be 'max', 'mse' or 'auto'")
    _check_group(bits, group)
    if kind != "int":
        _check_float8(bits, kind, calibration)


def _check_group(bits: int, group: Any) -> None:
    if group == "auto" or group is None:
        return
    if not isinstance(group, int) or isinstance(group, bool) or group < 1:
        raise ValueError(
            f"group={group!r} must be an int >= 1, or None for one scale per output channel"
        )
    if bits == 8:
        raise ValueError(f"group={group} needs bits=4: at 8 bits a channel has one scale")


def _check_small(bits: int, small: Any) -> None:
    if small == "auto":
        return
    if not isinstance(small, int) or isinstance(small, bool) or small < 0:
        raise ValueError(f"small={small!r} must be an int >= 0, a count of numbers")
    if small and bits == 8:
        raise ValueError(f"small={small} needs bits=4: at 8 bits all leaves have 8")


def _check_float8(bits: int, kind: Kind, calibration: str) -> None:
    if bits != 8:
        raise ValueError(f"kind={kind!r} has 8 bits; pass bits=8, or kind='int' for bits={bits}")
    if calibration == "mse":
        raise ValueError(f"calibration='mse' is for kind='int'; with {kind!r} pass 'max'")
    device = jax.config.jax_default_device or jax.default_backend()  # pyright: ignore[reportAttributeAccessIssue]
    refusal = _refusal(kind, device)
    if refusal is not None:
        raise NotImplementedError(f"kind={kind!r}: {device} has none ({refusal}); pass kind='int'")


@functools.cache
def _refusal(kind: Kind, device: Any) -> str | None:
    """Why the default device cannot convert to `kind` and back, None where it can."""
    try:
        with jax.ensure_compile_time_eval():
            back = float(_there_and_back(jnp.float32(1.5), kind))
    # Whatever the backend raises, at lowering, compilation or the run, it says no.
    except Exception as error:
        return str(error).partition("\n")[0] or type(error).__name__
    return None if back == 1.5 else f"1.5 became {back}"


@functools.partial(jax.jit, static_argnames="kind")
def _there_and_back(x, kind: Kind):
    # Without the barrier the compiler may leave both conversions out.
    return jax.lax.optimization_barrier(x.astype(kind)).astype(jnp.float32)


def _check_leaf(path: str, x: Any) -> None:
    array = isinstance(x, jax.Array | np.ndarray)
    if array and jnp.issubdtype(x.dtype, jnp.floating) and x.ndim >= 2:
        return
    kind = f"{x.dtype} of shape {x.shape}" if array else type(x).__name__
    kind = "a QTensor already" if is_qtensor(x) else kind
    raise ValueError(f"{path}: is {kind}; leave it out of where=")


def _quantized(path: str, x: Any, options: dict[str, Any]) -> QTensor:
    if not isinstance(x, Tracer) and not all_finite(x):
        raise ValueError(
            f"{path}: holds NaN or infinity in float32; train it again or restore a checkpoint"
        )
    # Waiting bounds the memory: the next leaf's temporaries come after this one's are freed.
    return jax.block_until_ready(quantized(x, **options))
