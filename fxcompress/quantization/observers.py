"""From what was seen of a tensor to the range that its grid shall cover.

``minmax`` covers all; ``moving_average`` follows the extremes of batches; ``percentile`` leaves out the rarest values;
``mse`` clips where rounding and clipping together err least, both ends by the same share, ``histogram`` each end by
itself; ``entropy`` where the quantized histogram is nearest to the original in Kullback-Leibler divergence (Migacz
2017). ``damage`` takes for each tensor that of the ranges of others which moves the outputs least.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import nn

from fxcompress.analysis.statistics import Histogram, HistogramValue, Range, Statistic
from fxcompress.analysis.statistics.kinds import Accumulator
from fxcompress.errors import OptionError, nearest
from fxcompress.quantization.types import QuantType, parameters_of_range

__all__ = [
    "CANDIDATES",
    "OBSERVERS",
    "ObserverName",
    "RunningSums",
    "check_observer",
    "extremes",
    "observed_range",
    "statistic_of",
    "weight_range",
]

ObserverName = Literal["damage", "minmax", "moving_average", "percentile", "mse", "histogram", "entropy"]
OBSERVERS: tuple[str, ...] = get_args(ObserverName)
CANDIDATES = ("mse", "histogram", "percentile", "minmax")
"""What ``damage`` chooses from, by what each does to the outputs; see :func:`fxcompress.quantization.calibrate`."""

_SHARES = 64  # clipping points that are tried
_LEAST_SHARE = 0.1  # of the range, for activations
_MOMENTUM = 0.1


def check_observer(name: str) -> None:
    """Raises:
    OptionError: there is no such observer; the nearest is suggested.
    """
    if name not in OBSERVERS:
        raise OptionError(f"there is no observer {name!r}", where="observer", remedy=nearest(name, OBSERVERS))


@dataclass(frozen=True)
class MovingRange(Statistic):
    """Least and greatest value, each an exponential average over batches (Jacob et al. 2018): two floats."""

    momentum: float = _MOMENTUM

    def start(self, layer: nn.Module | None) -> Accumulator:
        return _MovingExtremes(self.momentum)


class _MovingExtremes(Accumulator):
    def __init__(self, momentum: float) -> None:
        self.momentum = momentum
        self.found: tuple[float, float] | None = None

    def add(self, *tensors: torch.Tensor) -> None:
        if not tensors[0].numel():
            return
        low, high = (float(end) for end in torch.aminmax(tensors[0]))
        if self.found is not None:
            keep = 1 - self.momentum
            low, high = keep * self.found[0] + (1 - keep) * low, keep * self.found[1] + (1 - keep) * high
        self.found = (low, high)

    def value(self) -> tuple[float, float]:
        return self.found or (0.0, 0.0)


def statistic_of(observer: str) -> Statistic:
    """What the observer needs to be collected."""
    return {"moving_average": MovingRange(), "minmax": Range()}.get(observer) or Histogram()


def observed_range(observer: str, seen: list[Any], kind: QuantType, percentile: float) -> tuple[float, float]:
    """The range for tensors that share a grid.

    Args:
        observer: one of :data:`OBSERVERS` other than ``damage``, which needs the whole graph.
        seen: what :func:`statistic_of` gave for each of them; a histogram serves all but ``moving_average``.
        kind: the grid.
        percentile: share of the values to cover, in percent, for ``percentile``.
    """
    if observer in ("moving_average", "minmax"):
        return extremes(seen)
    histogram = merged(seen)
    if observer == "percentile":
        rest = (1 - percentile / 100) / 2
        return min(histogram.quantile(rest), 0.0), max(histogram.quantile(1 - rest), 0.0)
    low, high = min(histogram.low, 0.0), max(histogram.high, 0.0)
    if low == high:
        return low, high
    centres = (histogram.edges[1:] + histogram.edges[:-1]) / 2
    used = histogram.counts > 0
    counts, centres = histogram.counts[used], centres[used].clamp(low, high)
    shares = torch.linspace(_LEAST_SHARE, 1.0, _SHARES, dtype=torch.float64)
    if observer == "entropy":
        losses = _divergence(counts, centres, low * shares, high * shares, kind)
    else:
        sums = RunningSums(counts, centres)
        if observer == "histogram":
            return _ends(sums, low, high, shares, kind)
        losses = sums.squared_error(low * shares, high * shares, kind)
    best = len(losses) - 1 - int(losses.flip(0).argmin())  # the widest of equals: all are, for a constant
    return low * float(shares[best]), high * float(shares[best])


def extremes(seen: list[Any]) -> tuple[float, float]:
    """Least and greatest value of all that :func:`statistic_of` saw, whatever the observer makes of it."""
    ends = [(item.low, item.high) if isinstance(item, HistogramValue) else item for item in seen]
    return min(float(low) for low, _ in ends), max(float(high) for _, high in ends)


def _ends(sums: RunningSums, low: float, high: float, shares: torch.Tensor, kind: QuantType) -> tuple[float, float]:
    """One end after the other where the squared error is least, until neither moves: the error never grows."""
    lows, highs = low * shares, high * shares
    found = low, high
    for _ in range(8):
        error = sums.squared_error(lows, torch.full_like(lows, found[1]), kind)
        below = float(lows[int(error.argmin())])
        error = sums.squared_error(torch.full_like(highs, below), highs, kind)
        before, found = found, (below, float(highs[int(error.argmin())]))
        if before == found:
            break
    return found


def merged(histograms: list[HistogramValue]) -> HistogramValue:
    """Counts of several histograms together; the limits are powers of two, so that bins of one fall into another's."""
    limit = max(float(item.edges[-1]) for item in histograms)
    total = torch.zeros_like(histograms[0].counts)
    for item in histograms:
        counts = item.counts
        bins = len(counts)
        for _ in range(round(torch.log2(torch.tensor(limit / float(item.edges[-1]))).item())):
            wider = torch.zeros_like(counts)
            wider[bins // 4 : bins // 4 * 3] = counts.reshape(-1, 2).sum(1)
            counts = wider
        total = total + counts
    edges = torch.linspace(-limit, limit, len(total) + 1, dtype=torch.float64)
    return HistogramValue(total, edges, min(h.low for h in histograms), max(h.high for h in histograms))


def weight_range(weight: torch.Tensor, axis: int | None, kind: QuantType, observer: str) -> tuple[Any, Any]:
    """The range of a weight: scalars, or ``[channels]`` along ``axis``; ``mse`` searches, all else is its extremes."""
    rows = weight.detach().float().movedim(axis, 0).flatten(1) if axis is not None else weight.detach().reshape(1, -1)
    low, high = rows.amin(1).clamp(max=0), rows.amax(1).clamp(min=0)
    if observer == "mse":
        best = torch.full_like(low, torch.inf)
        share = torch.ones_like(low)
        for step in torch.linspace(0.5, 1.0, 26).tolist():
            error = _rounding_error(rows, low * step, high * step, kind)
            better = error < best
            best, share = torch.where(better, error, best), torch.where(better, step, share)
        low, high = low * share, high * share
    return (low, high) if axis is not None else (low[0], high[0])


def _rounding_error(rows: torch.Tensor, low: torch.Tensor, high: torch.Tensor, kind: QuantType) -> torch.Tensor:
    scale, zero = (part[:, None] for part in parameters_of_range(low, high, kind))
    on_grid = ((rows / scale + zero).round().clamp(kind.minimum, kind.maximum) - zero) * scale
    return (on_grid - rows).square().sum(1)


class RunningSums:
    """A histogram as running sums, from which the error of any range is two look-ups.

    Args:
        counts: of the bins that hold values.
        centres: of these, ascending.
    """

    def __init__(self, counts: torch.Tensor, centres: torch.Tensor) -> None:
        self.centres = centres
        moments = counts * torch.stack([torch.ones_like(centres), centres, centres.square()])
        self.below = nn.functional.pad(moments.cumsum(1), (1, 0))  # of all bins before one
        self.above = nn.functional.pad(moments.flip(1).cumsum(1).flip(1), (0, 1))  # of it and all behind it
        self.rounded = float(counts[centres != 0].sum())  # zero is on every grid

    def squared_error(self, low: torch.Tensor, high: torch.Tensor, kind: QuantType) -> torch.Tensor:
        """``[candidates]`` expected squared error. Within a step values are taken as evenly spread: scale² / 12."""
        scale, zero = (part.double() for part in parameters_of_range(low, high, kind))
        least, most = (kind.minimum - zero) * scale, (kind.maximum - zero) * scale
        under = self.below[:, torch.searchsorted(self.centres, least)]
        over = self.above[:, torch.searchsorted(self.centres, most, right=True)]
        clipped = _beyond(under, least) + _beyond(over, most)
        return clipped + scale.square() / 12 * (self.rounded - under[0] - over[0])


def _beyond(moments: torch.Tensor, end: torch.Tensor) -> torch.Tensor:
    """Σ (x − end)² from the count, the sum and the sum of squares of the x."""
    count, total, squares = moments
    return squares - 2 * end * total + end.square() * count


def _divergence(
    counts: torch.Tensor, centres: torch.Tensor, low: torch.Tensor, high: torch.Tensor, kind: QuantType
) -> torch.Tensor:
    """``[candidates]`` divergence of the histogram from what is left of it on each grid."""
    scale, zero = parameters_of_range(low, high, kind)
    found = []
    for step, offset in zip(scale.double().tolist(), zero.tolist(), strict=True):
        place = (centres / step + offset).round().clamp(kind.minimum, kind.maximum).long() - kind.minimum
        levels = kind.maximum - kind.minimum + 1
        mass = torch.zeros(levels, dtype=torch.float64).index_add_(0, place, counts)
        width = torch.zeros(levels, dtype=torch.float64).index_add_(0, place, torch.ones_like(counts))
        spread = mass[place] / width[place]  # each level's mass over the bins that fall into it
        p, q = counts / counts.sum(), spread / spread.sum()
        found.append((p * (p / q).log()).sum())
    return torch.stack(found)
