"""Masks: exact counts, ranks against a sort in Python, zeros that stay while training."""

from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import jaxaccel as jx
from jaxaccel._select import flatten, is_kernel
from tests import oracles
from tests.models import ZOO, tiers

FLOATS = st.floats(-4, 4, width=32, allow_subnormal=False)  # XLA may take these for zero


def tree(seed: int = 0):
    keys = jax.random.split(jax.random.key(seed), 3)
    return {
        "conv": {"kernel": jax.random.normal(keys[0], (3, 3, 4, 8)), "bias": jnp.ones(8)},
        "dense": {"kernel": 9 * jax.random.normal(keys[1], (16, 10)), "bias": jnp.ones(10)},
    }


@pytest.mark.parametrize("case", tiers(ZOO))
def test_global_counts_over_the_zoo(case):
    _, params = case.build()
    masks = flatten(jx.prune.masks(params, 0.8))
    leaves = flatten(params)
    pruned = [path for path, mask in masks.items() if mask.ndim]
    assert pruned == [path for path, leaf in leaves.items() if is_kernel(path, leaf)]
    total = sum(leaves[path].size for path in pruned)
    assert sum(int((~masks[path]).sum()) for path in pruned) == round(0.8 * total)
    assert all(masks[path].shape == leaves[path].shape for path in pruned)


@given(
    hnp.arrays(np.float32, hnp.array_shapes(min_dims=2, max_dims=4, max_side=6), elements=FLOATS),
    st.floats(0, 0.99),
    st.sampled_from(["global", "local"]),
)
def test_kept_weights_are_the_largest(x, sparsity, scope):
    mask = np.asarray(jx.prune.masks({"w": jnp.asarray(x)}, sparsity, scope=scope)["w"])
    assert (~mask).sum() == round(sparsity * x.size)
    order = sorted(range(x.size), key=lambda i: (abs(float(x.ravel()[i])), i))
    assert sorted(order[: (~mask).sum()]) == np.flatnonzero(~mask.ravel()).tolist()


def test_local_removes_the_same_share_of_each_leaf_and_global_does_not():
    local = jx.prune.sparsity(jx.prune.masks(tree(), 0.5, scope="local"))
    assert local == {
        "conv/bias": 0,
        "conv/kernel": 0.5,
        "dense/bias": 0,
        "dense/kernel": 0.5,
    }
    everywhere = jx.prune.sparsity(jx.prune.masks(tree(), 0.5))
    assert everywhere["conv/kernel"] > 0.6 > 0.4 > everywhere["dense/kernel"]


@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 5), st.data())
def test_n_of_m_along_the_input_axis(n, groups, outputs, data):
    m = data.draw(st.integers(n + 1, 5))
    x = data.draw(hnp.arrays(np.float32, (2, groups * m, outputs), elements=FLOATS))
    mask = np.asarray(jx.prune.masks({"w": x}, 1 - n / m, kind=f"{n}:{m}")["w"])
    for i in range(2):
        for c in range(outputs):
            expected = oracles.n_of_m([abs(float(v)) for v in x[i, :, c]], n, m)
            assert mask[i, :, c].tolist() == expected


def test_two_of_four_leaves_out_what_cannot_be_grouped():
    params = {"stem": jnp.ones((3, 3, 1, 8)), "body": jnp.ones((3, 3, 8, 8))}
    assert jx.prune.sparsity(jx.prune.masks(params, 0.5, kind="2:4")) == {"body": 0.5, "stem": 0.0}
    with pytest.raises(ValueError, match=r"stem: shape \(3, 3, 1, 8\) has no input axis that is a"):
        jx.prune.masks(params, 0.5, kind="2:4", where="stem")


def test_where_pattern_predicate_and_mapping():
    for where in (
        "dense/*",
        lambda path, leaf: path == "dense/kernel",
        {"conv/*": False, "*/kernel": True},
    ):
        masks = jx.prune.sparsity(jx.prune.masks(tree(), 0.5, where=where))
        assert {path for path, share in masks.items() if share} == {"dense/kernel"}


