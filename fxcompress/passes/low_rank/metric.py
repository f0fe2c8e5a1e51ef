"""What the error of a weight is measured in: plain, or on the data that the layer reads.

With C = Σ x xᵀ over calibration data, the loss of W' is exactly Σ ‖W x − W' x‖² = tr(E C Eᵀ), E = W − W'. Any root S
with S Sᵀ = C turns it into the Frobenius norm of E S, which the truncated SVD of W S minimises (SVD-LLM, Wang et al.
2024, arXiv:2403.07378). ASVD (Yuan et al. 2023, arXiv:2312.05821) takes for S a diagonal of mean absolute values.

A weight with fewer rows than columns needs no C: the truncation is that of M = W C Wᵀ, the second moment of the layer's
outputs without its bias, which is smaller. What it leaves is W' = P W of a projection P, with the loss tr(M) − tr(P M).

Everything is float64 and batched over the groups of a convolution, ``[groups, …]``; a linear layer has one group.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch

from fxcompress.analysis.statistics import Moments, PackedMoments, Triangle
from fxcompress.passes.low_rank.in_place import basis_of

__all__ = ["Metric", "data_metric", "diagonal_metric", "output_metric", "plain_metric"]

_COLUMNS = 32  # of a basis that are multiplied at once, at least
_PIECES = 8  # in which a matrix is overwritten by a product with it
_JITTER = 1e-8  # of the mean variance; grows tenfold until the Cholesky factor exists


@dataclass(frozen=True)
class Metric:
    """What errors are weighted with.

    Attributes:
        of_inputs: Σ x xᵀ of the data as it is, ``[groups, d, d]``, for the loss; None without it.
        of_outputs: Σ y yᵀ of y = W x in its place, of one group.
        scale: a diagonal to weight with in the place of the moment's root, ``[groups, d]``.
        weighs: False where the moment only measures, and every entry of the weight counts the same.
        singular: whether the data has too few rows for the moment to have a root.
        rows: of the data; 0 without.
        fold: Σ x xᵀ of one half of the samples, ``[groups, d, d]``, to hold what is fitted on the other against.
    """

    of_inputs: torch.Tensor | Triangle | None = None
    of_outputs: Triangle | None = None
    scale: torch.Tensor | None = None
    weighs: bool = True
    singular: bool = False
    rows: int = 0
    fold: torch.Tensor | None = None

    @property
    def moment(self) -> torch.Tensor | None:
        """Σ x xᵀ, ``[groups, d, d]``; of a packed one made anew each time: it lives no longer than needed."""
        return self.of_inputs.full()[None] if isinstance(self.of_inputs, Triangle) else self.of_inputs

    @property
    def plain(self) -> bool:
        """Whether all entries of a weight count the same."""
        return self.scale is None and (not self.measures or not self.weighs)

    @property
    def by_moment(self) -> bool:
        """Whether entries of a weight are weighted with a moment, rather than a diagonal or not at all."""
        return not self.plain and self.scale is None

    @property
    def measures(self) -> bool:
        """Whether it knows the loss on data."""
        return self.of_inputs is not None or self.of_outputs is not None

    @property
    def held(self) -> int:
        """Bytes of its moments."""
        moments = [self.of_inputs, self.of_outputs, self.fold]
        return sum(moment.nbytes for moment in moments if moment is not None)

    @property
    def jitter(self) -> float:
        """What was added to the diagonal of the moment, relative to its mean; 0 if nothing was."""
        if self.plain or self.scale is not None:
            return 0.0
        return self._added if "_added" in self.__dict__ else (_JITTER if self.singular else 0.0)

    def congruent(self, gram: torch.Tensor) -> torch.Tensor:
        """``Sᵀ · gram · S`` for ``[groups, d, d]``, which may be written into; of a moment's root S float64."""
        if self.plain:
            return gram
        if self.scale is not None:
            scale = self.scale.to(gram.dtype)  # or all of it would be taken into float64
            return gram.mul_(scale[:, None, :]).mul_(scale[..., None])
        root = self._root()
        step = -(-root.shape[-1] // _PIECES)
        for rows in gram.split(step, -2):
            rows.copy_(rows @ root)
        for columns in gram.split(step, -1):
            columns.copy_(root.mT @ columns)
        return gram

    def unscaled(self, vectors: torch.Tensor) -> torch.Tensor:
        """``S · vectors`` for ``[groups, d, n]``."""
        if self.plain:
            return vectors
        return self.scale[..., None] * vectors if self.scale is not None else self._root() @ vectors

    def by_rows(
        self, weight: torch.Tensor, step: int, dtype: torch.dtype = torch.float64, spend: bool = False
    ) -> torch.Tensor:
        """``(weight · S)(weight · S)ᵀ`` of ``[groups, rows, d]`` for the root S of a moment, which is not made.

        Args:
            weight: any floating dtype.
            step: rows that are taken into float64 at once.
            dtype: of the result.
            spend: whether the moment may be let go.
        """
        rows = weight.shape[-2]
        if self.of_outputs is not None:
            if not self.singular or dtype != torch.float64:
                return self.of_outputs.spent(dtype)[None] if spend else self.of_outputs.full(dtype)[None]
            plain = Metric().by_rows(weight, step)
            plain.mul_(_JITTER * self.of_outputs.trace / _trace(plain).clamp_min(1e-300))
            return plain.add_(self.of_outputs.full())
        found = weight.new_empty(len(weight), rows, rows, dtype=dtype)
        moment = None if self.plain else self.moment
        jitter = _JITTER * _level(moment) if moment is not None and self.singular else None
        for start in range(0, rows, step):
            left = weight[:, start : start + step].double()
            if moment is not None:
                left = left @ moment if jitter is None else (left @ moment).add_(left * jitter)
            for other in range(0, start + 1, step):  # the lower half: it is symmetric
                part = left @ weight[:, other : other + step].double().mT
                found[:, start : start + step, other : other + step] = part
                found[:, other : other + step, start : start + step] = part.mT
        return found

    def lost(self, outer: torch.Tensor) -> tuple[float, float]:
        """Loss on the data, and energy of the outputs: of what is left of a weight projected on the span of ``outer``.

        Args:
            outer: ``[1, rows, rank]``; needs ``of_outputs``.
        """
        assert self.of_outputs is not None
        basis = basis_of(outer[0])
        columns = max(_COLUMNS, len(basis) // _PIECES // 2)
        kept = sum(float((self.of_outputs.times(part).mul_(part)).sum()) for part in basis.split(columns, 1))
        energy = self.of_outputs.trace
        return energy - kept, energy

    def _root(self) -> torch.Tensor:
        """The Cholesky factor of the moment. Made anew when it is asked for: it costs little and is as large."""
        return self._cholesky(self._added)[0]

    @cached_property
    def _added(self) -> float:
        """The jitter with which the moment has a Cholesky factor."""
        jitter = _JITTER if self.singular else 0.0
        while bool(self._cholesky(jitter)[1].any()):
            jitter = max(jitter * 10, _JITTER)
        return jitter

    def _cholesky(self, jitter: float) -> tuple[torch.Tensor, torch.Tensor]:
        given = self.moment
        assert given is not None
        if given is self.of_inputs:
            given = given.clone()
        if jitter:
            given.diagonal(dim1=-2, dim2=-1).add_(jitter * _level(given)[..., 0])
        info = torch.empty(0, dtype=torch.int32, device=given.device)
        # By columns, as LAPACK has it, so that the factor takes the place of the matrix.
        root, info = torch.linalg.cholesky_ex(given.mT, out=(given.mT, info))
        return root, info


def plain_metric() -> Metric:
    """Every entry of the weight counts the same."""
    return Metric()


def data_metric(moments: Moments | PackedMoments, *, centred: bool = False) -> Metric:
    """The loss on the data that ``moments`` were collected on.

    Args:
        moments: of the layer's input.
        centred: of x − mean(x): for a layer whose bias takes up what the mean loses.
    """
    moment: torch.Tensor | Triangle
    fold = None
    if isinstance(moments, PackedMoments):
        moment, width = _of(moments, centred), moments.half.size
    else:
        moment = moments.covariance * moments.count if centred else moments.total
        width = moment.shape[-1]
        fold = None if moments.fold is None or centred else moments.fold.total
    return Metric(moment, singular=moments.count <= width, rows=moments.count, fold=fold)


def output_metric(moments: PackedMoments, width: int, *, centred: bool = False) -> Metric:
    """The same loss, by the moments of what the layer produces without its bias.

    Args:
        moments: of the outputs, without the bias; with ``centred`` written over, but for their mean.
        width: of the layer's rows.
        centred: as for :func:`data_metric`.
    """
    if centred:
        _centre(moments.half, moments)
    return Metric(of_outputs=moments.half, singular=moments.count <= width, rows=moments.count)


def _of(moments: PackedMoments, centred: bool) -> Triangle:
    if not centred:
        return moments.half
    half = moments.half.copy()  # others may read the same
    _centre(half, moments)
    return half


def _centre(half: Triangle, moments: PackedMoments) -> None:
    half.subtract(moments.sum[0], moments.mean[0] / 2)


def diagonal_metric(metric: Metric, mean_abs: torch.Tensor, alpha: float) -> Metric:
    """Inputs weighted with their mean absolute value to the power of ``alpha`` (ASVD); the loss is that of ``metric``.

    Args:
        metric: of the data.
        mean_abs: ``[groups, d]``.
        alpha: 0 is the plain metric.
    """
    scale = mean_abs.clamp_min(1e-6 * float(mean_abs.mean()) or 1.0).pow(alpha)
    return replace(metric, scale=scale, singular=False)


def _trace(matrix: torch.Tensor) -> torch.Tensor:
    return matrix.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None]


def _level(moment: torch.Tensor) -> torch.Tensor:
    """Mean of the diagonal, ``[groups, 1, 1]``; 1 where all is zero."""
    mean = moment.diagonal(dim1=-2, dim2=-1).mean(-1)
    return torch.where(mean > 0, mean, torch.ones_like(mean))[:, None, None]
