"""Leading eigenvectors of a Gram matrix by a randomized, Chebyshev-filtered subspace iteration.

A random block, two power steps (Halko et al. 2011, arXiv:0909.4061), then filters that damp what lies below the least
Ritz value (Zhou et al. 2006, J. Comput. Phys. 219): matrix products only, a few per sweep. What a Ritz value θ may
still lack is at most ‖residual‖² / gap; the sum of these says what another matrix of the rank could gain, and the
block is handed out only where that is nothing against what every matrix of that rank loses.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

__all__ = ["block_width", "leading", "trusted"]

Product = Callable[[torch.Tensor], torch.Tensor]

_SWEEPS = 4
_GROWTH = 60.0  # of the last wanted component over the unwanted, in one filter
_DEGREE = 16  # of a filter at most
_HOPELESS = 32  # a filter that would need this degree: the spectrum is too flat at the rank
_LACKING = 5e-6  # of the loss: what the block may miss of the best one; half of that in the norm


def block_width(rank: int, full: int) -> int:
    """Columns that a rank takes, with those beyond it that make it converge."""
    return min(rank + max(16, rank // 4), full)


def leading(
    product: Product, size: int, rank: int, total: float, *, like: torch.Tensor, seed: int
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Orthonormal ``[size, rank]`` and float64 eigenvalues, falling; None where it did not converge.

    Works in the dtype of ``like``, and from there in float64 where that proves too narrow.

    Args:
        product: of the Gram matrix and a block, in the block's dtype.
        size: of the Gram matrix.
        rank: columns wanted.
        total: its trace.
        like: of the dtype and device to start with.
        seed: of the random block.
    """
    generator = torch.Generator(device=like.device).manual_seed(seed)
    width = block_width(rank, size)
    block = torch.randn(size, width, generator=generator, device=like.device, dtype=like.dtype)
    for _ in range(2):
        block = torch.linalg.qr(product(block)).Q
    for sweep in range(_SWEEPS + 1):
        image = product(block)
        ritz, turned = torch.linalg.eigh((block.mT @ image).double())
        ritz, turned = ritz.flip(-1).clamp_min(0), turned.flip(-1).to(block.dtype)
        wanted, floor = ritz[:rank], float(ritz[-1])
        top, last = float(wanted[0]), float(wanted[-1])
        loss = total - float(wanted.sum())
        if not last > 0 or loss <= 0:
            return None
        if not trusted(top, loss, rank, block.dtype):
            if block.dtype == torch.float64:
                return None
            block = torch.linalg.qr(block.double()).Q
            continue
        block, image = block @ turned, image @ turned
        residual = (image[:, :rank] - block[:, :rank] * wanted.to(block.dtype)).square().sum(0).double()
        del image
        missing = residual / torch.maximum(wanted - floor, residual.sqrt()).clamp_min(1e-300)
        if float(missing.sum()) <= _LACKING * loss:
            return block[:, :rank], wanted
        edge = 2 * last / max(floor, 1e-300) - 1
        degree = math.ceil(math.acosh(_GROWTH) / math.acosh(edge)) if edge > 1 else _HOPELESS
        if sweep == _SWEEPS or degree >= _HOPELESS:
            return None
        block = torch.linalg.qr(_filtered(product, block, floor, min(degree, _DEGREE), top)).Q
    return None


def trusted(largest: float, loss: float, rank: int, dtype: torch.dtype) -> bool:
    """Whether rounding of the Gram matrix, a few units of its largest eigenvalue, is nothing against the loss."""
    return 10 * torch.finfo(dtype).eps * largest * math.sqrt(rank) <= 2 * _LACKING * loss


def _filtered(product: Product, block: torch.Tensor, floor: float, degree: int, top: float) -> torch.Tensor:
    """The Chebyshev polynomial of [0, floor], scaled to about one at ``top``, of the matrix times ``block``."""
    half = floor / 2
    scale = half / (top - half)
    first = scale
    before, now = block, (product(block) - half * block) * (first / half)
    for _ in range(degree - 1):
        after = 1 / (2 / first - scale)
        before, now = now, (product(now) - half * now) * (2 * after / half) - before * (scale * after)
        scale = after
    return now
