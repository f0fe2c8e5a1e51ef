"""What can be asked for at a node: means and ranges, of a whole tensor or per index of a dimension.

A statistic is a small frozen value; what it adds up over the batches lives in the accumulator that it starts. All of
them add up in float64 and hold only the result, never an activation.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from fxcompress.errors import OptionError

__all__ = ["Accumulator", "Mean", "MeanAbs", "MeanSquare", "Range", "Statistic"]

Side = Literal["input", "output"]


class Accumulator(ABC):
    """Adds up one statistic over batches."""

    @abstractmethod
    def add(self, *tensors: torch.Tensor) -> None:
        """Take in the activation of one batch (and, for a statistic of two, the second)."""

    @abstractmethod
    def value(self) -> Any:
        """The statistic so far."""


@dataclass(frozen=True)
class Statistic(ABC):
    """Base of all statistics.

    Attributes:
        of: what the node produces, or the first tensor that it reads.
    """

    of: Side = "output"

    @abstractmethod
    def start(self, layer: nn.Module | None) -> Accumulator:
        """A fresh accumulator for a node that calls ``layer`` (None where it calls none)."""

    def shared_by(self, layer: nn.Module | None) -> Hashable:
        """Equal for two nodes that read the same value and want the same of it: they are added up once."""
        return self


@dataclass(frozen=True)
class _PerIndex(Statistic):
    """Attributes: dim: one value for each index of this dimension; None gives one for the whole tensor."""

    dim: int | None = None


class _Sums(Accumulator):
    def __init__(self, dim: int | None) -> None:
        self.dim = dim
        self.total: torch.Tensor | None = None
        self.count = 0

    def transform(self, rows: torch.Tensor) -> torch.Tensor:
        return rows

    def add(self, *tensors: torch.Tensor) -> None:
        rows = _rows(tensors[0], self.dim)
        found = self.transform(rows.double()).sum(1)
        self.total = found if self.total is None else self.total + found
        self.count += rows.shape[1]

    def value(self) -> torch.Tensor:
        assert self.total is not None
        mean = self.total / max(self.count, 1)
        return mean[0] if self.dim is None else mean


class _AbsoluteSums(_Sums):
    def transform(self, rows: torch.Tensor) -> torch.Tensor:
        return rows.abs()


class _SquareSums(_Sums):
    def transform(self, rows: torch.Tensor) -> torch.Tensor:
        return rows.square()


@dataclass(frozen=True)
class Mean(_PerIndex):
    """Mean of the values: a float64 scalar tensor, or ``[size of dim]``."""

    def start(self, layer: nn.Module | None) -> Accumulator:
        return _Sums(self.dim)


@dataclass(frozen=True)
class MeanAbs(_PerIndex):
    """Mean of the absolute values: a float64 scalar tensor, or ``[size of dim]``."""

    def start(self, layer: nn.Module | None) -> Accumulator:
        return _AbsoluteSums(self.dim)


@dataclass(frozen=True)
class MeanSquare(_PerIndex):
    """Mean of the squares: a float64 scalar tensor, or ``[size of dim]``."""

    def start(self, layer: nn.Module | None) -> Accumulator:
        return _SquareSums(self.dim)


class _Extremes(Accumulator):
    def __init__(self, dim: int | None) -> None:
        self.dim = dim
        self.found: tuple[torch.Tensor, torch.Tensor] | None = None

    def add(self, *tensors: torch.Tensor) -> None:
        rows = _rows(tensors[0], self.dim)
        if not rows.shape[1]:
            return
        low, high = rows.amin(1).double(), rows.amax(1).double()
        if self.found is not None:
            low, high = torch.minimum(low, self.found[0]), torch.maximum(high, self.found[1])
        self.found = (low, high)

    def value(self) -> tuple[torch.Tensor, torch.Tensor]:
        if self.found is None:
            nothing = torch.zeros((), dtype=torch.float64)
            return nothing, nothing
        low, high = self.found
        return (low[0], high[0]) if self.dim is None else (low, high)


@dataclass(frozen=True)
class Range(_PerIndex):
    """Least and greatest value: two float64 scalar tensors, or two of ``[size of dim]``."""

    def start(self, layer: nn.Module | None) -> Accumulator:
        return _Extremes(self.dim)


def _rows(tensor: torch.Tensor, dim: int | None) -> torch.Tensor:
    """``[indices of dim, everything else]``."""
    if dim is None:
        return tensor.reshape(1, -1)
    if not -tensor.dim() <= dim < tensor.dim():
        raise OptionError(f"there is no dimension {dim} in a tensor of {tensor.dim()} dimensions", where="dim")
    return tensor.movedim(dim, 0).reshape(tensor.shape[dim], -1)
