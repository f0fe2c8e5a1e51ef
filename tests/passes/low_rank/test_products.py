"""Products by oneDNN are those of ``@``, for every layout, size and dtype."""

import pytest
import torch

from fxcompress.passes.low_rank.products import Packed, dot, square


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("by_onednn", [False, True])
@pytest.mark.parametrize(("rows", "width"), [(5, 7), (520, 130), (130, 2100), (300, 1025)])
def test_equal_to_the_plain_product(rows, width, by_onednn, dtype, monkeypatch):
    if by_onednn and not torch.backends.mkldnn.is_available():
        pytest.skip("this build of torch has no oneDNN")
    monkeypatch.setattr("fxcompress.passes.low_rank.products._works", lambda: by_onednn)
    generator = torch.Generator().manual_seed(0)
    right = torch.randn(rows, width, generator=generator, dtype=dtype)
    close = {"rtol": 1e-4, "atol": 1e-3} if dtype == torch.float32 else {}
    for left in (torch.randn(600, width, generator=generator, dtype=dtype), right, right[:3]):
        torch.testing.assert_close(dot(left, right), left @ right.T, **close)
        torch.testing.assert_close(dot(left.T.contiguous().T, right), left @ right.T, **close)
        torch.testing.assert_close(Packed(right, 1000).after(left), left @ right.T, **close)
    for matrix in (right, right.T):
        found = square(matrix)
        torch.testing.assert_close(found, matrix @ matrix.T, **close)
        torch.testing.assert_close(found, found.T, **close)
