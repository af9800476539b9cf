"""`jx.autotune` of whole networks, and beside the other transforms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxaccel as jx
from jaxaccel._tuned import untuned
from tests.models import ZOO, tiers


@pytest.mark.parametrize("case", tiers(ZOO, ("mobilenet", "resnet20")))
def test_the_zoo_by_rules_equals_itself_without_forms(case):
    fn, params = case.build()
    x = case.images()
    loss = lambda f: jax.jit(jax.value_and_grad(lambda p: (f(p, x) ** 2).mean(), allow_int=True))
    tuned = loss(jx.autotune(untuned(fn), mode="rules"))(params)
    plain = loss(untuned(fn))(params)
    for found, expected in zip(jax.tree.leaves(tuned), jax.tree.leaves(plain), strict=True):
        if found.dtype == jnp.float32:
            largest = float(jnp.abs(expected).max())
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=2e-5 * largest + 1e-30)


def test_transforms_compose_with_it():
    fn, params = ZOO[3].build()
    x = ZOO[3].images()
    fast = jx.autotune(fn, mode="rules")
    assert (
        str(jx.groups(fast, params, x)).split("pinned")[0]
        == str(jx.groups(fn, params, x)).split("pinned")[0]
    )
    small, cut = jx.prune.channels(fast, params, x, ratio=0.5)
    expected, wanted = jx.prune.channels(fn, params, x, ratio=0.5)
    np.testing.assert_allclose(small(cut, x), expected(wanted, x), rtol=1e-5, atol=1e-6)
    again = jx.autotune(small, mode="rules")
    np.testing.assert_allclose(jax.jit(again)(cut, x), small(cut, x), rtol=1e-4, atol=1e-5)
