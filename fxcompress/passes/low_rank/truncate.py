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
from dataclasses import dataclass, replace

import torch

from fxcompress.passes.low_rank.budget import LARGE, eigenvectors
from fxcompress.passes.low_rank.grams import Unmade, gram, of_rows, operator, pieces
from fxcompress.passes.low_rank.in_place import eigh, orthonormal
from fxcompress.passes.low_rank.leading import captured, density, leading, trusted
from fxcompress.passes.low_rank.metric import Metric
from fxcompress.passes.low_rank.products import Packed
from fxcompress.passes.low_rank.spectra import may_be_crowded, spectrum, told

__all__ = ["Factors", "product", "truncate"]

_ROWS = 64  # components that are made at once, at least
_UNCOPIED = 8  # times as many rows of a weight are multiplied at once where they need not be converted
_PANELS = 4  # in which components are made in the precision of eigenvectors
_FEW = 4  # times the rank, not more than the full one: few enough for a block of vectors to be faster than all
_MORE = 8  # components at least that a search looks for beyond the guess,
_MARGIN = 16  # and this share of them
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

    def first(self, rank: int) -> Factors:
        """The leading components alone."""
        outer, inner = self.outer[..., :rank].clone(), self.inner[:, :rank].clone()  # the others are let go
        return replace(self, outer=outer, inner=inner)

    @property
    def tail(self) -> float:
        """Loss that the spectrum predicts: the energy beyond the rank."""
        if self.randomized:
            return float((self.total - self.energy[:, : self.rank].sum(-1)).clamp_min(0).sum())
        return float(self.energy[:, self.rank :].sum())


def truncate(
    weight: torch.Tensor,
    metric: Metric,
    choose: int | Callable[[torch.Tensor], int],
    *,
    randomized: bool = True,
    seed: int = 0,
    room: int | None = None,
    limit: int | None = None,
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
        limit: a rank from which on no factors are wanted.

    Returns:
        the factors; or the rank, where ``choose`` gives one that is not below the full rank, or the limit.
    """
    full = min(weight.shape[-2:])
    if not isinstance(choose, int):
        searched = _searched(weight, metric, choose, seed if randomized else None, room, min(limit or full, full))
        if searched is not None:
            return searched
    else:
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


def _searched(
    weight: torch.Tensor,
    metric: Metric,
    choose: Callable[[torch.Tensor], int],
    seed: int | None,
    room: int | None,
    limit: int,
) -> Factors | int | None:
    """By a block of a few more components than are needed, which tells all that ``choose`` has to know.

    None where that finds nothing, or where there is room for all eigenvectors.
    """
    full = min(weight.shape[-2:])
    crowded = room is not None and eigenvectors(full, torch.float64.itemsize) + metric.held > room
    if seed is None or not crowded or not may_be_crowded(weight):
        return None
    half, known = full // _HALF, False
    guess = choose(_estimate(weight, metric, seed)[None])
    while True:
        near = guess + guess // _MARGIN >= limit  # a guess is off by as much
        if not known and (near or guess > half):
            energies = spectrum(weight, metric, room=room)
            guess, known = choose(energies), True
            if not told(energies[0], guess):
                guess = choose(spectrum(weight, metric))
            if guess >= limit:
                return guess
        if guess > half:
            return _large(weight, metric, guess, None, room)
        rank = min(guess + max(_MORE, guess // _MARGIN), half)
        found = _large(weight, metric, rank, seed, room)
        if found is None:
            return None
        if found.randomized:  # what lies beyond is one more component: if it is needed, nobody knows how many are
            rest = (found.total - found.energy.sum(-1)).clamp_min(0)
            needed = choose(torch.cat([found.energy, rest[:, None]], -1))
        else:
            needed = choose(found.energy)
            if needed >= limit:
                return needed
        if needed <= found.rank:
            return found.first(needed)
        guess = max(needed, rank + 1, rank + rank // _MARGIN)


def _estimate(weight: torch.Tensor, metric: Metric, seed: int) -> torch.Tensor:
    """About the energies, ``[n]``."""
    narrow = metric.plain or metric.scale is not None
    like = weight.new_empty(0, dtype=torch.float32 if narrow else torch.float64)
    held = operator(weight, metric, like.dtype, LARGE, tight=True)
    return density(held.times, held.size, like=like, seed=seed)[: min(weight.shape[-2:])]


def _large(weight: torch.Tensor, metric: Metric, rank: int, seed: int | None, room: int | None) -> Factors | None:
    """A few leading components by a random block, or all in float32; None where neither is accurate enough."""
    narrow = (metric.plain or metric.scale is not None) and weight.dtype != torch.float64
    dtype = torch.float32 if narrow else torch.float64
    by_rows, full = of_rows(weight, metric), min(weight.shape[-2:])
    if metric.by_moment and metric.singular and rank >= metric.rows:
        seed = None  # beyond its rows the data tells nothing: what is left are equal components of the jitter
    tight = room is not None and eigenvectors(full, dtype.itemsize) + metric.held > room
    if seed is not None and rank * (_HALF if tight else _FEW) <= full:
        held = operator(weight, metric, dtype, rank, tight)
        like = weight.new_empty(0, dtype=dtype)
        found = leading(held.times, held.size, rank, held.trace, like=like, seed=seed)
        if found is None and tight and weight.dtype != torch.float64:
            found = captured(held.times, held.size, rank, held.trace, like=like.double(), seed=seed)
        total = torch.tensor([held.trace()], dtype=torch.float64, device=weight.device)
        by_rows = by_rows or isinstance(held, Unmade)
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
    step = pieces(weight.shape[-1], len(weight)) * (_UNCOPIED if weight.dtype == right.dtype else 1)
    packed = [Packed(part, step) for part in right.mT]
    for start in range(0, weight.shape[-2], step):
        for given, part, one in zip(weight, packed, made, strict=True):
            one[start : start + step] = part.after(given[start : start + step].to(right.dtype))
    return made
