"""Bags of embeddings as ONNX: those of one size are a lookup and a reduction, others still right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.backends.test_onnx_export import check, operations, seeded


class Bag(nn.Module):
    def __init__(self, mode: str, **options: Any) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(20, 6, mode=mode, **options)

    def forward(self, x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        given = weights if self.bag.mode == "sum" else None
        result: torch.Tensor = self.bag(x, per_sample_weights=given)
        return result + weights.sum()


matrix = seeded(lambda batch: (torch.randint(0, 20, (batch, 5)), torch.rand(batch, 5)))


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_bags_of_one_size_are_a_lookup_and_a_reduction(mode: str, tmp_path: Path) -> None:
    file = check(Bag(mode), matrix, tmp_path)
    found = operations(file)
    assert found["Gather"] == 1 and not {"Loop", "SequenceEmpty"} & set(found) and file.notes == ()


@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_a_padding_index_does_not_count(mode: str, tmp_path: Path) -> None:
    def make(batch: int) -> Any:
        x, weights = matrix(batch)
        x[0] = 3  # a bag of padding alone
        x[1, :2] = 3
        return x, weights

    assert check(Bag(mode, padding_idx=3), make, tmp_path).notes == ()


@pytest.mark.parametrize("mode", ["sum", "mean"])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("padding", [None, 4])
def test_bags_that_the_caller_bounds(mode: str, last: bool, padding: int | None, tmp_path: Path) -> None:
    class Ragged(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bag = nn.EmbeddingBag(20, 6, mode=mode, include_last_offset=last, padding_idx=padding)

        def forward(self, x: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = self.bag(x, offsets)
            return result

    def make(batch: int) -> Any:
        return torch.arange(10) % 7, torch.tensor([0, 3, 3, 10] if last else [0, 3, 3, 8])

    assert check(Ragged(), make, tmp_path, dynamic_shapes=None).notes == ()


def test_the_number_of_values_is_a_product_of_sizes(tmp_path: Path) -> None:
    class Shared(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.relu(x) / x.numel()

    check(Shared(), seeded(lambda batch: (torch.randn(batch, 3, 2),)), tmp_path)


def test_a_parameter_with_the_name_of_an_operation(tmp_path: Path) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.t = nn.Parameter(torch.tensor(1.5))
            self.matmul = nn.Parameter(torch.randn(3, 3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.matmul @ x.t() * self.t.exp()

    check(Scaled(), seeded(lambda batch: (torch.randn(batch, 3),)), tmp_path)
