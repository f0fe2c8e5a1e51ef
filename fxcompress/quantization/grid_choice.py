"""What each of several grids for one value would do to the outputs, from the value and its gradient.

A rounding error Δ moves the outputs by gᵀ Δ, g being the gradient of the outputs there. Of its two parts, what clips
does so to one side, and is counted as it is: the square of the sum over the values beyond the end of a grid, which are
few. What rounds within the grid goes up as often as down from one position to the next, so that its squares add up:
Σ g² r², a mean over so many positions that a few thousand of them, drawn once, tell it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fxcompress.quantization.fake_quant import Quantizer

__all__ = ["GridChoice"]

_POSITIONS = 1 << 12  # of each sample


class GridChoice:
    """Grids to choose from.

    Args:
        grids: calibrated, of one kind, with one scale each.
        generator: draws positions.
    """

    def __init__(self, grids: Sequence[Quantizer], generator: torch.Generator) -> None:
        self.grids, self.generator = grids, generator
        kind = grids[0].kind
        scales = torch.stack([grid.scale for grid in grids]).double()
        zeros = torch.stack([grid.zero_point for grid in grids])
        self.lows, self.highs = (kind.minimum - zeros) * scales, (kind.maximum - zeros) * scales

    def damage(self, value: torch.Tensor, gradient: torch.Tensor) -> list[float]:
        """For each grid the sum over the samples, which are the first dimension if there are two."""
        if not value.numel():
            return [0.0] * len(self.grids)
        samples = value.shape[0] if value.dim() > 1 else 1
        values, gradients = value.reshape(samples, -1), gradient.reshape(samples, -1)
        return (self._clipped(values, gradients) + self._rounded(values, gradients)).tolist()

    def _rounded(self, values: torch.Tensor, gradients: torch.Tensor) -> torch.Tensor:
        count, weight = values.shape[1], 1.0
        if count > _POSITIONS:
            places = torch.randint(count, (_POSITIONS,), generator=self.generator).to(values.device)
            values, gradients, weight = values[:, places], gradients[:, places], count / _POSITIONS
        ends = zip(self.grids, self.lows.tolist(), self.highs.tolist(), strict=True)
        errors = [(grid(values) - values.clamp(low, high)) * gradients for grid, low, high in ends]
        return weight * torch.stack([error.double().square().sum() for error in errors]).cpu()

    def _clipped(self, values: torch.Tensor, gradients: torch.Tensor) -> torch.Tensor:
        samples, count = values.shape
        totals = torch.zeros(len(self.grids), samples, dtype=torch.float64)
        low, high = float(self.lows.max()), float(self.highs.min())
        flat = values.reshape(-1)
        beyond = flat > high
        if float(flat.amin()) < low:
            beyond |= flat < low
        places = beyond.nonzero()[:, 0]
        found, slopes = (part.reshape(-1)[places].double().cpu() for part in (values, gradients))
        errors = found.clamp(self.lows[:, None], self.highs[:, None]) - found
        totals.index_add_(1, places.cpu() // count, errors * slopes)
        return totals.square().sum(1)
