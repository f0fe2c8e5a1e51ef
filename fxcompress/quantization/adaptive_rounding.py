"""Learned rounding of one layer's weight: AdaRound (Nagel et al. 2020, arXiv:2004.10568).

Each weight is rounded down or up. Which of the two is relaxed to h(V) = clip(σ(V)·1.2 − 0.1, 0, 1), learned with Adam
so that the layer's output on data stays near the one in floating point, and driven to 0 or 1 by Σ 1 − |2h − 1|^β, with
β falling. All of a layer at once; the groups of a convolution are a batch of matrix products.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from fxcompress.quantization.fake_quant import Quantizer

__all__ = ["RoundingProblem", "learn_rounding"]

_LOW, _HIGH = -0.1, 1.1  # what the sigmoid is stretched to, so that 0 and 1 can be reached
_WARM = 0.2  # of the iterations without the term that drives to 0 or 1
_BETA = (20.0, 2.0)
_RATE = 0.02
_WEIGHT = 0.01  # of that term; the error is that of rounding to nearest at the start


@dataclass(frozen=True)
class RoundingProblem:
    """A layer as a matrix product of rows.

    Attributes:
        weight: in floating point, ``[groups, outputs, d]``.
        bias: ``[groups, 1, outputs]``, or None.
        rows: what the layer reads in the rounded graph, ``[groups, n, d]``.
        targets: what it gives in floating point, ``[groups, n, outputs]``.
        activation: elementwise, what follows the layer; None where errors count as they are.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    rows: torch.Tensor
    targets: torch.Tensor
    activation: Callable[[torch.Tensor], torch.Tensor] | None = None

    def loss(self, weight: torch.Tensor, chosen: torch.Tensor | slice) -> torch.Tensor:
        """Mean squared error of the outputs with another weight, over the chosen rows."""
        made = self.rows[:, chosen] @ weight.mT
        if self.bias is not None:
            made = made + self.bias
        wanted = self.targets[:, chosen]
        if self.activation is not None:
            made, wanted = self.activation(made), self.activation(wanted)
        return (made - wanted).square().mean()


def learn_rounding(
    problem: RoundingProblem, quantizer: Quantizer, *, iterations: int, batch: int, seed: int
) -> tuple[torch.Tensor, float, float]:
    """Round a weight down or up so that the outputs move least.

    Args:
        problem: the layer.
        quantizer: of its weight, calibrated; scales along the outputs, or one.
        iterations: steps of Adam.
        batch: rows in each.
        seed: which rows.

    Returns:
        the weight on the grid, ``[groups, outputs, d]``, and the loss over all rows rounded to nearest and as learned.
        The weight is that rounded to nearest where learning did not lower the loss.
    """
    kind = quantizer.kind
    groups, outputs, _ = problem.weight.shape
    scale, zero = (
        part.reshape(groups, outputs, 1) if quantizer.axis is not None else part
        for part in (quantizer.scale.detach(), quantizer.zero_point)
    )
    exact = problem.weight.detach() / scale
    floor = exact.floor()

    def on_grid(up: torch.Tensor) -> torch.Tensor:
        clipped: torch.Tensor = ((floor + up + zero).clamp(kind.minimum, kind.maximum) - zero) * scale
        return clipped

    nearest = on_grid((exact - floor).round())
    before = float(problem.loss(nearest, slice(None)))
    share = ((exact - floor - _LOW) / (_HIGH - _LOW)).clamp(1e-4, 1 - 1e-4)
    variable = torch.logit(share).requires_grad_()
    optimizer = torch.optim.Adam([variable], lr=_RATE)
    generator = torch.Generator().manual_seed(seed)
    count = problem.rows.shape[1]
    for step in range(iterations):
        chosen = torch.randint(count, (min(batch, count),), generator=generator).to(problem.rows.device)
        with torch.enable_grad():
            up = _rectified(variable)
            loss = problem.loss(on_grid(up), chosen) / max(before, 1e-30)
            if step >= _WARM * iterations:
                done = (step - _WARM * iterations) / max(1.0, (1 - _WARM) * iterations)
                beta = _BETA[1] + (_BETA[0] - _BETA[1]) * (1 - done)
                loss = loss + _WEIGHT * (1 - (2 * up - 1).abs().pow(beta)).mean()
            optimizer.zero_grad()
            loss.backward()
        optimizer.step()
    learned = on_grid((variable.detach() >= 0).to(floor.dtype))
    after = float(problem.loss(learned, slice(None)))
    return (learned, before, after) if after < before else (nearest, before, before)


def _rectified(variable: torch.Tensor) -> torch.Tensor:
    return (variable.sigmoid() * (_HIGH - _LOW) + _LOW).clamp(0, 1)
