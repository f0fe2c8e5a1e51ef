"""How one tensor is quantized: integer type, zero point, and over which of its parts a scale is shared."""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = ["QuantType", "parameters_of_range"]


@dataclass(frozen=True)
class QuantType:
    """An integer grid: ``x ≈ scale · (q − zero_point)`` with ``minimum ≤ q ≤ maximum``.

    Attributes:
        bits: of the integer.
        signed: whether it is negative too.
        symmetric: the zero point is 0, or the middle of an unsigned type, and the range is as wide on both sides.
        narrow: leave out the lowest value of a signed type, so that -q exists for every q.
    """

    bits: int = 8
    signed: bool = True
    symmetric: bool = True
    narrow: bool = False

    @property
    def minimum(self) -> int:
        """The lowest integer."""
        return -(2 ** (self.bits - 1)) + self.narrow if self.signed else 0

    @property
    def maximum(self) -> int:
        """The highest integer."""
        return 2 ** (self.bits - 1) - 1 if self.signed else 2**self.bits - 1


def parameters_of_range(low: torch.Tensor, high: torch.Tensor, kind: QuantType) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero point of a grid that covers ``[low, high]`` and holds 0 exactly.

    Args:
        low: least value, a scalar or one per channel.
        high: greatest value, of the same shape.
        kind: the grid.

    Returns:
        scale, float32 and above 0, and zero point, int32, of the shape of ``low``. An empty range has scale 1.
    """
    low, high = low.double().clamp(max=0), high.double().clamp(min=0)
    if kind.symmetric:
        reach = torch.maximum(-low, high)
        steps = min(kind.maximum, -kind.minimum) if kind.signed else (kind.maximum + 1) // 2 - 1
        scale = reach / steps
        zero = torch.zeros_like(scale) if kind.signed else torch.full_like(scale, (kind.maximum + 1) // 2)
    else:
        scale = (high - low) / (kind.maximum - kind.minimum)
        zero = (kind.minimum - low / scale).round().clamp(kind.minimum, kind.maximum)
    scale = scale.float()
    # Smaller scales are denormal in the engines: such a tensor is zero for all that matters.
    empty = scale < torch.finfo(torch.float32).tiny * 2**8
    scale = torch.where(empty, torch.ones_like(scale), scale)
    zero = torch.where(empty, torch.full_like(zero, float(kind.minimum if not kind.symmetric else 0)), zero)
    if kind.symmetric and not kind.signed:
        zero = torch.full_like(zero, (kind.maximum + 1) // 2)
    return scale, zero.to(torch.int32)
