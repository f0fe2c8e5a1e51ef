"""Histograms whose range need not be known before: it doubles when a value falls outside, and bins merge in pairs."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from fxcompress.analysis.statistics.kinds import Accumulator, Statistic
from fxcompress.errors import OptionError

__all__ = ["Histogram", "HistogramValue"]

_RUN = 16  # neighbours that are sampled together


@dataclass(frozen=True)
class HistogramValue:
    """Counts of values.

    Attributes:
        counts: float64 ``[bins]``.
        edges: float64 ``[bins + 1]``; symmetric about zero, the last is a power of two.
        low: the least value seen.
        high: the greatest.
    """

    counts: torch.Tensor
    edges: torch.Tensor
    low: float
    high: float

    def quantile(self, share: float) -> float:
        """The value below which ``share`` of all values lie, interpolated within its bin."""
        total = self.counts.cumsum(0)
        wanted = share * float(total[-1])
        bin_ = min(int(torch.searchsorted(total, torch.tensor(wanted, dtype=total.dtype))), len(self.counts) - 1)
        below = float(total[bin_ - 1]) if bin_ else 0.0
        inside = float(self.counts[bin_])
        part = (wanted - below) / inside if inside else 0.0
        width = float(self.edges[1] - self.edges[0])
        return min(max(float(self.edges[bin_]) + part * width, self.low), self.high)


@dataclass(frozen=True)
class Histogram(Statistic):
    """Counts of the values of the tensor, as a :class:`HistogramValue`.

    Of a larger tensor evenly spaced runs of 16 values are counted, weighted to the number of all; its least and
    greatest value are exact. That keeps the cost of a batch near that of running the model.

    Attributes:
        bins: an even number. After the range has doubled, at least half of them cover values seen on either side.
        sample: most values counted of one batch.
    """

    bins: int = 2048
    sample: int = 1 << 16

    def __post_init__(self) -> None:
        if self.bins < 4 or self.bins % 4:
            raise OptionError(f"bins={self.bins} is no positive multiple of 4", where="bins")
        if not 1 <= self.sample < 1 << 24:
            raise OptionError(f"sample={self.sample} is outside [1, 2**24)", where="sample")

    def start(self, layer: nn.Module | None) -> Accumulator:
        return _Counts(self.bins, self.sample)


class _Counts(Accumulator):
    def __init__(self, bins: int, sample: int) -> None:
        self.bins, self.sample = bins, sample
        self.limit = 0.0  # a power of two: bins cover [-limit, limit]
        self.counts = torch.zeros(bins, dtype=torch.float64)
        self.zeros = 0.0  # values seen while all were zero
        self.low, self.high = math.inf, -math.inf

    def add(self, *tensors: torch.Tensor) -> None:
        flat = tensors[0].detach().reshape(-1)
        if not flat.numel():
            return
        flat = flat.float() if not flat.is_floating_point() else flat
        low, high = (float(end) for end in torch.aminmax(flat))
        peak = max(abs(low), abs(high))
        if math.isnan(self.low) or not math.isfinite(peak):
            self.low = math.nan  # and stays so: the collector refuses it by name
            return
        self.low, self.high = min(low, self.low), max(high, self.high)
        if peak == 0.0 and self.limit == 0.0:
            self.zeros += flat.numel()
            return
        self._cover(peak)
        total = flat.numel()
        if total > self.sample >= _RUN:
            runs = flat[: total // _RUN * _RUN].reshape(-1, _RUN)  # a cache line each
            flat = runs[:: _stride(len(runs), self.sample // _RUN)].reshape(-1)
        elif total > self.sample:
            flat = flat[:: _stride(total, self.sample)]
        # A fourth of the time of torch.histc. The width of a bin is a power of two, so the places are exact.
        places = torch.add(self.bins / 2, flat.float(), alpha=self.bins / 2 / self.limit)
        found = torch.bincount(places.int().clamp_(0, self.bins - 1), minlength=self.bins).double()
        self.counts = self.counts.to(found.device) + found * (total / flat.numel())

    def _cover(self, peak: float) -> None:
        if self.limit == 0.0 and peak > 0:
            self.limit = 2.0 ** math.ceil(math.log2(peak))
        while peak > self.limit:
            merged = self.counts.reshape(-1, 2).sum(1)
            self.counts = torch.zeros_like(self.counts)
            self.counts[self.bins // 4 : self.bins // 4 * 3] = merged
            self.limit *= 2.0

    def value(self) -> HistogramValue:
        limit = self.limit or 1.0
        counts = self.counts.clone()
        counts[self.bins // 2] += self.zeros
        edges = torch.linspace(-limit, limit, self.bins + 1, dtype=torch.float64)
        return HistogramValue(counts.cpu(), edges, self.low, self.high)


def _stride(total: int, wanted: int) -> int:
    """A step that leaves about ``wanted`` of ``total`` values and shares no factor with any dimension of the tensor."""
    step = -(-total // wanted)
    while math.gcd(step, total) > 1:
        step += 1
    return step
