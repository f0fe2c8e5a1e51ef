"""Factors between layers that make quantization lose less: equalized weights, and smoothed activations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from fxcompress.analysis.scaling import Factors, Group

__all__ = ["ALPHAS", "SiteRange", "equalize", "expected_noise", "smooth"]

_SWEEPS = 100
_CONVERGED = 1e-3  # largest logarithm of a factor in the last sweep
_REACH = 1e4  # factors lie between its inverse and this
ALPHAS = tuple(step / 20 for step in range(21))


def equalize(factors: Factors, groups: Sequence[Group]) -> tuple[int, float]:
    """Factors s = √(r₁ / r₂) for each channel, in turns until nothing moves (Nagel et al. 2019, arXiv:1906.04721).

    r₁ is the range of the weights that make the channel and r₂ of those that read it; with several layers on a side the
    largest, each layer relative to its own largest. A factor common to all channels changes nothing: their mean is 1.

    Args:
        factors: where the found ones are put.
        groups: of the same analysis.

    Returns:
        number of sweeps, and the largest logarithm of a factor in the last.
    """
    sweeps, moved = 0, float("inf")
    while moved >= _CONVERGED and sweeps < _SWEEPS:
        sweeps, moved = sweeps + 1, 0.0
        for group in groups:
            made = _largest([factors.rows(item.path, item.classes) for item in group.makers])[group.classes]
            read = _largest([factors.columns(item.path, item.classes) for item in group.readers])[group.classes]
            step = torch.where((made > 0) & (read > 0), (made / read).sqrt(), torch.ones_like(made)).log()
            step = step - step.mean()
            old = factors.values[group.classes].log()
            new = (old + step).clamp(-torch.tensor(_REACH).log(), torch.tensor(_REACH).log())
            factors.values[group.classes] = new.exp()
            moved = max(moved, float((new - old).abs().max()))
    return sweeps, moved


def _largest(ranges: list[torch.Tensor]) -> torch.Tensor:
    relative = [item / item.max().clamp_min(1e-30) for item in ranges]
    return torch.stack(relative).amax(0)


@dataclass(frozen=True)
class SiteRange:
    """What layers that share factors read, one entry for each factor.

    Attributes:
        low: least value, float64.
        high: greatest.
        square: mean square.
        columns: largest absolute weight that reads it.
    """

    low: torch.Tensor
    high: torch.Tensor
    square: torch.Tensor
    columns: torch.Tensor

    @property
    def reach(self) -> torch.Tensor:
        """Largest absolute value."""
        return torch.maximum(-self.low, self.high)


def smooth(site: SiteRange, alpha: float) -> torch.Tensor:
    """S = max|x|^α / max|w|^(1−α) (SmoothQuant, Xiao et al. 2022, arXiv:2211.10438); 1 where either is 0."""
    used = (site.reach > 0) & (site.columns > 0)
    s = site.reach.clamp_min(1e-30).pow(alpha) / site.columns.clamp_min(1e-30).pow(1 - alpha)
    s = torch.where(used, s, torch.ones_like(s))
    middle = s[used].log().mean().exp() if bool(used.any()) else torch.ones(())
    return torch.where(used, s.clamp(middle / _REACH, middle * _REACH), s)


def expected_noise(
    site: SiteRange, s: torch.Tensor, weights: Mapping[str, torch.Tensor], *, levels: int = 255, steps: int = 127
) -> float:
    """Mean squared error that 8-bit rounding is expected to put on the outputs of the layers, with factors ``s``.

    Rounding to a grid of step Δ errs by Δ²/12: activations with one Δ for the tensor, weights with one for each output.

    Args:
        site: what the layers read.
        s: factor of each input.
        weights: ``[outputs, inputs]`` of each layer, float64.
        levels: of the activation's grid.
        steps: of a weight's grid, on one side.
    """
    low, high = (site.low / s).min().clamp(max=0), (site.high / s).max().clamp(min=0)
    activation = ((high - low) / levels).square() / 12
    power = (site.square / s.square()).sum()
    total = 0.0
    for weight in weights.values():
        scaled = weight * s
        step = scaled.abs().amax(1) / steps
        total += float(activation * scaled.square().sum() + (step.square() / 12).sum() * power)
    return total
