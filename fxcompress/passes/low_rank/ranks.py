"""How many components to keep: from a number, a share of the cost, of the energy, a bound of the error, or a budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

__all__ = ["Goal", "Price", "first_that", "share_budget"]


@dataclass(frozen=True)
class Price:
    """What a layer costs as it is, and what each component of its factors costs.

    Attributes:
        dense: parameters or multiply-accumulates of the layer.
        unit: of one component.
        full: the rank beyond which nothing is approximated.
    """

    dense: int
    unit: int
    full: int

    def pays(self, rank: int) -> bool:
        """Whether the factors are cheaper."""
        return rank * self.unit < self.dense

    @property
    def break_even(self) -> int:
        """The least rank that does not pay."""
        return -(-self.dense // self.unit)


@dataclass(frozen=True)
class Goal:
    """What was asked for; exactly one of the first four is given.

    Attributes:
        rank: components.
        ratio: share of the cost to keep.
        energy: share of the squared singular values to keep.
        error: bound of the relative error, in the norm of the metric.
        round_to: ranks are multiples of this: up for ``energy`` and ``error``, which are bounds, else down.
    """

    rank: int | None = None
    ratio: float | None = None
    energy: float | None = None
    error: float | None = None
    round_to: int = 1

    @property
    def needs_spectrum(self) -> bool:
        """Whether the rank depends on the weight."""
        return self.energy is not None or self.error is not None

    def fixed(self, price: Price) -> int:
        """The rank by ``rank`` or ``ratio``."""
        if self.rank is not None:
            return self.rounded(self.rank)
        assert self.ratio is not None
        return self.rounded(int(self.ratio * price.dense / price.unit))

    def of_spectrum(self, energy: torch.Tensor) -> int:
        """The least rank that keeps the share of the energy, or keeps the bound, in every group.

        Args:
            energy: ``[groups, n]``, falling.
        """
        total = energy.sum(-1, keepdim=True)
        tail = energy.flip(-1).cumsum(-1).flip(-1)  # [i] is what is lost when i components are kept
        rank = int((tail > self.lost * total * (1 + 1e-12)).sum(-1).max())
        return max(1, self.round_to * math.ceil(max(1, rank) / self.round_to))

    @property
    def lost(self) -> float:
        """The share of the energy that may be lost, by ``energy`` or ``error``."""
        return (1 - self.energy) if self.energy is not None else float(self.error or 0.0) ** 2

    def rounded(self, rank: int) -> int:
        """Down to a multiple, but not to nothing."""
        return max(self.round_to, rank // self.round_to * self.round_to, 1)


def first_that(last: int, holds: Callable[[int], bool]) -> int | None:
    """The first of 1 … ``last`` for which ``holds``, which stays true from there on; None if it never does."""
    low, high = 1, last + 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle + 1, high)
    return low if low <= last else None


def share_budget(
    spectra: Sequence[torch.Tensor], prices: Sequence[Price], ratio: float, round_to: int = 1
) -> list[int | None]:
    """Ranks that together keep ``ratio`` of the cost, where a component costs most loss per price first.

    A component's loss is its share of its own layer's energy: the sum of relative errors is what is minimised. One
    threshold on loss per price is searched by bisection; a layer whose rank would not pay stays whole.

    Args:
        spectra: energies of each layer, ``[groups, n]``, falling.
        prices: of each layer.
        ratio: share of the cost of all layers together.
        round_to: ranks are multiples of this, rounded down.

    Returns:
        a rank per layer; None for one that stays as it is.
    """
    worth = []
    for energy, price in zip(spectra, prices, strict=True):
        gains = energy.sum(0) / max(float(energy.sum()), 1e-300) / price.unit
        worth.append(gains.flip(0).contiguous())  # rising, for searchsorted
    budget = ratio * sum(price.dense for price in prices)

    def at(threshold: float) -> tuple[list[int | None], int]:
        ranks: list[int | None] = []
        cost = 0
        for gains, price in zip(worth, prices, strict=True):
            above = len(gains) - int(torch.searchsorted(gains, gains.new_tensor(threshold), right=True))
            rank = max(round_to, above // round_to * round_to)
            whole = not price.pays(rank) or rank >= price.full
            ranks.append(None if whole else rank)
            cost += price.dense if whole else rank * price.unit
        return ranks, cost

    low, high = 0.0, max((float(gains[-1]) for gains in worth), default=0.0)
    best = at(high)[0]
    if at(low)[1] <= budget:
        return at(low)[0]
    for _ in range(100):
        middle = (low + high) / 2
        ranks, cost = at(middle)
        if cost <= budget:
            best, high = ranks, middle
        else:
            low = middle
    return best
