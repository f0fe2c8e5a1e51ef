"""Tucker decomposition of a kernel along its input and output channels, and the ranks that noise leaves."""

from __future__ import annotations

import math

import torch

__all__ = ["tucker2", "vbmf_rank"]

_SWEEPS = 3


def tucker2(kernel: torch.Tensor, inner: int, outer: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """HOSVD, then sweeps of HOOI: each basis is the best for the other.

    Args:
        kernel: ``[groups, out, in, k²]``.
        inner: rank of the input channels.
        outer: rank of the output channels.

    Returns:
        float64 bases ``[groups, in, inner]`` and ``[groups, out, outer]``, and the core ``[groups, outer, inner, k²]``.
    """
    wide = kernel.double()
    left = _leading(wide.flatten(2), outer)
    right = _leading(wide.transpose(1, 2).flatten(2), inner)
    for _ in range(_SWEEPS):
        right = _leading(torch.einsum("goik,gos->gisk", wide, left).flatten(2), inner)
        left = _leading(torch.einsum("goik,gir->gork", wide, right).flatten(2), outer)
    return right, left, torch.einsum("goik,gos,gir->gsrk", wide, left, right)


def _leading(matrix: torch.Tensor, rank: int) -> torch.Tensor:
    """Leading left singular vectors; the whole space where the rank is that of the rows."""
    return torch.linalg.eigh(matrix @ matrix.mT)[1][..., -rank:].flip(-1)


def vbmf_rank(matrix: torch.Tensor) -> int:
    """The rank that empirical variational Bayesian matrix factorization finds, with the noise estimated.

    The global analytic solution (Nakajima et al. 2013, JMLR 14): singular values beyond a threshold that the noise
    variance sets are kept; the variance minimises a function of one variable, here on a grid that is refined twice.

    Args:
        matrix: ``[rows, columns]``.
    """
    matrix = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    rows, columns = matrix.shape
    values = torch.linalg.eigvalsh(matrix.double() @ matrix.double().T).flip(0).clamp_min(0)  # squares
    if not float(values.sum()) > 0:
        return 1
    alpha = rows / columns
    tau = 2.5129 * math.sqrt(alpha)
    edge = (1 + tau) * (1 + alpha / tau)
    index = min(math.ceil(rows / (1 + alpha)) - 1, rows) - 1
    upper = float(values.sum()) / (rows * columns)
    rest = values[index + 1 :]
    lower = max(float(rest[0]) / (columns * edge), float(rest.mean()) / columns) if len(rest) else upper * 1e-6
    lower = min(max(lower, upper * 1e-12), upper)
    for _ in range(3):
        grid = torch.logspace(math.log10(lower), math.log10(upper), 200, dtype=torch.float64)
        scores = torch.stack([_free_energy(values, float(noise), columns, alpha, edge) for noise in grid])
        best = int(scores.argmin())
        lower, upper = float(grid[max(0, best - 1)]), float(grid[min(len(grid) - 1, best + 1)])
    noise = float(grid[best])
    return max(1, int((values > columns * noise * edge).sum()))


def _free_energy(values: torch.Tensor, noise: float, columns: int, alpha: float, edge: float) -> torch.Tensor:
    scaled = (values / (columns * noise)).clamp_min(1e-300)
    kept = scaled[scaled > edge]
    left = scaled[scaled <= edge]
    inside = kept - (1 + alpha)
    tau = 0.5 * (inside + (inside.square() - 4 * alpha).clamp_min(0).sqrt())
    terms = (left - left.log()).sum() + (kept - tau).sum()
    return terms + ((tau + 1) / kept).log().sum() + alpha * (tau / alpha + 1).log().sum()
