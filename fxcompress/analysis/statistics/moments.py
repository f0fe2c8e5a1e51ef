"""Second moments Σ x xᵀ of what a layer reads, and Σ y xᵀ between what two nodes produce.

With the second moment C of the inputs the error of any other weight W' of the layer is known without data:
Σ ‖W x − W' x‖² = tr((W − W') C (W − W')ᵀ).
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fxcompress.analysis.statistics.kinds import Accumulator, Statistic
from fxcompress.analysis.statistics.patches import geometry, is_conv, patches
from fxcompress.analysis.statistics.triangle import Triangle

__all__ = ["CrossMoment", "CrossMoments", "Moments", "PackedMoments", "SecondMoment"]

# Elements that are taken into float64 at once: bounds the memory beside the activation itself.
_CHUNK = 1 << 20
_LEAST = 1 << 16
_LARGE = 512  # features from which on only half of the symmetric sum is computed,
_BANDS = 4  # in so many bands


@dataclass(frozen=True)
class Moments:
    """Sums over all rows that a layer read; for a grouped convolution, of each group apart.

    Attributes:
        total: Σ x xᵀ, float64 ``[groups, d, d]``; d counts features, or input channels of a group × kernel.
        sum: Σ x, float64 ``[groups, d]``.
        count: rows.
        fold: the same of the rows of one half of the samples, where it was asked for and there is more than one.
    """

    total: torch.Tensor
    sum: torch.Tensor
    count: int
    fold: Moments | None = None

    @property
    def mean(self) -> torch.Tensor:
        """Mean of the rows, ``[groups, d]``."""
        return self.sum / self.count

    @property
    def second(self) -> torch.Tensor:
        """Mean of x xᵀ, ``[groups, d, d]``."""
        return self.total / self.count

    @property
    def covariance(self) -> torch.Tensor:
        """Mean of (x − mean)(x − mean)ᵀ, ``[groups, d, d]``."""
        mean = self.mean
        return self.second - mean[:, :, None] * mean[:, None, :]

    def __add__(self, other: Moments) -> Moments:
        fold = None if self.fold is None or other.fold is None else self.fold + other.fold
        return Moments(self.total + other.total, self.sum + other.sum, self.count + other.count, fold)


@dataclass(frozen=True)
class PackedMoments:
    """:class:`Moments` of one group of which little more than one half is held.

    Attributes:
        half: Σ x xᵀ, ``[d, d]``.
        sum: Σ x, float64 ``[1, d]``.
        count: rows.
    """

    half: Triangle
    sum: torch.Tensor
    count: int

    @property
    def mean(self) -> torch.Tensor:
        """Mean of the rows, ``[1, d]``."""
        return self.sum / self.count


@dataclass(frozen=True)
class SecondMoment(Statistic):
    """:class:`Moments` of the rows that a layer multiplies by its weights.

    Of a convolution's input, rows are the patches under its kernel, in the order of ``weight.flatten(1)``; of a
    transposed one's, those of the input with zeros between, so that output = flipped kernel · patch. Of its output,
    rows are the channels at each position. Of any other tensor, rows are its last dimension.

    Attributes:
        rows: most rows to take of one batch, evenly spaced; None takes all.
        packed: :class:`PackedMoments` instead, in 9/16 of the memory; of rows in one group.
        folds: with those of one half of the samples beside, in twice the memory; not with ``packed``.
    """

    of: Any = "input"
    rows: int | None = None
    packed: bool = False
    folds: bool = False

    def start(self, layer: nn.Module | None) -> Accumulator:
        conv: Any = layer if self.of == "output" and is_conv(layer) else None
        dim = -1 if conv is None else -1 - len(conv.kernel_size)
        given = layer if self.of == "input" else None
        if self.packed:
            return _Packed(given, self.rows, dim)
        first = _Products(given, self.rows, dim)
        if not self.folds:
            return first
        features = -1 - len(layer.kernel_size) if is_conv(layer) else -1  # type: ignore[union-attr, arg-type]
        return _Folds(first, _Products(given, self.rows, dim), features)

    def shared_by(self, layer: nn.Module | None) -> Hashable:
        return self, geometry(layer) if self.of == "input" else None


class _Rows(Accumulator):
    def __init__(self, layer: nn.Module | None, rows: int | None, dim: int = -1) -> None:
        self.layer, self.rows, self.dim = layer, rows, dim
        self.sum: torch.Tensor | None = None
        self.count = 0

    def pieces(self, tensor: torch.Tensor) -> Iterator[torch.Tensor]:
        """Rows in float64, ``[groups, rows, d]``; of features no more at once than half of what is added up."""
        tensor = tensor if self.dim == -1 else tensor.movedim(self.dim, -1)
        chunk = _CHUNK
        if not is_conv(self.layer):
            chunk = min(_CHUNK, max(_LEAST, tensor.shape[-1] ** 2 // 2))
        for rows in patches(self.layer, tensor, self.rows, chunk):
            yield rows.double()


class _Products(_Rows):
    total: torch.Tensor | None = None

    def add(self, *tensors: torch.Tensor) -> None:
        for wide in self.pieces(tensors[0]):
            if self.total is None or self.sum is None:
                self.total = wide.new_zeros(wide.shape[0], wide.shape[2], wide.shape[2])
                self.sum = wide.new_zeros(wide.shape[0], wide.shape[2])
            size = wide.shape[2]
            if len(wide) > 1 or size < _LARGE:
                self.total.baddbmm_(wide.mT, wide)
            else:
                for start, stop in _bands(size):  # the lower half alone; `value` mirrors it
                    self.total[0, start:stop, :stop].addmm_(wide[0, :, start:stop].T, wide[0, :, :stop])
            self.sum += wide.sum(1)
            self.count += wide.shape[1]

    def value(self) -> Moments:
        assert self.total is not None and self.sum is not None
        size = self.total.shape[2]
        if len(self.total) == 1 and size >= _LARGE:
            for start, stop in _bands(size):
                self.total[0, :start, start:stop] = self.total[0, start:stop, :start].T
        return Moments(self.total, self.sum, self.count)


class _Packed(_Rows):
    half: Triangle | None = None

    def add(self, *tensors: torch.Tensor) -> None:
        for wide in self.pieces(tensors[0]):
            assert len(wide) == 1
            if self.half is None or self.sum is None:
                self.half = Triangle.zeros(wide.shape[2], wide.device)
                self.sum = wide.new_zeros(1, wide.shape[2])
            self.half.add_square(wide[0])
            self.sum += wide.sum(1)
            self.count += wide.shape[1]

    def value(self) -> PackedMoments:
        assert self.half is not None and self.sum is not None
        return PackedMoments(self.half, self.sum, self.count)


def _bands(size: int) -> list[tuple[int, int]]:
    return [(band * size // _BANDS, (band + 1) * size // _BANDS) for band in range(_BANDS)]


@dataclass(frozen=True)
class CrossMoments:
    """Sums over the rows y that a node produces and the rows x that one of a second graph produces.

    Attributes:
        cross: Σ y xᵀ, float64 ``[y's features, x's features]``.
        moments: of x, with one group.
        sum: Σ y, float64.
        energy: Σ ‖y‖².
        fold: the same of the rows of one half of the samples, where it was asked for and there is more than one.
    """

    cross: torch.Tensor
    moments: Moments
    sum: torch.Tensor
    energy: float
    fold: CrossMoments | None = None


@dataclass(frozen=True)
class CrossMoment(Statistic):
    """:class:`CrossMoments` of the rows of a node and of a node of a second graph; see ``collect(..., beside=…)``.

    Attributes:
        with_: name of the node of the second graph.
        dim: of both: the dimension that counts features.
        folds: with those of one half of the samples beside, in twice the memory.
    """

    with_: str = ""
    dim: int = -1
    folds: bool = False

    def start(self, layer: nn.Module | None) -> Accumulator:
        first = _CrossProducts(self.dim)
        return _Folds(first, _CrossProducts(self.dim), self.dim) if self.folds else first


class _CrossProducts(Accumulator):
    def __init__(self, dim: int) -> None:
        self.dim = dim
        self.cross: torch.Tensor | None = None
        self.products = _Products(None, None)
        self.sum: torch.Tensor | float = 0.0
        self.energy = 0.0

    def add(self, *tensors: torch.Tensor) -> None:
        left, right = (t.movedim(self.dim, -1).reshape(-1, t.shape[self.dim]) for t in tensors)
        self.products.add(right)
        step = max(1, _CHUNK // max(1, left.shape[1], right.shape[1]))
        for first, second in zip(left.split(step), right.split(step), strict=True):
            wide = first.double()
            if self.cross is None:
                self.cross = wide.new_zeros(wide.shape[1], second.shape[1])
            self.cross.addmm_(wide.T, second.double())
            self.sum = self.sum + wide.sum(0)
            self.energy += float(wide.square().sum())

    def value(self) -> CrossMoments:
        assert self.cross is not None
        assert isinstance(self.sum, torch.Tensor)
        return CrossMoments(self.cross, self.products.value(), self.sum, self.energy)


class _Folds(Accumulator):
    """One half of the samples of each batch apart from the other; of batches of one sample every other batch.

    Samples are the indices of the first dimension, where it is not that of the features.
    """

    def __init__(self, first: _Products | _CrossProducts, second: _Products | _CrossProducts, dim: int) -> None:
        self.dim = dim
        self.folds = (first, second)
        self.seen = [0, 0]  # samples

    def add(self, *tensors: torch.Tensor) -> None:
        samples = len(tensors[0]) if self.dim % tensors[0].dim() else 1
        if samples < 2 or any(len(tensor) != samples for tensor in tensors):
            self._add(int(self.seen[0] > self.seen[1]), tensors, samples)
            return
        middle = samples // 2
        self._add(0, tuple(tensor[:middle] for tensor in tensors), middle)
        self._add(1, tuple(tensor[middle:] for tensor in tensors), samples - middle)

    def _add(self, which: int, tensors: tuple[torch.Tensor, ...], samples: int) -> None:
        self.folds[which].add(*tensors)
        self.seen[which] += samples

    def value(self) -> Moments | CrossMoments:
        first: Any = self.folds[0].value()
        if not self.seen[1]:
            return first
        second: Any = self.folds[1].value()
        _add_to(second, first)
        whole = second.moments if isinstance(second, CrossMoments) else second
        fold = first.moments if isinstance(first, CrossMoments) else first
        moments = Moments(whole.total, whole.sum, whole.count + fold.count, fold)
        if not isinstance(second, CrossMoments):
            return moments
        return CrossMoments(second.cross, moments, second.sum, second.energy + first.energy, first)


def _add_to(whole: Any, fold: Any) -> None:
    """In place, so that no third moment is held."""
    for name, value in vars(whole).items():
        if isinstance(value, torch.Tensor):
            value.add_(getattr(fold, name))
        elif isinstance(value, Moments):
            _add_to(value, fold.moments)
