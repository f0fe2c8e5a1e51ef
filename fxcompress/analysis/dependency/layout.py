"""How labels lie in a tensor: each dimension is a product of factors, and a factor may carry labels.

A dimension of 768 features that a view splits into 12 heads of 64 is two factors; a flattened feature map of
``C·H·W`` is three, of which only the first carries labels. Because factors are kept, views are regroupings, and a
removed channel is followed exactly through any chain of ``reshape``, ``permute`` and ``flatten``. An index of a
dimension is removed when *any* of its factors' labels is.

Factors whose labels belong together (a vector just split in two, a permutation of channels) are axes of one
:class:`Block`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

__all__ = [
    "Block",
    "Dim",
    "Factor",
    "Layout",
    "inert",
    "labelled",
    "matching",
    "regroup",
    "size_of",
    "spread",
    "vector",
]

Array = NDArray[np.int64]
Dirt = NDArray[np.bool_]


@dataclass(eq=False)
class Block:
    """Labels of one or several factors; one axis per factor.

    Attributes:
        labels: one per index.
        dirty: whether the value holds anything but zero at an index once all weights of its class are zeroed; one for
            all indices, or one each. A linear layer leaves zeros, ``sigmoid`` of them does not.
        soft: it comes from repeating one number (``expand``, ``zeros``) and could be cut anywhere; where it meets a
            split that it cannot follow, it stays whole instead of holding the other back.
    """

    labels: Array
    dirty: Any = False
    soft: bool = False

    @property
    def dirt(self) -> Dirt:
        """``dirty``, one for each label."""
        return np.broadcast_to(np.asarray(self.dirty, dtype=bool), self.labels.shape)

    def cleaned(self) -> Block:
        """The same labels in a value that is zero where they are removed."""
        return self if self.dirty is False and not self.soft else Block(self.labels)

    def moved(self, move: Callable[[Any], Any]) -> Block:
        """The block after ``move``, which reshapes or reorders an array."""
        dirty = self.dirty if isinstance(self.dirty, bool) else move(self.dirt)
        return Block(move(self.labels), dirty, self.soft)


@dataclass(frozen=True)
class Factor:
    """One factor of a dimension: ``size`` indices, with the labels along ``axis`` of ``block`` if there is one."""

    size: Any
    block: Block | None = field(default=None, compare=False)
    axis: int = 0


Dim = tuple[Factor, ...]
Layout = tuple[Dim, ...]


def inert(size: Any) -> Dim:
    """A dimension that nothing can be removed from and that stands in nobody's way: batch, height, width, tokens."""
    return (Factor(_plain(size)),)


def labelled(labels: Array, dirty: Any = False, *, soft: bool = False) -> Dim:
    """A dimension with one label per index."""
    return (Factor(len(labels), Block(np.ascontiguousarray(labels), dirty, soft)),)


def size_of(dim: Dim) -> Any:
    """Number of indices: an int, or an expression where a size is symbolic."""
    size: Any = 1
    for factor in dim:
        size = size * factor.size
    return size


def is_live(dim: Dim) -> bool:
    """Whether any factor carries labels."""
    return any(factor.block is not None for factor in dim)


def blocks(dim: Dim) -> list[Block]:
    """The distinct blocks of a dimension, in order."""
    found: list[Block] = []
    for factor in dim:
        if factor.block is not None and all(factor.block is not known for known in found):
            found.append(factor.block)
    return found


def spread(dim: Dim) -> tuple[Array, Dirt] | None:
    """Label and dirt of each index of a static dimension; None where several blocks would each have a say."""
    found = blocks(dim)
    if len(found) != 1 or any(not isinstance(factor.size, int) for factor in dim):
        return None
    block = found[0]
    axes = [factor.axis for factor in dim if factor.block is not None]
    if sorted(axes) != list(range(block.labels.ndim)):
        return None
    shape = tuple(factor.size if factor.block is not None else 1 for factor in dim)
    full = tuple(factor.size for factor in dim)

    def each(values: Any) -> Any:
        return np.broadcast_to(values.transpose(axes).reshape(shape), full).reshape(-1)

    return each(block.labels), each(block.dirt)


def vector(dim: Dim) -> Array | None:
    """One label per index of a static dimension; None where several blocks would each have a say."""
    found = spread(dim)
    return None if found is None else found[0]


def gathered(dim: Dim, values: Dirt) -> Dirt:
    """One value per index of a static dimension brought back to its only block: true where any index is."""
    axes = [factor.axis for factor in dim if factor.block is not None]
    rest = tuple(place for place, factor in enumerate(dim) if factor.block is None)
    full = values.reshape(tuple(factor.size for factor in dim))
    return np.asarray(full.any(axis=rest)).transpose(np.argsort(axes)) if rest else full.transpose(np.argsort(axes))


