"""What one call costs, by the compiler's own count."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax

from jaxaccel._table import table


@dataclass(frozen=True)
class Cost:
    """The compiler's figures for one call; None is a figure that the backend does not give.

    ``peak_memory`` is what the call holds allocated: arguments, results (less those that alias
    an argument) and temporary buffers, without the scratch of library kernels.
    ``loops`` is how many loops the program has: the compiler counts the body of each once.
    """

    flops: int | None
    bytes_accessed: int | None
    parameters: int
    parameter_bytes: int
    peak_memory: int | None
    loops: int = 0

    def __str__(self) -> str:
        rows = [
            ("FLOPs", self.flops),
            ("bytes accessed", self.bytes_accessed),
            ("parameters", self.parameters),
            ("parameter bytes", self.parameter_bytes),
            ("peak memory, bytes", self.peak_memory),
        ]
        note = f"\n{self.loops} loop(s): FLOPs and bytes count a loop's body once."
        return table(("cost of one call", "value"), rows) + note * bool(self.loops)


def cost(fn: Callable[..., Any], *args: Any) -> Cost:
    """Compiles ``fn`` for these arguments and returns what the compiler says one call costs.

    FLOPs are those of the program as written, before the compiler rewrites it, so that they are
    the same on every backend: two for each multiply-accumulate that meets no padding, one for
    each element-wise operation; a library call (a matrix decomposition, a Pallas kernel) counts
    as none. Bytes and memory are those of the compiled program on one device, after fusion.

    Args:
        fn: a JAX function whose first argument is a pytree of parameters.
        *args: its arguments, as arrays or ``jax.ShapeDtypeStruct``s; nothing is run.

    Returns:
        A `Cost`; ``print`` shows it as a table.

    >>> import jax, jax.numpy as jnp
    >>> kernel = jax.ShapeDtypeStruct((64, 32), jnp.float32)
    >>> found = cost(lambda kernel, x: x @ kernel, kernel, jnp.ones((16, 64)))
    >>> found.flops == 2 * 16 * 64 * 32, found.parameters, found.parameter_bytes
    (True, 2048, 8192)
    """
    lowered = jax.jit(fn).lower(*args)
    compiled = lowered.compile()
    analysis = compiled.cost_analysis()
    parameters, parameter_bytes = parameter_size(args[:1])
    return Cost(
        flops=_flops(lowered, analysis),
        bytes_accessed=_figure(analysis, "bytes accessed"),
        parameters=parameters,
        parameter_bytes=parameter_bytes,
        peak_memory=_peak_memory(compiled.memory_analysis()),
        loops=lowered.as_text().count("stablehlo.while"),
    )


def macs(fn: Callable[..., Any], *args: Any) -> int:
    """Counts the multiply-accumulates of one call, as half of the FLOPs that `cost` gives.

    It sees every form of the same arithmetic (a depthwise convolution written as shifted
    multiply-adds counts like the convolution), leaves out products with padding, and counts an
    element-wise operation as half of one.

    Args:
        fn: a JAX function.
        *args: its arguments, as arrays or ``jax.ShapeDtypeStruct``s; nothing is run.

    Raises:
        ValueError: where the count is not known, or ``fn`` has a loop, counted once.

    >>> import jax.numpy as jnp
    >>> macs(lambda kernel, x: x @ kernel, jnp.ones((64, 32)), jnp.ones((16, 64)))
    32768
    """
    found = cost(fn, *args)
    if found.flops is None:
        raise ValueError(f"macs: the {jax.default_backend()} backend gives no FLOPs")
    if found.loops:
        raise ValueError(
            f"macs: fn has {found.loops} loop(s), whose body the compiler counts once; unroll it "
            "(jax.lax.scan(..., unroll=True)) or count one step; random bits draw in a loop too"
        )
    return found.flops // 2


def parameter_size(params: Any) -> tuple[int, int]:
    """Elements and bytes of a tree's leaves."""
    leaves = jax.tree.leaves(jax.eval_shape(lambda tree: tree, params))
    sizes = [(leaf.size, leaf.size * leaf.dtype.itemsize) for leaf in leaves]
    return sum(count for count, _ in sizes), sum(count for _, count in sizes)


def _figure(analysis: Mapping[str, float] | None, name: str) -> int | None:
    value = (analysis or {}).get(name, -1)
    return int(value) if value >= 0 else None


def _flops(lowered: jax.stages.Lowered, compiled: Mapping[str, float] | None) -> int | None:
    analysis = lowered.cost_analysis()
    if not analysis and compiled:
        return 0  # a backend that counts leaves the figure out where there is no arithmetic
    return _figure(analysis, "flops")


def _peak_memory(stats: Any) -> int | None:
    # Not peak_memory_in_bytes: on CPU that leaves the temporary buffers out.
    if stats is None:
        return None
    held = stats.argument_size_in_bytes + stats.output_size_in_bytes
    return held - stats.alias_size_in_bytes + stats.temp_size_in_bytes
