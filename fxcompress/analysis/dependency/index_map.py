"""Which index of one dimension an operation ties to which index of another."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fxcompress.analysis.dependency.dimensions import Equal
from fxcompress.analysis.dependency.labels import PINNED
from fxcompress.analysis.dependency.layout import Block, Dim, blocks, size_of

__all__ = ["IndexMap", "index_map"]

Array = NDArray[np.int64]


@dataclass(frozen=True)
class IndexMap:
    """Pairs of indices that go together, ``source[k]`` with ``target[k]``, ascending in the source.

    Attributes:
        op: the operation; ``node`` where it stands.
    """

    source: Array
    target: Array
    op: str
    node: str

    def __str__(self) -> str:
        if not len(self.source):
            return "nothing"
        shift = np.unique(self.target - self.source)
        whole = len(np.unique(self.source)) == len(self.source) == len(np.unique(self.target))
        if whole and len(shift) == 1:
            offset = int(shift[0])
            first, last = int(self.source[0]), int(self.source[-1])
            same = f"i + {offset}" if offset > 0 else f"i - {-offset}" if offset else "i"
            return f"i → {same}, {first} ≤ i ≤ {last}"
        shown = [f"{i} → {j}" for i, j in zip(self.source[:6].tolist(), self.target[:6].tolist(), strict=True)]
        return ", ".join([*shown, "…"] if len(self.source) > 6 else shown)


def index_map(left: Dim, right: Dim, equal: Equal) -> tuple[Array, Array] | None:
    """Pairs of indices of two dimensions with the same labels; None where a size is symbolic.

    Where both dimensions are products of several labelled factors, indices must agree in all that they share.
    """
    if not isinstance(size_of(left), int) or not isinstance(size_of(right), int):
        return None
    columns: list[tuple[Array, Array]] = []
    for block in blocks(left):
        mine = equal(_along(left, block))
        for other in blocks(right):
            theirs = equal(_along(right, other))
            if np.intersect1d(mine[mine != PINNED], theirs).size:
                columns.append((mine, theirs))
                break
    if not columns:
        empty = np.zeros(0, dtype=np.int64)
        return empty, empty
    count = len(columns[0][0])
    stacked = np.concatenate([np.stack([pair[side] for pair in columns], axis=1) for side in (0, 1)])
    _, key = np.unique(stacked, axis=0, return_inverse=True)
    key = key.reshape(-1)
    pinned = (stacked == PINNED).any(axis=1)
    places = [np.flatnonzero(~pinned[:count]), np.flatnonzero(~pinned[count:])]
    return _joined(places[0], key[:count][places[0]], places[1], key[count:][places[1]])


def _along(dim: Dim, block: Block) -> Array:
    """The block's label at each index of the dimension."""
    axes = [factor.axis for factor in dim if factor.block is block]
    rest = tuple(axis for axis in range(block.labels.ndim) if axis not in axes)
    labels = block.labels.transpose(*axes, *rest)
    if rest:  # its other axes lie in other dimensions: indices that differ there go together
        labels = labels.reshape(*labels.shape[: len(axes)], -1)[..., 0]
    shape = tuple(factor.size if factor.block is block else 1 for factor in dim)
    return np.broadcast_to(labels.reshape(shape), tuple(factor.size for factor in dim)).reshape(-1)


def _joined(left: Array, left_key: Array, right: Array, right_key: Array) -> tuple[Array, Array]:
    """All pairs with equal keys."""
    order = np.argsort(right_key, kind="stable")
    ordered = right_key[order]
    first, last = np.searchsorted(ordered, left_key, "left"), np.searchsorted(ordered, left_key, "right")
    counts = last - first
    start = np.repeat(first - np.concatenate([[0], np.cumsum(counts)[:-1]]), counts) if counts.size else counts
    return np.repeat(left, counts), right[order[start + np.arange(int(counts.sum()))]]
