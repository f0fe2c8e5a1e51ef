"""A factor fitted to the output by least squares, as far as the data supports it.

Of rows y (the original output) and z (what the factor reads) the fit is A minimising Σ ‖y − A z‖² + λ ‖A − A₀‖², where
A₀ is the factor before: the truncation, which amplifies nothing. A weak λ on few rows fits them and no others, and what
the rewritten layers before get wrong comes out of it a thousand times larger. So λ is chosen on data that the fit has
not seen: each half of the samples is fitted with each λ and judged on the other half (cross-validation in two folds,
Stone 1974, "Cross-validatory choice and assessment of statistical predictions").
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["Fit", "Sums", "fit"]

# Of the mean variance of z, from the strongest on: the search ends where the other half is no longer met any better.
_STRENGTHS = (10.0, 1.0, 0.1, 0.01, 1e-3, 1e-4, 1e-6)
_PIECE = 1 << 14  # elements of a factor that are fitted at once: little beside a large one,
_ROWS = 64  # and rows at least: enough for a product


@dataclass
class Sums:
    """All that a fit needs to know of its rows.

    Attributes:
        cross: Σ y zᵀ, float64 ``[…, outputs, d]``.
        moment: Σ z zᵀ, ``[…, d, d]``.
        energy: Σ ‖y‖².
        fold: those among them of one half of the samples, to hold what is fitted on the other against; None where
            there is one sample only.
        less: of rows that are in ``cross`` and ``moment`` and do not count: differences would be as large as those.
    """

    cross: torch.Tensor
    moment: torch.Tensor
    energy: float
    fold: Sums | None = None
    less: Sums | None = None

    def __sub__(self, other: Sums) -> Sums:
        return Sums(self.cross, self.moment, self.energy - other.energy, less=other)

    def __iadd__(self, other: Sums) -> Sums:
        self.cross += other.cross
        self.moment += other.moment
        self.energy += other.energy
        if self.fold is None or other.fold is None:
            self.fold = None
        else:
            self.fold += other.fold
        return self

    def loss(self, factor: torch.Tensor) -> float:
        """Σ ‖y − A z‖² of a factor of any floating dtype."""
        parts = (self.quadratic(rows, factor[..., rows, :].double()) for rows in _spans(factor))
        return max(self.energy + sum(parts), 0.0)

    def quadratic(self, rows: slice, factor: torch.Tensor) -> float:
        """What some rows of A, in float64, add to the loss beside Σ ‖y‖²."""
        gap = self._read(factor).sub_(self._cross(rows), alpha=2)
        return float(gap.flatten() @ factor.flatten())

    def fitted(self, now: torch.Tensor, strength: float) -> torch.Tensor | None:
        """A in the dtype of A₀ for λ of ``strength`` times the mean variance of z; None where there is no such A."""
        made = torch.empty_like(now)
        count = 0
        for rows, part in self.pieces(now, strength):
            made[..., rows, :] = part
            count += 1
        return made if count else None

    def pieces(self, now: torch.Tensor, strength: float) -> Iterator[tuple[slice, torch.Tensor]]:
        """The same in float64, some rows at a time; none where rounding leaves no such A."""
        root = self.moment.clone()
        if self.less is not None:
            root -= self.less.moment
        diagonal = root.diagonal(dim1=-2, dim2=-1)
        diagonal += strength * diagonal.mean(-1, keepdim=True).clamp_min(1e-300)
        failed = torch.empty(0, dtype=torch.int32, device=root.device)
        # By columns, as LAPACK has it, so that the factor takes the place of the matrix.
        root, failed = torch.linalg.cholesky_ex(root.mT, out=(root.mT, failed))
        if bool(failed.any()):
            return
        for rows in _spans(now):
            part = now[..., rows, :].double()
            # In terms of the change of A, so that no rounding enters where nothing has to change.
            gradient = self._read(part).neg_().add_(self._cross(rows))
            # Not `cholesky_solve`, which copies the root each time.
            half = torch.linalg.solve_triangular(root, gradient.mT, upper=False)
            yield rows, torch.linalg.solve_triangular(root.mT, half, upper=True).mT.add_(part)

    def _cross(self, rows: slice) -> torch.Tensor:
        found = self.cross[..., rows, :]
        return found if self.less is None else found - self.less.cross[..., rows, :]

    def _read(self, factor: torch.Tensor) -> torch.Tensor:
        """``factor · moment``."""
        found = factor @ self.moment
        return found if self.less is None else found.sub_(factor @ self.less.moment)


@dataclass(frozen=True)
class Fit:
    """A fitted factor.

    Attributes:
        factor: in the shape and dtype of the one before.
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


def fit(sums: Sums, now: torch.Tensor, unproven: float | None = None) -> Fit:
    """The factor that does best on data it has not seen.

    Args:
        sums: of all rows; their fold is let go as soon as it has served.
        now: A₀, of any floating dtype.
        unproven: strength with which one sample alone is fitted; None leaves A₀.
    """
    if sums.fold is None:
        alone = None if unproven is None else sums.fitted(now, unproven)
        return Fit(now if alone is None else alone, None if alone is None else unproven, None)
    chosen, least = _strength(sums, sums.fold, now)
    sums.fold = None
    made = None if chosen is None else sums.fitted(now, chosen)
    return Fit(now if made is None else made, None if made is None else chosen, math.sqrt(least))


def _strength(whole: Sums, fold: Sums, now: torch.Tensor) -> tuple[float | None, float]:
    """The strength with which each half meets the other best, and the share of the energy that is then lost."""
    halves = (fold, whole - fold)
    energy = max(whole.energy, 1e-300)
    chosen, least = None, whole.loss(now) / energy
    for strength in _STRENGTHS:
        found = 0.0
        for seen, unseen in (halves, halves[::-1]):
            parts = [unseen.quadratic(rows, part) for rows, part in seen.pieces(now, strength)]
            found += max(unseen.energy + sum(parts), 0.0) / energy if parts else math.inf
        if not found < least:
            break
        chosen, least = strength, found
    return chosen, least


def _spans(factor: torch.Tensor) -> Iterator[slice]:
    rows = factor.shape[-2]
    step = max(_ROWS, _PIECE * rows // max(1, factor.numel()))
    for start in range(0, rows, step):
        yield slice(start, start + step)
