"""Packed symmetric matrices against whole ones."""

import pytest
import torch

from fxcompress.analysis.statistics import Triangle


def both(size: int, rows: int = 50) -> tuple[Triangle, torch.Tensor]:
    data = torch.randn(rows, size, generator=torch.Generator().manual_seed(size), dtype=torch.float64)
    half = Triangle.zeros(size, data.device)
    half.add_square(data[:20])
    half.add_square(data[20:])
    return half, data.T @ data


@pytest.mark.parametrize("size", [1, 7, 127, 128, 131, 200])
def test_everything_as_with_the_whole_matrix(size):
    half, whole = both(size)
    assert half.size == size
    torch.testing.assert_close(half.full(), whole)
    torch.testing.assert_close(half.trace, float(whole.trace()))
    block = torch.randn(size, 3, dtype=torch.float64)
    torch.testing.assert_close(half.times(block), whole @ block)


def test_subtract_and_add_change_no_copy():
    half, whole = both(130)
    left, right = torch.randn(2, 130, dtype=torch.float64)
    changed = half.copy()
    changed.subtract(left, right)
    changed.add(half)
    torch.testing.assert_close(changed.full(), 2 * whole - left.outer(right) - right.outer(left))
    torch.testing.assert_close(half.full(), whole)


def test_holds_nine_sixteenths():
    half, whole = both(256)
    assert sum(band.numel() for band in half.bands) == whole.numel() * 9 // 16


def test_spent_leaves_nothing():
    half, whole = both(200)
    made = half.spent(torch.float32)
    assert made.dtype == torch.float32 and half.bands == []
    torch.testing.assert_close(made, whole.float())
