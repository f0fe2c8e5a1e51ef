"""A factor fitted to the output by least squares, as far as the data supports it.

Of rows y (the original output) and z (what the factor reads) the fit is A minimising Σ ‖y − A z‖² + λ ‖A − A₀‖², where
A₀ is the factor before: the truncation, which amplifies nothing. A weak λ on few rows fits them and no others, and what
the rewritten layers before get wrong comes out of it a thousand times larger. So λ is chosen on data that the fit has
not seen: each half of the samples is fitted with each λ and judged on the other half (cross-validation in two folds,
Stone 1974, "Cross-validatory choice and assessment of statistical predictions").
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["Fit", "Sums", "fit"]

# Of the mean variance of z, from the strongest on: the search ends where the other half is no longer met any better.
_STRENGTHS = (10.0, 1.0, 0.1, 0.01, 1e-3, 1e-4, 1e-6)


@dataclass(frozen=True)
class Sums:
    """All that a fit needs to know of its rows.

    Attributes:
        cross: Σ y zᵀ, float64 ``[…, outputs, d]``.
        moment: Σ z zᵀ, ``[…, d, d]``.
        energy: Σ ‖y‖².
    """

    cross: torch.Tensor
    moment: torch.Tensor
    energy: float

    def __sub__(self, other: Sums) -> Sums:
        return Sums(self.cross - other.cross, self.moment - other.moment, self.energy - other.energy)

    def loss(self, factor: torch.Tensor) -> float:
        """Σ ‖y − A z‖²."""
        gap = (factor @ self.moment).sub_(self.cross, alpha=2)
        return max(self.energy + float(gap.flatten() @ factor.flatten()), 0.0)

    def fitted(self, now: torch.Tensor, strength: float) -> torch.Tensor | None:
        """A for λ of ``strength`` times the mean variance of z; None where rounding leaves no such A."""
        scale = self.moment.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(1e-300)[..., None]
        with_ridge = self.moment.clone()
        with_ridge.diagonal(dim1=-2, dim2=-1).add_(strength * scale)
        # In terms of the change of A, so that no rounding enters where nothing has to change.
        gradient = (now @ self.moment).neg_().add_(self.cross)
        root, failed = torch.linalg.cholesky_ex(with_ridge)
        return None if bool(failed.any()) else torch.cholesky_solve(gradient.mT, root).mT.add_(now)


@dataclass(frozen=True)
class Fit:
    """A fitted factor.

    Attributes:
        factor: float64, in the shape of the one before.
        strength: λ, of the mean variance of what the factor reads; None where the factor stayed as it was.
        held_out_error: relative error of the output on the half of the data that was not fitted, the mean of both;
            None where the data cannot be halved.
    """

    factor: torch.Tensor
    strength: float | None
    held_out_error: float | None

    @property
    def detail(self) -> dict[str, Any]:
        """What the report says of it."""
        return {"ridge": self.strength, "held_out_error": self.held_out_error}


def fit(whole: Sums, fold: Sums | None, now: torch.Tensor, unproven: float | None = None) -> Fit:
    """The factor that does best on data it has not seen.

    Args:
        whole: of all rows.
        fold: of the rows of one half of the samples; None where there is one sample only.
        now: A₀, float64.
        unproven: strength with which one sample alone is fitted; None leaves A₀.
    """
    if fold is None:
        alone = None if unproven is None else whole.fitted(now, unproven)
        return Fit(now if alone is None else alone, None if alone is None else unproven, None)
    halves = (fold, whole - fold)
    energy = max(whole.energy, 1e-300)

    chosen, least = None, whole.loss(now) / energy
    for strength in _STRENGTHS:
        found = 0.0
        for seen, unseen in (halves, halves[::-1]):
            factor = seen.fitted(now, strength)
            found += math.inf if factor is None else unseen.loss(factor) / energy
        if not found < least:
            break
        chosen, least = strength, found
    made = None if chosen is None else whole.fitted(now, chosen)
    return Fit(now if made is None else made, None if made is None else chosen, math.sqrt(least))
