"""Weights that make up for their neighbours' zeros: one input after the other, as the second moment of inputs tells.

SparseGPT (Frantar & Alistarh 2023), an optimal brain surgeon (Hassibi & Stork 1993) whose Hessian all rows share: with
H = Σ x xᵀ and U the upper Cholesky factor of H⁻¹, zeroing w_j costs w_j² / U_jj², and the best that later inputs can do
is w − (w_j / U_jj) U_j.
"""

from __future__ import annotations

import torch

from fxcompress.passes.sparsity.select import in_blocks, of_layer

__all__ = ["sparsify"]

_DAMPING = 0.01
_WIDTH = 128  # inputs whose zeros are chosen at once, as in the paper


def sparsify(weight: torch.Tensor, moment: torch.Tensor, share: float, pattern: tuple[int, int] | None) -> torch.Tensor:
    """The weight with zeros, and with the rest adjusted.

    Args:
        weight: ``[groups, rows, d]``.
        moment: H, ``[groups, d, d]``.
        share: of zeros, in every block of inputs.
        pattern: ``(n, m)`` leaves ``n`` of every ``m`` neighbouring inputs in place of ``share``.

    Returns:
        float64, of the weight's shape.
    """
    rest = weight.double().clone()
    factor = _factor(moment.double())
    scale = factor.diagonal(dim1=1, dim2=2)[:, None, :]  # [groups, 1, d]
    total = rest.shape[2]
    width = _WIDTH if pattern is None else _WIDTH // pattern[1] * pattern[1] or pattern[1]
    for start in range(0, total, width):
        stop = min(start + width, total)
        part, own = rest[..., start:stop].clone(), factor[:, start:stop, start:stop]
        errors = torch.zeros_like(part)
        gone = torch.zeros_like(part, dtype=torch.bool)
        if pattern is None:
            gone = of_layer(_cost(part, scale[..., start:stop]), share)
        for column in range(stop - start):
            if pattern is not None and column % pattern[1] == 0:
                window = slice(column, column + pattern[1])
                gone[..., window] = in_blocks(
                    _cost(part[..., window], scale[..., start:stop][..., window]), 2, *pattern
                )
            value = part[..., column]
            error = value * gone[..., column] / own[:, column, column, None]
            part[..., column:] -= error[..., None] * own[:, None, column, column:]
            errors[..., column] = error
        rest[..., start:stop] = part.masked_fill(gone, 0)
        rest[..., stop:] -= errors @ factor[:, start:stop, stop:]
    return rest


def _cost(part: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """What zeroing each weight costs; -1 where it is zero already."""
    return (part / scale).square().masked_fill(part == 0, -1)


def _factor(hessian: torch.Tensor) -> torch.Tensor:
    diagonal = hessian.diagonal(dim1=1, dim2=2)
    mean = diagonal.mean(1, keepdim=True).clamp_min(1e-30)
    # An input that was never active has no say: its weights go first, and nobody makes up for them.
    damped = hessian + torch.diag_embed(torch.where(diagonal <= 0, mean, _DAMPING * mean.expand_as(diagonal)))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return torch.linalg.cholesky(inverse, upper=True)
