"""Products of large float32 matrices on the CPU, by oneDNN where registers are 512 bits wide: there it takes less than
half the time on processors for which the linear-algebra library that PyTorch is built with has no such kernels. All
else is ``@``, which on narrower registers is faster.
"""

from __future__ import annotations

from functools import cache

import torch
from torch.nn import functional

__all__ = ["Packed", "dot", "square"]

_WORTH = 1 << 24  # multiply-accumulates from which on a change of layout is nothing
_BANDS = 4  # in which a symmetric product is made
_WIDE = 1024  # columns of a matrix that are multiplied by their own transpose at once


class Packed:
    """A matrix ``[n, k]`` that others are multiplied by, its layout changed once.

    Args:
        matrix: as said.
        rows: that are multiplied by it in one product, about.
    """

    def __init__(self, matrix: torch.Tensor, rows: int) -> None:
        self.dtype = matrix.dtype
        served = _served(matrix, rows * matrix.numel())
        self._given = None if served else matrix
        self._packed = _packed(matrix) if served else None

    def after(self, left: torch.Tensor) -> torch.Tensor:
        """``left @ matrix.T``, ``[m, n]`` of ``[m, k]``."""
        if self._packed is None:
            assert self._given is not None
            return left @ self._given.T
        return _times(_packed(left), self._packed)


def dot(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """``left @ right.T`` of ``[m, k]`` and ``[n, k]``."""
    return Packed(right, len(left)).after(left)


def square(matrix: torch.Tensor) -> torch.Tensor:
    """``matrix @ matrix.T`` of ``[n, k]``, of which one half is computed."""
    size = len(matrix)
    work = size * matrix.numel()
    if work < _WORTH:
        return matrix @ matrix.T
    spans = [slice(band * size // _BANDS, (band + 1) * size // _BANDS) for band in range(_BANDS)]
    found = matrix.new_zeros(size, size)
    if _served(matrix, work):
        for piece in matrix.split(_WIDE, 1):
            piece = piece.contiguous()
            bands = [_packed(piece[span]) for span in spans]
            for row, rows in enumerate(spans):
                for column, columns in enumerate(spans[: row + 1]):
                    found[rows, columns] += _times(bands[row], bands[column])
    else:
        for rows in spans:
            found[rows, : rows.stop].addmm_(matrix[rows], matrix[: rows.stop].T)
    for rows in spans:
        found[: rows.start, rows] = found[rows, : rows.start].T
    return found


def _served(matrix: torch.Tensor, work: int) -> bool:
    return matrix.dtype == torch.float32 and matrix.device.type == "cpu" and work >= _WORTH and _works()


def _packed(matrix: torch.Tensor) -> torch.Tensor:
    return matrix.contiguous().to_mkldnn()


def _times(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    return functional.linear(left, right).to_dense()


@cache
def _works() -> bool:
    if not (torch.backends.mkldnn.is_available() and "512" in torch.backends.cpu.get_cpu_capability()):
        return False
    one = torch.eye(2)
    try:
        return bool((_times(_packed(one), _packed(one)) == one).all())
    except RuntimeError:
        return False