def test_random_criterion_is_fixed_by_key_and_path():
    key = jax.random.key(3)
    both = jx.prune.masks(tree(), 0.5, scope="local", criterion=jx.prune.random(key))
    one = jx.prune.masks(
        tree(), 0.5, scope="local", criterion=jx.prune.random(key), where="conv/kernel"
    )
    assert np.array_equal(both["conv"]["kernel"], one["conv"]["kernel"])
    largest = jx.prune.masks(tree(), 0.5, scope="local")
    assert not np.array_equal(both["conv"]["kernel"], largest["conv"]["kernel"])


@pytest.mark.parametrize("optimizer", [optax.sgd(0.1, momentum=0.9), optax.adamw(0.1)])
def test_pruned_weights_stay_zero_while_training(optimizer):
    params = {"params": tree(), "batch_stats": {"mean": jnp.ones(3)}}
    masks = jx.prune.masks(params, 0.5)
    trained = jx.prune.apply(params, masks)["params"]
    start = trained
    tx = optax.chain(optimizer, jx.prune.keep(masks))
    state = tx.init(trained)
    for seed in range(3):
        updates, state = tx.update(tree(seed + 1), state, trained)
        trained = optax.apply_updates(trained, updates)
    for path, mask in flatten(masks["params"]).items():
        new, old = flatten(trained)[path], flatten(start)[path]
        kept = np.broadcast_to(mask, new.shape)
        assert (np.asarray(new)[~kept] == 0).all()
        assert (np.asarray(new)[kept] != np.asarray(old)[kept]).all()


def test_apply_is_multiplication_by_the_mask_and_works_under_jit():
    masks = jx.prune.masks(tree(), 0.7)
    applied = jax.jit(jx.prune.apply)(tree(), masks)
    for path, leaf in flatten(applied).items():
        expected = np.asarray(flatten(tree())[path]) * np.asarray(flatten(masks)[path])
        np.testing.assert_array_equal(leaf, expected)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: jx.prune.masks(p, 1.0), r"sparsity=1.0 must lie in \[0, 1\)"),
        (lambda p: jx.prune.masks(p, float("nan")), "sparsity=nan must lie in"),
        (lambda p: jx.prune.masks(p, 0.5, kind="4:2"), "kind='4:2' must be \"unstructured\" or"),
        (lambda p: jx.prune.masks(p, 0.9, kind="2:4"), "kind='2:4' removes 0.5 of the weights"),
        (lambda p: jx.prune.masks(p, 0.5, scope=cast(Any, "all")), "scope='all' must be"),
        (
            lambda p: jx.prune.masks(p, 0.5, where="con/*"),
            "where='con/\\*' matches no kernel; they are: conv/kernel, dense/kernel",
        ),
        (
            lambda p: jx.prune.masks(p, 0.5, where=cast(Any, {"conv/*": 0.9})),
            r"where\['conv/\*'\]=0.9 must be True or False",
        ),
        (lambda p: jx.prune.masks({}, 0.5), "no leaf to prune"),
        (
            lambda p: jx.prune.masks(jx.quantize.weights(p), 0.5),
            "conv/kernel: is a QTensor; prune first, or jx.quantize.dequantize the tree",
        ),
        (
            lambda p: jx.prune.masks({"n": jnp.ones((2, 2), int)}, 0.5, where=lambda *_: True),
            "n: only floating-point leaves can be pruned",
        ),
        (
            lambda p: jx.prune.apply(p, jx.prune.masks(p, 0.5)["conv"]),
            "bias: in only one of params and masks",
        ),
        (
            lambda p: jx.prune.apply({"w": jnp.ones(3)}, {"w": jnp.ones(2, bool)}),
            r"w: mask of shape \(2,\) for a leaf of shape \(3,\)",
        ),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call(tree())


def test_random_criterion_differs_between_leaves_of_one_shape():
    params = {"a": jnp.ones((8, 8)), "b": jnp.ones((8, 8))}
    masks = jx.prune.masks(params, 0.5, scope="local", criterion=jx.prune.random(jax.random.key(0)))
    assert not np.array_equal(masks["a"], masks["b"])
