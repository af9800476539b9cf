"""The depthwise convolution of jx.nn against XLA's own, forward and with both gradients.

    python -m experiments.depthwise

`jx.nn.DepthwiseSeparable` and `MobileNet` write it as shifted multiply-adds on CPU; elsewhere the
two are the same operation, and the ratio says so. Time of the form over the time of
`jax.lax.conv_general_dilated`, interleaved in one process.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

import jaxaccel as jx
from experiments import common
from jaxaccel._forms import depthwise_conv

# batch, side, channels, kernel, stride, padding
SHAPES = (
    (128, 22, 16, 5, 1, "VALID"),
    (32, 28, 32, 3, 1, "SAME"),
    (8, 56, 64, 3, 2, "SAME"),
    (8, 28, 128, 5, 1, "SAME"),
)
COLUMNS = ("shape", "what", "XLA, ms", "form, ms", "times as fast", "quartiles")


def functions(conv: Callable, channels: int, stride: int, padding: str) -> dict[str, Callable]:
    """Forward, and forward with the gradients of image and kernel, of ``(kernel, image)``."""

    def forward(kernel: Any, x: Any) -> Any:
        return conv(
            x,
            kernel,
            (stride, stride),
            padding,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=channels,
        )

    gradient = jax.value_and_grad(lambda kernel, x: jnp.sum(forward(kernel, x) ** 2), (0, 1))
    return {"forward": forward, "with gradients": gradient}


def measured(shape: tuple) -> list[dict[str, Any]]:
    batch, side, channels, size, stride, padding = shape
    x = jax.random.normal(jax.random.key(0), (batch, side, side, channels))
    kernel = jax.random.normal(jax.random.key(1), (size, size, 1, channels))
    plain = functions(lax.conv_general_dilated, channels, stride, padding)
    form = functions(depthwise_conv, channels, stride, padding)
    rows = []
    for what in plain:
        candidates = {"XLA": (plain[what], kernel), "form": (form[what], kernel)}
        own, other = jx.measure.compare(candidates, x, rounds=10, show=False).rows
        rows.append(
            {
                "shape": f"{batch}x{side}x{side}x{channels}, {size}x{size}, stride {stride}",
                "what": what,
                "xla_ms": own.median_ms,
                "form_ms": other.median_ms,
                "speedup": 1 / other.ratio,
                "speedup_quartiles": [1 / other.ratio_high, 1 / other.ratio_low],
            }
        )
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = common.parser("depthwise", __doc__, "depthwise")
    args = parser.parse_args(argv)
    common.use_device(args.device, parser)
    folder = common.make_folder(args.out, parser)
    rows = [row for shape in SHAPES for row in measured(shape)]
    lines = [
        (
            row["shape"],
            row["what"],
            f"{row['xla_ms']:.2f}",
            f"{row['form_ms']:.2f}",
            f"{row['speedup']:.1f}",
            "{:.1f}-{:.1f}".format(*row["speedup_quartiles"]),
        )
        for row in rows
    ]
    common.publish(folder / "depthwise", COLUMNS, lines, {"rows": rows})


if __name__ == "__main__":
    main()
