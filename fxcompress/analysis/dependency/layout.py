"""How labels lie in a tensor: each dimension is a product of factors, and a factor may carry labels.

A dimension of 768 features that a view splits into 12 heads of 64 is two factors; a flattened feature map of
``C·H·W`` is three, of which only the first carries labels. Because factors are kept, views are regroupings, and a
removed channel is followed exactly through any chain of ``reshape``, ``permute`` and ``flatten``. An index of a
dimension is removed when *any* of its factors' labels is.

Factors whose labels belong together (a vector just split in two, a permutation of channels) are axes of one
:class:`Block`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

__all__ = ["Block", "Dim", "Factor", "Layout", "inert", "regroup", "size_of", "vector"]

Array = NDArray[np.int64]


@dataclass(eq=False)
class Block:
    """Labels of one or several factors; one axis per factor."""

    labels: Array


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


def labelled(labels: Array) -> Dim:
    """A dimension with one label per index."""
    return (Factor(len(labels), Block(labels)),)


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


def vector(dim: Dim) -> Array | None:
    """One label per index of a static dimension; None where several blocks would each have a say."""
    found = blocks(dim)
    if len(found) != 1 or any(not isinstance(factor.size, int) for factor in dim):
        return None
    block = found[0]
    axes = [factor.axis for factor in dim if factor.block is not None]
    if sorted(axes) != list(range(block.labels.ndim)):
        return None
    shape = tuple(factor.size if factor.block is not None else 1 for factor in dim)
    full = tuple(factor.size for factor in dim)
    labels = block.labels.transpose(axes).reshape(shape)
    return np.broadcast_to(labels, full).reshape(-1)


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
    fresh = Block(block.labels.reshape(*shape[:axis], outer, inner, *shape[axis + 1 :]))

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
