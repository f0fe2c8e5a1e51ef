"""A kernel as depthwise kernels and a pointwise mixture of what they produce.

Network Decoupling (Guo et al. 2018, arXiv:1808.05517): the kernels of one input channel c are a matrix W_c [out, k²];
its best approximation of rank T is T depthwise kernels and T columns of a pointwise convolution. At T = min(k², out) it
is exact. On data, W_c is truncated in the metric of the patches of its channel, and then the pointwise part, of all
channels together, is fitted to the output by least squares (:mod:`~fxcompress.passes.low_rank.least_squares`): with D
the depthwise kernels as a matrix on patches and C the second moment of these, it goes from there towards
P = W C Dᵀ (D C Dᵀ)⁻¹.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fxcompress.analysis.statistics import Moments
from fxcompress.passes.low_rank.least_squares import Fit, Sums, fit
from fxcompress.passes.low_rank.metric import Metric, data_metric, plain_metric
from fxcompress.passes.low_rank.spectra import spectrum
from fxcompress.passes.low_rank.truncate import Factors, truncate

__all__ = ["Decoupled", "channel_energies", "decouple"]


@dataclass(frozen=True)
class Decoupled:
    """``kernel[g, o, c] ≈ Σ_t pointwise[g, o, c·T + t] · depthwise[g, c, t]``.

    Attributes:
        depthwise: ``[groups, in, terms, kernel elements]`` in the kernel's dtype.
        pointwise: ``[groups, out, in · terms]``.
        fit: how the pointwise part was fitted to data.
    """

    depthwise: torch.Tensor
    pointwise: torch.Tensor
    fit: Fit | None = None

    def matrix(self) -> torch.Tensor:
        """The kernel that both make together, ``[groups, out, in · kernel elements]``."""
        groups, inputs, terms, _ = self.depthwise.shape
        split = self.pointwise.reshape(groups, -1, inputs, terms)
        return torch.einsum("goct,gctk->gock", split, self.depthwise).flatten(2)


def channel_energies(kernel: torch.Tensor) -> torch.Tensor:
    """Squared singular values of the kernels of each input channel: float64 ``[groups · in, min(out, k²)]``."""
    return spectrum(_by_channel(kernel), plain_metric())


def decouple(kernel: torch.Tensor, terms: int, metric: Metric, moments: Moments | None) -> Decoupled:
    """The best ``terms`` of every input channel; with data the pointwise part is fitted to the output.

    Args:
        kernel: ``[groups, out, in, kernel elements]``.
        terms: at most min(out, kernel elements), where the result is exact.
        metric: of the patches, with the same moments.
        moments: Σ x xᵀ of the patches, ``[groups, in · k², in · k²]``, or None.
    """
    groups, outputs, inputs, size = kernel.shape
    channels = _by_channel(kernel)  # [groups · in, out, k²]
    made = truncate(channels, _channel_metric(kernel, moments), terms, randomized=False)
    if not isinstance(made, Factors):
        return _exact(kernel)
    depthwise = made.inner.reshape(groups, inputs, terms, size)
    pointwise = made.outer.reshape(groups, inputs, outputs, terms).permute(0, 2, 1, 3).flatten(2)
    if metric.moment is None:
        return Decoupled(depthwise, pointwise)
    sums = _sums(kernel, depthwise, metric.moment)
    sums.fold = None if metric.fold is None else _sums(kernel, depthwise, metric.fold)
    fitted = fit(sums, pointwise.double())
    return Decoupled(depthwise, fitted.factor.to(kernel.dtype), fitted)


def _sums(kernel: torch.Tensor, depthwise: torch.Tensor, moment: torch.Tensor) -> Sums:
    """Of the output, and of what the pointwise part reads: W C Dᵀ and D C Dᵀ."""
    groups, inputs, terms, size = depthwise.shape
    wide, weight = depthwise.double(), kernel.double().flatten(2)
    half = torch.einsum("gatk,gakbl->gatbl", wide, moment.reshape(groups, inputs, size, inputs, size))  # D C
    inner = torch.einsum("gatbl,gbsl->gatbs", half, wide).reshape(groups, inputs * terms, -1)
    cross = weight @ half.reshape(groups, inputs * terms, -1).mT
    return Sums(cross, inner, float(((weight @ moment) * weight).sum()))


def _exact(kernel: torch.Tensor) -> Decoupled:
    """All terms: one of the two parts is the kernel itself, the other picks its elements."""
    groups, outputs, inputs, size = kernel.shape
    one = torch.eye(min(outputs, size), dtype=kernel.dtype, device=kernel.device)
    if size <= outputs:
        return Decoupled(one.expand(groups, inputs, size, size).contiguous(), kernel.flatten(2))
    picked = one[:, None, :].expand(groups, outputs, inputs, outputs).flatten(2)
    return Decoupled(kernel.transpose(1, 2).contiguous(), picked.contiguous())


def _by_channel(kernel: torch.Tensor) -> torch.Tensor:
    return kernel.transpose(1, 2).flatten(0, 1)


def _channel_metric(kernel: torch.Tensor, moments: Moments | None) -> Metric:
    if moments is None:
        return plain_metric()
    groups, _, inputs, size = kernel.shape
    blocks = moments.total.reshape(groups, inputs, size, inputs, size).diagonal(dim1=1, dim2=3)  # [g, k, k, in]
    own = blocks.permute(0, 3, 1, 2).flatten(0, 1).contiguous()
    sums = moments.sum.reshape(groups * inputs, size)
    return data_metric(Moments(own, sums, moments.count))
