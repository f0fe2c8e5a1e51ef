"""What the error of a weight is measured in: plain, or on the data that the layer reads.

With C = Σ x xᵀ over calibration data, the loss of W' is exactly Σ ‖W x − W' x‖² = tr(E C Eᵀ), E = W − W'. Any root S
with S Sᵀ = C turns it into the Frobenius norm of E S, which the truncated SVD of W S minimises (SVD-LLM, Wang et al.
2024, arXiv:2403.07378). ASVD (Yuan et al. 2023, arXiv:2312.05821) takes for S a diagonal of mean absolute values.

Everything is float64 and batched over the groups of a convolution, ``[groups, …]``; a linear layer has one group.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fxcompress.analysis.statistics import Moments

__all__ = ["Metric", "data_metric", "diagonal_metric", "plain_metric"]

_JITTER = 1e-8  # of the mean variance; grows tenfold until the Cholesky factor exists


@dataclass(frozen=True)
class Metric:
    """A root S of what errors are weighted with.

    Attributes:
        root: lower triangular ``[groups, d, d]``, diagonal ``[groups, d]``, or None for the identity.
        moment: Σ x xᵀ of the data as it is, ``[groups, d, d]``, for the loss; None without data.
        jitter: added to the diagonal of the moment, relative to its mean, so that the root exists; 0 if none was.
        rows: of the data; 0 without.
    """

    root: torch.Tensor | None = None
    moment: torch.Tensor | None = None
    jitter: float = 0.0
    rows: int = 0

    def scaled(self, weight: torch.Tensor) -> torch.Tensor:
        """``weight · S`` for a float64 weight ``[groups, rows, d]``."""
        if self.root is None:
            return weight
        return weight * self.root[:, None, :] if self.root.dim() == 2 else weight @ self.root

    def loss(self, error: torch.Tensor) -> torch.Tensor:
        """tr(E C Eᵀ) on the data (without data: ‖E‖²) of ``[groups, rows, d]``, summed."""
        if self.moment is None:
            return error.square().sum()
        return ((error @ self.moment) * error).sum()


def plain_metric() -> Metric:
    """Every entry of the weight counts the same."""
    return Metric()


def data_metric(moments: Moments, *, centred: bool = False) -> Metric:
    """The loss on the data that ``moments`` were collected on.

    Args:
        moments: of the layer's input.
        centred: of x − mean(x): for a layer whose bias takes up what the mean loses.
    """
    moment = moments.covariance * moments.count if centred else moments.total
    root, jitter = _root(moment, singular=moments.count <= moment.shape[-1])
    return Metric(root, moment, jitter, moments.count)


def diagonal_metric(moments: Moments, mean_abs: torch.Tensor, alpha: float) -> Metric:
    """Inputs weighted with their mean absolute value to the power of ``alpha`` (ASVD); the loss is that on the data.

    Args:
        moments: of the layer's input.
        mean_abs: ``[groups, d]``.
        alpha: 0 is the plain metric.
    """
    scale = mean_abs.clamp_min(1e-6 * float(mean_abs.mean()) or 1.0).pow(alpha)
    return Metric(scale, moments.total, 0.0, moments.count)


def _root(moment: torch.Tensor, *, singular: bool) -> tuple[torch.Tensor, float]:
    mean = moment.diagonal(dim1=-2, dim2=-1).mean(-1)
    mean = torch.where(mean > 0, mean, torch.ones_like(mean))[:, None, None]
    one = torch.eye(moment.shape[-1], dtype=moment.dtype, device=moment.device)
    jitter = _JITTER if singular else 0.0
    while True:
        root, failed = torch.linalg.cholesky_ex(moment + jitter * mean * one if jitter else moment)
        if not bool(failed.any()):
            return root, jitter
        jitter = max(jitter * 10, _JITTER)
