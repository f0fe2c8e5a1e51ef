"""Symmetric float64 matrices of which little more than one half is held."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch

__all__ = ["Triangle"]

_BANDS = 8
_SMALL = 128  # rows of a matrix that is one band


@dataclass(frozen=True)
class Triangle:
    """A symmetric matrix ``[n, n]`` as its lower half, in bands of rows: 9/16 of its size.

    Attributes:
        bands: each with the columns up to its last row.
    """

    bands: list[torch.Tensor]

    @classmethod
    def zeros(cls, size: int, device: torch.device) -> Triangle:
        """All zeros, to be added to."""
        count = 1 if size < _SMALL else _BANDS
        ends = [band * size // count for band in range(count + 1)]
        bands = [(stop - start, stop) for start, stop in pairwise(ends)]
        return cls([torch.zeros(shape, dtype=torch.float64, device=device) for shape in bands])

    @property
    def size(self) -> int:
        """Rows of the matrix."""
        return self.bands[-1].shape[1]

    @property
    def trace(self) -> float:
        """Sum of the diagonal."""
        return sum(float(band.diagonal(len_ - len(band)).sum()) for band, len_ in self._ends())

    def add_square(self, rows: torch.Tensor) -> None:
        """Add ``rowsᵀ · rows`` of float64 ``[m, n]``."""
        for band, stop in self._ends():
            band.addmm_(rows[:, stop - len(band) : stop].T, rows[:, :stop])

    def add(self, other: Triangle) -> None:
        """Add another of the same size."""
        for band, more in zip(self.bands, other.bands, strict=True):
            band += more

    def subtract(self, left: torch.Tensor, right: torch.Tensor) -> None:
        """Subtract ``left · rightᵀ + right · leftᵀ`` of ``[n]``."""
        for band, stop in self._ends():
            rows = slice(stop - len(band), stop)
            band.addr_(left[rows], right[:stop], alpha=-1).addr_(right[rows], left[:stop], alpha=-1)

    def copy(self) -> Triangle:
        """One that may be written into."""
        return Triangle([band.clone() for band in self.bands])

    @property
    def nbytes(self) -> int:
        """Of all bands."""
        return sum(band.nbytes for band in self.bands)

    def full(self, dtype: torch.dtype = torch.float64) -> torch.Tensor:
        """The whole matrix, new."""
        return Triangle(list(self.bands)).spent(dtype)

    def spent(self, dtype: torch.dtype = torch.float64) -> torch.Tensor:
        """The whole matrix, for which each band is let go as soon as it was copied; nothing is left of this one."""
        found = self.bands[0].new_empty(self.size, self.size, dtype=dtype)
        while self.bands:
            band = self.bands.pop()
            stop = band.shape[1]
            start = stop - len(band)
            found[start:stop, :stop] = band
            found[:start, start:stop] = band[:, :start].T
        return found

    def times(self, block: torch.Tensor) -> torch.Tensor:
        """The matrix times ``[n, k]``."""
        found = block.new_zeros(block.shape[1], self.size).T
        for band, stop in self._ends():
            start = stop - len(band)
            found[start:stop].addmm_(band, block[:stop])
            found[:start].addmm_(band[:, :start].T, block[start:stop])
        return found

    def _ends(self) -> list[tuple[torch.Tensor, int]]:
        return [(band, band.shape[1]) for band in self.bands]
