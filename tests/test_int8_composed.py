"""A quantized function under other transforms: pruned, placed on several devices, batched."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import jaxaccel as jx
from tests.models import normal
from tests.shrinking import dropped_by, masked
from tests.test_int8 import CONV, DENSE, IMAGES, LAYOUT, X, dense_average, quantized, ran, residual

SEPARABLE = {
    "depthwise": {"kernel": normal(0, 3, 3, 1, 4), "bias": normal(1, 4)},
    "pointwise": {"kernel": normal(2, 1, 1, 4, 6)},
    "last": {"kernel": normal(3, 6, 5)},
}


def separable(params, x):
    """Both convolutions see edges; what they read has a zero point."""
    conv = lambda x, name, **options: jax.lax.conv_general_dilated(
        x, params[name]["kernel"], (1, 1), "SAME", dimension_numbers=LAYOUT, **options
    )
    x = conv(jax.nn.relu(x), "depthwise", feature_group_count=4) + params["depthwise"]["bias"]
    x = jax.nn.relu(conv(jax.nn.relu6(x), "pointwise"))
    return x.mean((1, 2)) @ params["last"]["kernel"]


CASES = [(residual, CONV, IMAGES), (dense_average, DENSE, X), (separable, SEPARABLE, IMAGES)]


@pytest.mark.parametrize("scales", ["float", "power_of_two"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case[0].__name__)
def test_channels_removed_afterwards(case, scales):
    """The correction of a zero point is of the kernel that is there."""
    fn, params, x = case
    small, new = quantized(fn, params, x, scales=scales)
    plan = jx.prune.plan(small, new, x, ratio=0.5, criterion=jx.prune.random(jax.random.key(0)))
    assert plan.kept
    zeroed = masked(new, dropped_by(plan), jx.groups(small, new, x).unmasked)
    np.testing.assert_array_equal(
        ran(plan.rewrite(small), plan.shrink(new), x), ran(small, zeroed, x)
    )


@pytest.mark.parametrize("case", CASES, ids=lambda case: case[0].__name__)
def test_a_batch_over_devices(case):
    fn, params, x = case
    small, new = quantized(fn, params, x)
    batch = jnp.concatenate([x] * 8)[: 8 * (len(x) // 8) or 8]
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    placed = jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data")))
    spread = ran(small, new, placed)
    assert len(spread.sharding.device_set) == 8
    np.testing.assert_array_equal(spread, ran(small, new, batch))


def test_batched():
    small, new = quantized(residual, CONV, IMAGES)
    found = ran(jax.vmap(small, (None, 0)), new, IMAGES[:, None])
    np.testing.assert_array_equal(found[:, 0], ran(small, new, IMAGES))
