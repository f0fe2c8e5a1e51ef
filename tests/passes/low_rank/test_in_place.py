"""Factorizations in the place of their matrix: right, and nothing beside it but what LAPACK needs."""

import pytest
import torch

from fxcompress.passes.low_rank.in_place import basis_of, eigh, orthonormal

DTYPES = (torch.float32, torch.float64)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("groups", [1, 3])
def test_eigenvectors_lie_where_the_matrix_was(dtype, groups):
    root = torch.randn(groups, 20, 30, dtype=dtype)
    matrix = root @ root.mT
    whole, place = matrix.clone(), matrix.data_ptr()
    values, vectors = eigh(matrix)
    assert vectors.data_ptr() == place
    torch.testing.assert_close(vectors @ (values[..., None] * vectors.mT), whole, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(values, torch.linalg.eigvalsh(whole), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_basis_lies_where_the_block_was(dtype):
    block = torch.randn(5, 40, dtype=dtype).T
    given, place = block.clone(), block.data_ptr()
    basis = orthonormal(block)
    assert basis.data_ptr() == place
    torch.testing.assert_close(basis.T @ basis, torch.eye(5, dtype=dtype), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(basis @ (basis.T @ given), given, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [1, 4])
def test_a_basis_of_factors_leaves_them_as_they_are(dtype, rank):
    outer = torch.randn(1, 30, rank, dtype=dtype)
    before = outer.clone()
    basis = basis_of(outer)[0]
    assert torch.equal(outer, before)
    torch.testing.assert_close(basis @ (basis.T @ outer[0].double()), outer[0].double(), rtol=1e-5, atol=1e-5)
