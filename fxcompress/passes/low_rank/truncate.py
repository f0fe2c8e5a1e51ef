"""The best matrix of a given rank, by an eigendecomposition of the smaller Gram matrix.

Let W be [rows, d] and S the metric's root. With U the leading left singular vectors of W S, the best weight of that
rank is U Uᵀ W, whatever the metric: S is never inverted. U are the eigenvectors of (W S)(W S)ᵀ, or, where d is smaller,
the orthonormal basis of W S V with V those of (W S)ᵀ(W S). In float64 the Gram matrix keeps singular values down to
1e-8 of the largest, and its eigenvectors cost a fraction of an SVD.

A small rank of a large matrix is first tried with a randomized range finder (Halko et al. 2011, arXiv:0909.4061). It is
accepted only if one more power iteration does not capture more; else the decomposition above follows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from fxcompress.passes.low_rank.metric import Metric

__all__ = ["Factors", "gram", "spectrum", "truncate"]

_CHUNK = 1 << 21  # elements of a weight that are taken into float64 at once
_LARGE = 1024  # from this size on a randomized decomposition is tried
_CAPTURED = 1e-7  # of the energy: what one more power iteration may still gain


@dataclass(frozen=True)
class Factors:
    """``weight ≈ outer @ inner``.

    Attributes:
        outer: ``[groups, rows, rank]`` in the weight's dtype.
        inner: ``[groups, rank, d]``.
        energy: float64 ``[groups, …]``: squares of the singular values of W S, falling; of a randomized
            decomposition the leading ones only.
        total: of all of them, per group ``[groups]``.
        randomized: whether the range finder was accurate enough.
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


def gram(weight: torch.Tensor, metric: Metric) -> tuple[torch.Tensor, bool]:
    """The smaller Gram matrix of W S, float64 ``[groups, n, n]``, and whether it is that of the rows.

    Args:
        weight: ``[groups, rows, d]``, any floating dtype; taken into float64 in pieces.
        metric: with the root S.
    """
    rows, width = weight.shape[-2:]
    by_rows = rows <= width
    if by_rows:
        if not metric.plain:
            return metric.by_rows(weight.double()), True
        found = weight.new_zeros(len(weight), rows, rows, dtype=torch.float64)
        for piece in weight.split(_step(rows, len(weight)), -1):
            wide = piece.double()
            found.baddbmm_(wide, wide.mT)
        return found, True
    found = weight.new_zeros(len(weight), width, width, dtype=torch.float64)
    for piece in weight.split(_step(width, len(weight)), -2):
        wide = metric.scaled(piece.double())
        found.baddbmm_(wide.mT, wide)
    return found, False


def spectrum(weight: torch.Tensor, metric: Metric) -> torch.Tensor:
    """Squares of the singular values of W S, falling, float64 ``[groups, min(rows, d)]``."""
    values = torch.linalg.eigvalsh(gram(weight, metric)[0])
    return values.flip(-1).clamp_min(0)


def truncate(
    weight: torch.Tensor,
    metric: Metric,
    choose: int | Callable[[torch.Tensor], int],
    *,
    randomized: bool = True,
    seed: int = 0,
) -> Factors | int:
    """The best weight of a rank in the metric, as two factors of equal norms.

    Args:
        weight: ``[groups, rows, d]``.
        metric: what errors are measured in.
        choose: the rank, or what tells it from the energies ``[groups, n]``; all groups have the same.
        randomized: whether the range finder may be tried.
        seed: of the range finder.

    Returns:
        the factors; or the rank, where ``choose`` gives one that is not below the full rank.
    """
    full = min(weight.shape[-2:])
    if isinstance(choose, int):
        if choose >= full:
            return choose
        if randomized and full >= _LARGE and choose * 8 <= full and len(weight) == 1:
            found = _range_finder(weight, metric, choose, seed)
            if found is not None:
                return found
    matrix, by_rows = gram(weight, metric)
    values, vectors = torch.linalg.eigh(matrix)
    del matrix
    energy = values.flip(-1).clamp_min(0)
    rank = choose if isinstance(choose, int) else choose(energy)
    if rank >= full:
        return rank
    leading = vectors[..., -rank:].flip(-1)
    del vectors
    if not by_rows:
        leading = torch.linalg.qr(_product(weight, metric.unscaled(leading))).Q
    return _factors(weight, leading, energy, energy.sum(-1))


def _factors(
    weight: torch.Tensor, basis: torch.Tensor, energy: torch.Tensor, total: torch.Tensor, randomized: bool = False
) -> Factors:
    """U Uᵀ W, its scale shared out evenly between the two factors, component by component."""
    inner = _product(weight.mT, basis).mT  # [groups, rank, d]
    norm = inner.norm(dim=-1)
    half = torch.where(norm > 0, norm, torch.ones_like(norm)).sqrt()
    outer, inner = basis * half[:, None, :], inner / half[..., None]
    return Factors(outer.to(weight.dtype), inner.to(weight.dtype), energy, total, randomized)


def _range_finder(weight: torch.Tensor, metric: Metric, rank: int, seed: int) -> Factors | None:
    """Two subspace iterations with oversampling; None where they did not converge."""
    width = min(rank + max(16, rank // 4), min(weight.shape[-2:]))
    matrix = weight.float() if metric.plain else metric.scaled(weight.double()).to(torch.float32)
    generator = torch.Generator(device=weight.device).manual_seed(seed)
    start = torch.randn(1, matrix.shape[-1], width, generator=generator, device=weight.device)
    basis = torch.linalg.qr(matrix @ start).Q
    captured: list[torch.Tensor] = []
    for _ in range(3):
        small = matrix.mT @ basis
        values, turned = torch.linalg.eigh(small.mT.double() @ small.double())
        captured.append(values[..., -rank:].sum(-1))
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(small).Q).Q
    total = matrix.double().square().sum((-2, -1))
    if float(((captured[-1] - captured[-2]) / total.clamp_min(1e-300)).abs().max()) > _CAPTURED:
        return None
    small = (matrix.mT @ basis).double()
    values, turned = torch.linalg.eigh(small.mT @ small)
    leading = basis.double() @ turned[..., -rank:].flip(-1)
    return _factors(weight, leading, values.flip(-1).clamp_min(0), total, randomized=True)


def _product(weight: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """``weight @ right`` in float64, the weight taken into it in pieces."""
    pieces = weight.split(_step(weight.shape[-1], len(weight)), -2)
    return torch.cat([piece.double() @ right for piece in pieces], -2)


def _step(width: int, groups: int) -> int:
    return max(1, _CHUNK // max(1, width * groups))
