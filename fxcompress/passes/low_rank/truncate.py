"""The best matrix of a given rank, by eigenvectors of the smaller Gram matrix.

Let W be [rows, d] and S the metric's root. With U the leading left singular vectors of W S, the best weight of that
rank is U Uᵀ W, whatever the metric: S is never inverted. U are the eigenvectors of (W S)(W S)ᵀ, or, where d is smaller,
the orthonormal basis of W S V with V those of (W S)ᵀ(W S); without a metric W V Vᵀ is the same. They cost a fraction of
an SVD.

Where only a few of many are wanted, :mod:`~fxcompress.passes.low_rank.leading` finds them by matrix products alone, or
says that it cannot. float32 is enough for a float32 weight where what is cut off is large against the rounding of its
Gram matrix, which is looked at afterwards; all else is float64, where the Gram matrix keeps singular values down to
1e-8 of the largest.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from fxcompress.passes.low_rank.budget import eigenvectors
from fxcompress.passes.low_rank.in_place import eigh, orthonormal
from fxcompress.passes.low_rank.leading import leading, trusted
from fxcompress.passes.low_rank.metric import Metric
from fxcompress.passes.low_rank.products import Packed, square

__all__ = ["LARGE", "Factors", "gram", "product", "truncate"]

_CHUNK = 1 << 15  # elements of a weight that are taken into float64 at once: little beside a layer,
_ROWS = 64  # and rows at least: enough for a product
_PANELS = 4  # in which components are made in the precision of eigenvectors
LARGE = 512  # from this size on rounding and time are worth a thought
_FEW = 4  # times the rank, not more than the full one: few enough for a block of vectors to be faster than all
_HALF = 2  # times the rank: few enough for a block to be smaller than all


@dataclass(frozen=True)
class Factors:
    """``weight ≈ outer @ inner``.

    Attributes:
        outer: ``[groups, rows, rank]`` in the weight's dtype.
        inner: ``[groups, rank, d]``.
        energy: float64 ``[groups, …]``: squares of the singular values of W S, falling; where only the leading ones
            were looked for, those.
        total: of all of them, per group ``[groups]``.
        randomized: whether a random block found them.
    """

    outer: torch.Tensor
    inner: torch.Tensor
    energy: torch.Tensor
    total: torch.Tensor
    randomized: bool = False

    @property
    def rank(self) -> int:
        """Columns of ``outer``."""
        return self.outer.shape[-1]

    @property
    def tail(self) -> float:
        """Loss that the spectrum predicts: the energy beyond the rank."""
        if self.randomized:
            return float((self.total - self.energy[:, : self.rank].sum(-1)).clamp_min(0).sum())
        return float(self.energy[:, self.rank :].sum())


def gram(
    weight: torch.Tensor, metric: Metric, dtype: torch.dtype = torch.float64, *, spend: bool = False
) -> tuple[torch.Tensor, bool]:
    """The smaller Gram matrix of W S, ``[groups, n, n]``, and whether it is that of the rows.

    Args:
        weight: ``[groups, rows, d]``, any floating dtype; taken into ``dtype`` in pieces.
        metric: with the root S.
        dtype: of the result; float32 leaves out the jitter of a moment, which is less than its rounding.
        spend: whether the metric is needed no more, so that its moment may be let go.
    """
    rows, width = weight.shape[-2:]
    by_rows = rows <= width
    if by_rows and not metric.plain and metric.scale is None:
        return metric.by_rows(weight, _step(width, len(weight)), dtype, spend), True
    matrix = weight if by_rows else weight.mT
    size = matrix.shape[-2]
    if matrix.dtype == dtype and metric.plain:
        return (square(matrix[0])[None] if len(weight) == 1 else matrix @ matrix.mT), by_rows
    found = weight.new_zeros(len(weight), size, size, dtype=dtype)
    step = _step(size, len(weight))
    for start in range(0, matrix.shape[-1], step):
        wide = matrix[..., start : start + step].to(dtype)
        if by_rows and metric.scale is not None:
            wide = wide * metric.scale[:, None, start : start + step].to(dtype)
        found.baddbmm_(wide, wide.mT)
    return (found if by_rows else metric.congruent(found)), by_rows


def truncate(
    weight: torch.Tensor,
    metric: Metric,
    choose: int | Callable[[torch.Tensor], int],
    *,
    randomized: bool = True,
    seed: int = 0,
    room: int | None = None,
) -> Factors | int:
    """The best weight of a rank in the metric, as two factors of equal norms.

    Args:
        weight: ``[groups, rows, d]``.
        metric: what errors are measured in.
        choose: the rank, or what tells it from the energies ``[groups, n]``; all groups have the same.
        randomized: whether a random block may be tried where it costs less.
        seed: of that block.
        room: bytes of eigenvectors, with the work space of LAPACK; where all of them take more a block is also tried
            where it is slower.

    Returns:
        the factors; or the rank, where ``choose`` gives one that is not below the full rank.
    """
    full = min(weight.shape[-2:])
    if isinstance(choose, int):
        if choose >= full:
            return choose
        if full >= LARGE and len(weight) == 1:
            found = _large(weight, metric, choose, seed if randomized else None, room)
            if found is not None:
                return found
    matrix, by_rows = gram(weight, metric)
    values, vectors = eigh(matrix)
    del matrix
    energy = values.flip(-1).clamp_min(0)
    rank = choose if isinstance(choose, int) else choose(energy)
    if rank >= full:
        return rank
    vectors = vectors[..., -rank:].flip(-1)  # a copy: the others are let go
    return _factors(weight, metric, vectors, by_rows, energy, energy.sum(-1))


def _large(weight: torch.Tensor, metric: Metric, rank: int, seed: int | None, room: int | None) -> Factors | None:
    """A few leading components by a random block, or all in float32; None where neither is accurate enough."""
    narrow = (metric.plain or metric.scale is not None) and weight.dtype != torch.float64
    dtype = torch.float32 if narrow else torch.float64
    by_rows = weight.shape[-2] <= weight.shape[-1]
    full = min(weight.shape[-2:])
    tight = room is not None and eigenvectors(full, dtype.itemsize) > room
    if seed is not None and rank * (_HALF if tight else _FEW) <= full:
        held = _Gram(weight, metric, dtype, rank)
        like = weight.new_empty(0, dtype=dtype)
        found = leading(held.times, full, rank, held.trace, like=like, seed=seed)
        total = torch.tensor([held.trace()], dtype=torch.float64)
        del held
        if found is not None:
            return _factors(weight, metric, found[0][None], by_rows, found[1][None], total, randomized=True)
    if not narrow:
        return None
    values, vectors = eigh(gram(weight, metric, dtype)[0])
    energy = values.double().flip(-1).clamp_min(0)
    if not trusted(float(energy[0, 0]), float(energy[0, rank:].sum()), rank, dtype):
        return None
    vectors = vectors[..., -rank:].flip(-1)  # a copy: the others are let go
    return _factors(weight, metric, vectors, by_rows, energy, energy.sum(-1))


class _Gram:
    """The smaller Gram matrix of W S as an operator, made in the dtype of the blocks that it is asked to multiply."""

    def __init__(self, weight: torch.Tensor, metric: Metric, dtype: torch.dtype, rank: int) -> None:
        self.weight, self.metric, self.rank = weight, metric, rank
        self.make(dtype)

    def make(self, dtype: torch.dtype) -> None:
        self.dtype, self.packed = dtype, None
        self.unmade = self.metric.product(self.weight[0])
        if self.unmade is not None:
            assert self.metric.of_outputs is not None
            self.size = self.metric.of_outputs.trace * (1 + self.metric.jitter)
            return
        matrix = gram(self.weight, self.metric, dtype)[0][0]
        self.size = float(matrix.diagonal().double().sum())
        self.packed = Packed(matrix, self.rank)

    def times(self, block: torch.Tensor) -> torch.Tensor:
        if block.dtype != self.dtype:
            self.make(block.dtype)
        if self.unmade is not None:
            return self.unmade(block)
        assert self.packed is not None
        return self.packed.after(block.T).T

    def trace(self) -> float:
        return self.size


def _factors(
    weight: torch.Tensor,
    metric: Metric,
    vectors: torch.Tensor,
    by_rows: bool,
    energy: torch.Tensor,
    total: torch.Tensor,
    randomized: bool = False,
) -> Factors:
    """U Uᵀ W, its scale shared out evenly between the two factors, component by component."""
    if metric.plain and not by_rows:
        outer = product(weight, vectors)
        half = _half(torch.linalg.vector_norm(outer, dim=-2))
        inner = (vectors.mT * half[..., None]).to(weight.dtype)
        return Factors(outer.div_(half[:, None, :]).to(weight.dtype), inner, energy, total, randomized)
    if by_rows:
        basis = vectors
    else:
        seen = metric.unscaled(vectors)
        basis = orthonormal(product(weight, seen, by_columns=True))
        del seen
    del vectors
    rank = basis.shape[-1]
    inner, half = weight.new_empty(len(weight), rank, weight.shape[-1]), basis.new_empty(len(weight), rank)
    step = max(_ROWS, -(-rank // _PANELS))
    for start in range(0, rank, step):
        some = slice(start, start + step)
        part = product(weight.mT, basis[..., some]).mT  # [groups, components, d]
        half[:, some] = _half(torch.linalg.vector_norm(part, dim=-1))
        inner[:, some] = part.div_(half[:, some, None])
        del part  # before the next ones are made
    outer = weight.new_empty(basis.shape).copy_(basis.mul_(half[:, None, :]))
    return Factors(outer, inner, energy, total, randomized)


def _half(norm: torch.Tensor) -> torch.Tensor:
    return torch.where(norm > 0, norm, torch.ones_like(norm)).sqrt()


def product(weight: torch.Tensor, right: torch.Tensor, *, by_columns: bool = False) -> torch.Tensor:
    """``weight @ right`` in the dtype of ``right``, the weight taken into it in pieces."""
    shape = (len(weight), weight.shape[-2], right.shape[-1])
    made = right.new_empty(shape[0], shape[2], shape[1]).mT if by_columns else right.new_empty(shape)
    step = _step(weight.shape[-1], len(weight))
    packed = [Packed(part, step) for part in right.mT]
    for start in range(0, weight.shape[-2], step):
        for given, part, one in zip(weight, packed, made, strict=True):
            one[start : start + step] = part.after(given[start : start + step].to(right.dtype))
    return made


def _step(width: int, groups: int) -> int:
    return max(_ROWS, _CHUNK // max(1, width * groups))
