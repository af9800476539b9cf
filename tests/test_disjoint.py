"""Disjoint sets against sets of Python's own."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from jaxaccel._disjoint import Disjoint

members = st.integers(0, 19)


@given(st.lists(st.lists(st.tuples(members, members), max_size=9), max_size=4))
def test_united_one_by_one(rounds):
    sets, wanted = Disjoint(), [{i} for i in range(20)]
    sets.new(20)
    for pairs in rounds:
        before = set(sets.roots(np.arange(20)).tolist())
        lost = sets.unite(*np.array(pairs, int).reshape(-1, 2).T)
        for a, b in pairs:
            both = wanted[a] | wanted[b]
            for i in both:
                wanted[i] = both
        roots = sets.roots(np.arange(20)).tolist()
        assert roots == [min(found) for found in wanted]
        assert set(lost.tolist()) == before - set(roots)


def test_fresh_ones_at_any_size():
    sets = Disjoint()
    assert [sets.new(n).tolist()[-1:] for n in (3, 0, 5000)] == [[2], [], [5002]]
    assert len(sets) == 5003
    assert sets.roots(np.array([4000])).tolist() == [4000]
