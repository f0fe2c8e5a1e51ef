"""Factorizations that take the place of the matrix they are of.

PyTorch's results may be the very tensors that are given where those lie by columns, as LAPACK has them.
"""

from __future__ import annotations

import torch

__all__ = ["basis_of", "eigh", "orthonormal"]


def eigh(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Eigenvalues, rising, and eigenvectors of contiguous symmetric ``[…, n, n]``, which is overwritten."""
    values = matrix.new_empty(matrix.shape[:-1])
    columns = matrix.mT
    found: tuple[torch.Tensor, torch.Tensor] = torch.linalg.eigh(columns, out=(values, columns))
    return found


def orthonormal(block: torch.Tensor) -> torch.Tensor:
    """An orthonormal basis of the columns of ``[…, n, k]``, k at most n; by columns, that block is overwritten."""
    coefficients = block.new_empty(*block.shape[:-2], block.shape[-1])
    torch.geqrf(block, out=(block, coefficients))
    found: torch.Tensor = torch.linalg.householder_product(block, coefficients, out=block)
    return found


def basis_of(block: torch.Tensor) -> torch.Tensor:
    """A float64 orthonormal basis of the columns of ``[…, n, k]``, which stays as it is."""
    columns = block.new_empty(block.mT.shape, dtype=torch.float64).copy_(block.mT)
    return orthonormal(columns.mT)