def matching(left: Dim, right: Dim) -> list[tuple[Block, Block]] | None:
    """Pairs of blocks of two dimensions that have the same factors, with blocks on the same ones; else None."""
    left = tuple(factor for factor in left if factor.size != 1)
    right = tuple(factor for factor in right if factor.size != 1)
    if [factor.size for factor in left] != [factor.size for factor in right]:
        return None
    pairs: list[tuple[Block, Block]] = []
    for a, b in zip(left, right, strict=True):
        if (a.block is None) != (b.block is None):
            return None
        if a.block is None or b.block is None:
            continue
        if a.axis != b.axis or a.block.labels.shape != b.block.labels.shape:
            return None
        if not any(a.block is x and b.block is y for x, y in pairs):
            if any(a.block is x or b.block is y for x, y in pairs):
                return None
            pairs.append((a.block, b.block))
    return pairs


def redone(dim: Dim, change: Callable[[Block], Block]) -> Dim:
    """The dimension with each of its blocks changed; axes stay."""
    fresh = {id(block): change(block) for block in blocks(dim)}
    return tuple(
        factor if factor.block is None else Factor(factor.size, fresh[id(factor.block)], factor.axis) for factor in dim
    )


def distinct(layout: Layout) -> Layout:
    """The layout with a block of its own in each dimension: ``x·xᵀ`` has the same channels twice, removable apart."""
    seen: set[int] = set()
    result = []
    for dim in layout:
        own = {id(block) for block in blocks(dim)}
        result.append(redone(dim, lambda block: block.moved(lambda values: values)) if own & seen else dim)
        seen |= own
    return tuple(result)


def cleaned(dim: Dim) -> Dim:
    """The dimension of a value that is zero at all removed indices."""
    return redone(dim, Block.cleaned)


def dirtied(dim: Dim) -> Dim:
    """The dimension of a value that holds something at every index, removed or not."""
    if all(block.dirty is True for block in blocks(dim)):
        return dim
    return redone(dim, lambda block: Block(block.labels, True, block.soft))


def _plain(size: Any) -> Any:
    if isinstance(size, torch.SymInt):
        expression = size.node.expr
        return int(expression) if expression.is_number else expression
    return int(size)


def regroup(layout: Sequence[Dim], sizes: Sequence[Any]) -> list[list[Factor]] | None:
    """The factors of ``layout``, in order, dealt out to dimensions of the given sizes; split where a size demands it.

    None where the sizes do not fall on factors: then a view mixes what cannot be followed.
    """
    pending = [factor for dim in layout for factor in dim if factor.size != 1]
    wanted = [_plain(size) for size in sizes]
    result: list[list[Factor]] = []
    for size in wanted:
        taken: list[Factor] = []
        rest = size
        while rest != 1:
            if not pending:
                return None
            factor = pending[0]
            quotient = _divide(rest, factor.size)
            if quotient is not None:
                taken.append(pending.pop(0))
                rest = quotient
                continue
            inner = _divide(factor.size, rest)
            if inner is None or not isinstance(inner, int) or not isinstance(rest, int):
                return None
            head, tail = _split(factor, rest, inner, pending, result, taken)
            taken.append(head)
            pending[0] = tail
            rest = 1
        result.append(taken)
    return result if not pending else None


def _divide(whole: Any, part: Any) -> Any | None:
    if isinstance(whole, int) and isinstance(part, int):
        return whole // part if part and whole % part == 0 else None
    quotient = whole / part
    if getattr(quotient, "is_integer", False) and quotient.is_number:
        return int(quotient)
    numerator, denominator = quotient.as_numer_denom() if hasattr(quotient, "as_numer_denom") else (quotient, 1)
    return numerator if denominator == 1 and quotient.is_integer is not False else None


def _split(factor: Factor, outer: int, inner: int, pending: list[Factor], *placed: Any) -> tuple[Factor, Factor]:
    """Split a factor in two; a block gets one axis more, and every factor on it is renumbered."""
    block = factor.block
    if block is None:
        return Factor(outer), Factor(inner)
    shape = block.labels.shape
    axis = factor.axis
    fresh = block.moved(lambda values: values.reshape(*shape[:axis], outer, inner, *shape[axis + 1 :]))

    def moved(other: Factor) -> Factor:
        if other.block is not block:
            return other
        return Factor(other.size, fresh, other.axis + (other.axis > axis))

    pending[:] = [moved(other) for other in pending]
    for group in placed:
        for index, item in enumerate(group):
            if isinstance(item, Factor):
                group[index] = moved(item)
            else:
                item[:] = [moved(other) for other in item]
    return Factor(outer, fresh, axis), Factor(inner, fresh, axis + 1)
