"""Disjoint sets of integers, many united at a time."""

import numpy as np


class Disjoint:
    """Sets of the integers 0 to `len` - 1; the root of a set is its smallest member.

    Whole arrays are united and looked up by pointer jumping, so that a call costs numpy operations
    and no loop over its elements.
    """

    def __init__(self) -> None:
        self._parent = np.arange(1024)
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def new(self, size: int) -> np.ndarray:
        """Fresh integers, each a set of its own."""
        start, self._size = self._size, self._size + size
        if self._size > len(self._parent):
            more = np.arange(len(self._parent), 2 * self._size)
            self._parent = np.concatenate([self._parent, more])
        return np.arange(start, self._size)

    def roots(self, members: np.ndarray) -> np.ndarray:
        """The root of each member, in one dimension."""
        members = np.ravel(members)
        found = self._parent[members]
        while True:
            above = self._parent[found]
            if np.array_equal(above, found):
                break
            found = above
        self._parent[members] = found
        return found

    def unite(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Unites a[i] with b[i] for every i; returns the roots that no longer are roots."""
        lost = []
        a, b = self.roots(a), self.roots(b)
        while (differ := a != b).any():
            low, high = np.minimum(a, b)[differ], np.maximum(a, b)[differ]
            np.minimum.at(self._parent, high, low)  # of several partners the others come next turn
            lost.append(high)
            a, b = self.roots(low), self.roots(high)
        return np.unique(np.concatenate(lost)) if lost else np.zeros(0, int)
