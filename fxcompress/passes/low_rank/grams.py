"""The Gram matrix of W S whose eigenvectors span the best matrices of every rank; or its products, without it.

The smaller one, (W S)(W S)ᵀ or (W S)ᵀ(W S), is made in the precision that is asked for. Where the data is known by its
second moment C the first is W C Wᵀ, of which a product takes no more memory than C and a block.
"""

from __future__ import annotations

import torch

from fxcompress.analysis.statistics import Triangle
from fxcompress.passes.low_rank.metric import Metric
from fxcompress.passes.low_rank.products import Packed, square

__all__ = ["Gram", "Unmade", "gram", "of_rows", "operator", "pieces"]

_CHUNK = 1 << 15  # elements of a weight that are taken into float64 at once: little beside a layer,
_ROWS = 64  # and rows at least: enough for a product


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
    by_rows = of_rows(weight, metric)
    if by_rows and metric.by_moment:
        return metric.by_rows(weight, pieces(weight.shape[-1], len(weight)), dtype, spend), True
    wanted, dtype = dtype, torch.float64 if metric.by_moment else dtype
    matrix = weight if by_rows else weight.mT
    size = matrix.shape[-2]
    if matrix.dtype == dtype and metric.plain:
        return (square(matrix[0])[None] if len(weight) == 1 else matrix @ matrix.mT), by_rows
    found = weight.new_zeros(len(weight), size, size, dtype=dtype)
    step = pieces(size, len(weight))
    for start in range(0, matrix.shape[-1], step):
        wide = matrix[..., start : start + step].to(dtype)
        if by_rows and metric.scale is not None:
            wide = wide * metric.scale[:, None, start : start + step].to(dtype)
        found.baddbmm_(wide, wide.mT)
    return (found if by_rows else metric.congruent(found)).to(wanted), by_rows


def of_rows(weight: torch.Tensor, metric: Metric) -> bool:
    """Whether eigenvectors of rows are looked for: where they are fewer, and where the metric knows only outputs."""
    return weight.shape[-2] <= weight.shape[-1] or (metric.by_moment and metric.of_outputs is not None)


class Gram:
    """The smaller Gram matrix of W S as an operator, made in the dtype of the blocks that it is asked to multiply.

    Attributes:
        size: of its rows.
    """

    def __init__(self, weight: torch.Tensor, metric: Metric, dtype: torch.dtype, rank: int) -> None:
        self.weight, self.metric, self.rank = weight, metric, rank
        self.make(dtype)

    def make(self, dtype: torch.dtype) -> None:
        self.dtype, self.packed = dtype, None
        matrix = gram(self.weight, self.metric, dtype)[0][0]
        self.size, self._trace = len(matrix), float(matrix.diagonal().double().sum())
        self.packed = Packed(matrix, self.rank)

    def times(self, block: torch.Tensor) -> torch.Tensor:
        """Of ``[size, k]``."""
        if block.dtype != self.dtype:
            self.make(block.dtype)
        assert self.packed is not None
        return self.packed.after(block.T).T

    def trace(self) -> float:
        """As precise as what it was multiplied by last."""
        return self._trace


class Unmade:
    """(W S)(W S)ᵀ of a moment's root S as an operator on float64 blocks.

    Args:
        weight: ``[rows, d]``, any floating dtype; taken into float64 in pieces.
        metric: with a packed moment, which weighs.
        rank: that is looked for; the jitter, which costs as much as all else, counts beyond the rows of the data only.

    Attributes:
        size: of its rows.
    """

    def __init__(self, weight: torch.Tensor, metric: Metric, rank: int) -> None:
        self.size = len(weight)
        self.outputs, self.inputs = metric.of_outputs, metric.of_inputs
        self.split = weight.split(pieces(weight.shape[1]))
        self.width = weight.shape[1]
        total, self.jitter = 0.0, 0.0
        jitter = metric.jitter if rank >= metric.rows else 0.0
        if self.outputs is not None:
            total = self.outputs.trace
            if jitter:
                norm = sum(float(piece.double().square().sum()) for piece in self.split)
                self.jitter = jitter * total / max(norm, 1e-300)
                total *= 1 + jitter
        else:
            assert isinstance(self.inputs, Triangle)
            self.jitter = jitter * self.inputs.trace / self.width
            for piece in self.split:
                wide = piece.double()
                total += float((self._weighed(wide.T) * wide.T).sum())
        self._trace = total

    def times(self, block: torch.Tensor) -> torch.Tensor:
        """Of ``[size, k]``."""
        found = block.new_zeros(block.shape).T.contiguous().T if self.outputs is None else self.outputs.times(block)
        if self.outputs is not None and not self.jitter:
            return found
        step = len(self.split[0])
        read = block.new_zeros(block.shape[1], self.width).T
        for piece, part in zip(self.split, block.split(step), strict=True):
            read.addmm_(piece.double().T, part)
        read = read.mul_(self.jitter) if self.outputs is not None else self._weighed(read)
        for piece, part in zip(self.split, found.split(step), strict=True):
            part.addmm_(piece.double(), read)
        return found

    def trace(self) -> float:
        """Of the matrix."""
        return self._trace

    def _weighed(self, read: torch.Tensor) -> torch.Tensor:
        """The moment of inputs, with its jitter, times ``[d, k]``."""
        assert isinstance(self.inputs, Triangle)
        found = self.inputs.times(read)
        return found.add_(read, alpha=self.jitter) if self.jitter else found


def operator(weight: torch.Tensor, metric: Metric, dtype: torch.dtype, rank: int, tight: bool) -> Gram | Unmade:
    """What takes the least time to multiply by, or where it is ``tight`` the least memory.

    Args:
        weight: ``[1, rows, d]``.
        metric: with the root S.
        dtype: to make a matrix in.
        rank: of the blocks, about.
        tight: whether there is little room.
    """
    packed = metric.of_outputs is not None or (tight and isinstance(metric.of_inputs, Triangle))
    return Unmade(weight[0], metric, rank) if metric.by_moment and packed else Gram(weight, metric, dtype, rank)


def pieces(width: int, groups: int = 1) -> int:
    """Rows of ``[groups, rows, width]`` that are taken into float64 at once."""
    return max(_ROWS, _CHUNK // max(1, width * groups))
