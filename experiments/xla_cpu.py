"""Where XLA:CPU is slow: the same maths twice, as reproducers for a report upstream.

    python -m experiments.xla_cpu

Each case stands alone on jax and numpy: what XLA makes of the plain operation, and another way of
writing it. Results are compared, then both are timed in turn in one process; the ratio is the
median over rounds. Above 1 the plain operation is the slower one.
"""

import argparse
import functools
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


class Case(NamedTuple):
    """Two functions of the same arguments that should give the same result."""

    name: str
    plain: Callable[..., Any]
    other: Callable[..., Any]
    shapes: tuple[tuple[int, ...], ...]


def conv(x: Any, kernel: Any, groups: int = 1) -> Any:
    return lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(1, 1),
        padding="SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


def gradient(fn: Callable) -> Callable:
    """Of all arguments but the last, which is the cotangent."""
    return lambda *args: jax.vjp(fn, *args[:-1])[1](args[-1])


def depthwise(batch: int) -> Case:
    def shifted(x: Any, kernel: Any) -> Any:
        padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        taps = [(i, j) for i in range(3) for j in range(3)]
        return sum(padded[:, i : i + 56, j : j + 56] * kernel[i, j, 0] for i, j in taps)

    plain = functools.partial(conv, groups=64)
    shapes = ((batch, 56, 56, 64), (3, 3, 1, 64))
    return Case("depthwise 3x3; shifted multiply-adds", plain, shifted, shapes)


def pool_gradient(batch: int, size: int) -> Case:
    """The plain one is a select-and-scatter. Windows at stride 2; those of size 3 overlap."""
    side, out = 55, (55 - size) // 2 + 1
    window = (1, size, size, 1), (1, 2, 2, 1), "VALID"

    def slices(x: Any) -> Any:
        rows = [x[:, i : i + 2 * out - 1 : 2] for i in range(size)]
        tall = functools.reduce(jnp.maximum, rows)
        columns = [tall[:, :, j : j + 2 * out - 1 : 2] for j in range(size)]
        return functools.reduce(jnp.maximum, columns)

    plain = gradient(lambda x: lax.reduce_window(x, -jnp.inf, lax.max, *window))
    shapes = ((batch, side, side, 32), (batch, out, out, 32))
    return Case(f"max pool {size}x{size}, gradient; slices", plain, gradient(slices), shapes)


def pointwise_gradient(batch: int) -> Case:
    def product(x: Any, kernel: Any) -> Any:
        return (x.reshape(-1, 64) @ kernel[0, 0]).reshape(*x.shape[:3], 256)

    shapes = ((batch, 56, 56, 64), (1, 1, 64, 256), (batch, 56, 56, 256))
    return Case("conv 1x1, gradient; matmul", gradient(conv), gradient(product), shapes)


def loop(batch: int) -> Case:
    """Only in the entry computation does XLA bring the convolution into its kernels' form."""

    def step(x: Any, cotangent: Any) -> Any:
        kernel = jnp.zeros((3, 3, 32, 64))
        return gradient(functools.partial(conv, x))(kernel, cotangent)[0]

    def scanned(images: Any, cotangent: Any) -> Any:
        return lax.scan(lambda none, x: (none, step(x, cotangent)), None, images)[1]

    def written_out(images: Any, cotangent: Any) -> Any:
        return jnp.stack([step(x, cotangent) for x in images])

    shapes = ((4, batch, 28, 28, 32), (batch, 28, 28, 64))
    return Case("conv 3x3, kernel gradient in scan; outside", scanned, written_out, shapes)


def cases(batch: int = 8) -> list[Case]:
    gradients = [pool_gradient(batch, 2), pool_gradient(batch, 3), pointwise_gradient(batch)]
    return [depthwise(batch), *gradients, loop(max(1, batch // 4))]


def measured(case: Case, rounds: int) -> tuple[float, float, float]:
    """Milliseconds of both and their ratio, once they were found equal."""
    rng = np.random.default_rng(0)
    args = [jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in case.shapes]
    forms = [jax.jit(form) for form in (case.plain, case.other)]
    for a, b in zip(*(jax.tree.leaves(form(*args)) for form in forms), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-4, atol=1e-4 * float(abs(a).max()))
    pairs = [[milliseconds(form, args) for form in forms] for _ in range(rounds)]
    plain, other = (median(column) for column in zip(*pairs, strict=True))
    return plain, other, median(a / b for a, b in pairs)


def milliseconds(form: Callable, args: list[Any]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(form(*args))
    return 1e3 * (time.perf_counter() - start)


def header() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"jax {jax.__version__}; {(names or [platform.machine()])[0]}; {threads} threads"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.xla_cpu", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="batch 1, 2 rounds")
    args = parser.parse_args(argv)
    jax.config.update("jax_platforms", "cpu")
    print(f"{header()}\n\n{'case; the other form':44}{'XLA, ms':>10}{'other, ms':>11}{'ratio':>8}")
    for case in cases(1) if args.quick else cases():
        plain, other, ratio = measured(case, 2 if args.quick else 20)
        print(f"{case.name:44}{plain:10.2f}{other:11.2f}{ratio:8.2f}", flush=True)


if __name__ == "__main__":
    main()
