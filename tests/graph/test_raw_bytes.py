"""A tensor's bytes, whatever its dtype and strides."""

from __future__ import annotations

import pytest
import torch

from fxcompress.graph.raw_bytes import raw_bytes

MATRIX = torch.arange(6, dtype=torch.float64).reshape(2, 3)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(0),
        torch.tensor(2.5),
        MATRIX,
        MATRIX.t(),
        MATRIX[:, 1:],
        torch.tensor(1.5).expand(3, 2),
        torch.ones(1, 1).as_strided((1,), (0,)),
        torch.tensor([True, False]),
        torch.tensor([1 + 2j]),
    ],
    ids=str,
)
def test_bytes_are_those_of_numpy_in_row_order(tensor: torch.Tensor) -> None:
    found = raw_bytes(tensor)
    assert bytes(found.data) == tensor.numpy().tobytes()


def test_a_dtype_that_numpy_lacks() -> None:
    assert bytes(raw_bytes(torch.tensor([1.0, -2.0], dtype=torch.bfloat16)).data) == b"\x80\x3f\x00\xc0"


def test_dense_values_are_not_copied() -> None:
    x = torch.zeros(4)
    raw_bytes(x)[3] = 0x40
    assert float(x[0]) == 2.0
