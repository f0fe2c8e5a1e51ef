"""Labels: which indices must be removed together, solved with vectorised union-find.

Every index of a dimension that could be removed carries a label. Operations say which labels are the same (an
addition makes channel 3 of both sides one thing) and which may never go (an output's channels). Both are collected as
arrays and solved at the end, at once: no Python loop ever runs over channels.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["PINNED", "Labels", "Solution"]

Array = NDArray[np.int64]

PINNED = 0
"""The label of what may never be removed."""


@dataclass(frozen=True)
class Solution:
    """Labels solved into classes.

    Attributes:
        class_of: class of each label; class 0 is pinned.
        removable: by class: whether its indices may be removed (not pinned, and a layer makes them).
        reasons: why a class is pinned, by class, for those that are.
    """

    class_of: Array
    removable: NDArray[np.bool_]
    reasons: dict[int, tuple[str, str]]


class Labels:
    """Collects labels, equalities and pins; :meth:`solve` turns them into classes."""

    def __init__(self) -> None:
        self._count = 1
        self._left: list[Array] = []
        self._right: list[Array] = []
        self._made: list[Array] = []
        self._pins: list[tuple[Array, tuple[str, str]]] = []
        self._starts: dict[str, int] = {}  # node → how many equalities there were before it

    def begin(self, site: str) -> None:
        """The equalities that follow are those of ``site``."""
        self._starts[site] = len(self._left)

    def equalities(self) -> dict[str, tuple[Array, Array]]:
        """For each node that made labels equal: the two sides."""
        starts = [*self._starts.items(), ("", len(self._left))]
        return {
            site: (np.concatenate(self._left[first:last]), np.concatenate(self._right[first:last]))
            for (site, first), (_, last) in itertools.pairwise(starts)
            if last > first
        }

    def pins(self) -> dict[str, list[tuple[Array, str]]]:
        """For each node that stops removal: the labels, and why."""
        found: dict[str, list[tuple[Array, str]]] = {}
        for labels, (site, reason) in self._pins:
            found.setdefault(site, []).append((labels, reason))
        return found

    def fresh(self, shape: tuple[int, ...], *, made: bool = False) -> Array:
        """New labels; ``made`` says that a layer's weight makes these indices, so that removing them saves work."""
        size = int(np.prod(shape))
        first = self._count
        self._count += size
        labels = np.arange(first, first + size, dtype=np.int64).reshape(shape)
        if made:
            self.made(labels)
        return labels

    def made(self, labels: Array) -> None:
        """A weight makes these indices: removing them saves work."""
        self._made.append(labels.reshape(-1))

    def unify(self, left: Array, right: Array) -> None:
        """Labels at equal positions go together."""
        left, right = np.broadcast_arrays(left, right)
        different = left != right
        if different.any():
            self._left.append(left[different])
            self._right.append(right[different])

    def pin(self, labels: Array, site: str, reason: str) -> None:
        """These indices may not be removed, and why."""
        if labels.size:
            self._pins.append((np.unique(labels), (site, reason)))

    def solve(self) -> Solution:
        """Connected components of all equalities: hooking to the smallest label and pointer jumping."""
        pinned = [(labels, np.zeros_like(labels)) for labels, _ in self._pins]
        empty = np.zeros(0, dtype=np.int64)
        left = np.concatenate([empty, *self._left, *(pair[0] for pair in pinned)])
        right = np.concatenate([empty, *self._right, *(pair[1] for pair in pinned)])
        class_of = connected_components(self._count, left, right)
        removable = np.zeros(self._count, dtype=bool)
        for labels in self._made:
            removable[class_of[labels]] = True
        removable[class_of[PINNED]] = False
        return Solution(class_of, removable, self._why(left, right))

    def _why(self, left: Array, right: Array) -> dict[int, tuple[str, str]]:
        # Components without the pins themselves: so that each says which pin reached it.
        count = sum(map(len, self._left))
        component = connected_components(self._count, left[:count], right[:count])
        reasons: dict[int, tuple[str, str]] = {}
        for labels, reason in self._pins:
            for root in np.unique(component[labels]).tolist():
                reasons.setdefault(root, reason)
        self.component = component
        return reasons


def connected_components(count: int, left: Array, right: Array) -> Array:
    """The smallest member of each element's component. O((n + m) log n), vectorised."""
    parent = np.arange(count, dtype=np.int64)
    while left.size:
        a, b = parent[left], parent[right]
        open_ = a != b
        if not open_.any():
            break
        left, right, a, b = left[open_], right[open_], a[open_], b[open_]
        np.minimum.at(parent, np.maximum(a, b), np.minimum(a, b))
        while True:
            grand = parent[parent]
            if np.array_equal(grand, parent):
                break
            parent = grand
    return parent
