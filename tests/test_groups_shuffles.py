"""Shuffles of channels: split, swapped and merged again."""

import jax.numpy as jnp
import pytest

from tests import shrinking
from tests.test_groups import X, shapes


def swap_pairs(h):
    return h.reshape(5, 3, 2).swapaxes(1, 2).reshape(5, 6)


def swap_pairs_and_rows(h):
    return h.reshape(5, 3, 2).transpose(1, 0, 2).reshape(5, 6)


def swap_pairs_that_are_read(h):
    pairs = h.reshape(5, 3, 2)
    return pairs.swapaxes(1, 2).reshape(5, 6) + pairs.sum((1, 2))[:, None]


@pytest.mark.parametrize(
    ("swap", "sizes"),
    [(swap_pairs, [6]), (swap_pairs_and_rows, [2]), (swap_pairs_that_are_read, [2])],
)
def test_a_shuffle_is_a_permutation_where_nothing_else_reads_its_parts(swap, sizes):
    fn = lambda p, x: jnp.tanh(swap(jnp.tanh(x @ p["w"]))) @ p["u"]
    groups = shrinking.check(fn, shapes(w=(3, 6), u=(6, 2)), X)
    assert [group.size for group in groups] == sizes
