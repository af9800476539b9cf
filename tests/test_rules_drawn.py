"""Convolutions, products and reshapes with drawn parameters: removed equals set to zero."""

from math import prod
from typing import Any

import jax.numpy as jnp
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

import jaxaccel as jx
from tests.rules import shape

few = st.integers(1, 3)
seeds = st.integers(0, 1000)


@st.composite
def convolutions(draw):
    """(fn, images, kernel) of any layout, with groups along the features or along the batch."""
    rank = draw(st.integers(1, 2))
    groups, into, each = draw(few), draw(few), draw(few)
    along_batch = draw(st.booleans())
    batch, features = (groups * draw(few), into) if along_batch else (draw(few), groups * into)
    pixels = draw(st.lists(st.integers(3, 5), min_size=rank, max_size=rank))
    taps = draw(st.lists(st.integers(1, 3), min_size=rank, max_size=rank))
    factors = st.lists(st.integers(1, 2), min_size=rank, max_size=rank)
    orders = [draw(st.permutations(range(rank + 2))) for _ in range(3)]
    how = {
        "window_strides": draw(factors),
        "padding": [(2, 2)] * rank,
        "lhs_dilation": draw(factors),
        "rhs_dilation": draw(factors),
        "dimension_numbers": lax.ConvDimensionNumbers(*map(tuple, orders)),
        "batch_group_count" if along_batch else "feature_group_count": groups,
    }
    fn = lambda x, kernel: lax.conv_general_dilated(x, kernel, **how)
    sizes = ([batch, features, *pixels], [groups * each, into, *taps])
    operands = [_ordered(size, order) for size, order in zip(sizes, orders, strict=False)]
    return fn, *operands


def _ordered(sizes, order):
    """The shape of which axis ``order[i]`` has size ``sizes[i]``."""
    return shape(*(sizes[order.index(k)] for k in range(len(sizes))))


@settings(max_examples=6)
@given(convolutions(), seeds)
def test_convolutions(drawn, seed):
    jx.check_rule(*drawn, seed=seed)


@st.composite
def products(draw):
    """(fn, left, right) of a dot_general."""
    count = st.integers(0, 2)
    batch, contract = draw(count), draw(count)
    shared = draw(st.lists(few, min_size=batch + contract, max_size=batch + contract))
    sides, places = [], []
    for _ in range(2):
        own = draw(st.lists(few, max_size=2))
        order = draw(st.permutations(range(len(shared) + len(own))))
        sides.append(_ordered([*shared, *own], order))
        places.append(order)
    dims: Any = (
        tuple(tuple(order[batch : len(shared)]) for order in places),
        tuple(tuple(order[:batch]) for order in places),
    )
    return lambda a, b: lax.dot_general(a, b, dims), *sides


@settings(max_examples=6)
@given(products(), seeds)
def test_products(drawn, seed):
    jx.check_rule(*drawn, seed=seed)


def factors(number):
    return [n for n in range(1, number + 1) if number % n == 0]


@st.composite
def factorings(draw, number):
    sizes = []
    while number > 1 and len(sizes) < 3:
        sizes.append(draw(st.sampled_from(factors(number))))
        number //= sizes[-1]
    return (*sizes, number)


@st.composite
def chains(draw):
    """(fn, operand) of reshapes, of which some are transposed or turned between."""
    number = draw(st.sampled_from([6, 8, 12, 16, 24, 30]))
    shapes = [draw(factorings(number)) for _ in range(draw(st.integers(2, 4)))]
    turns = [draw(st.permutations(range(len(sizes)))) for sizes in shapes]
    flips = [draw(st.booleans()) for _ in shapes]

    def fn(x):
        for sizes, turn, flip in zip(shapes[1:], turns, flips, strict=False):
            x = jnp.flip(x, -1) if flip else x
            x = x.transpose(turn).reshape(sizes)
        return x, x.sum(0)

    assert all(prod(sizes) == number for sizes in shapes)
    return fn, shape(*shapes[0])


@settings(max_examples=6)
@given(chains(), seeds)
def test_reshapes(drawn, seed):
    jx.check_rule(*drawn, seed=seed)
