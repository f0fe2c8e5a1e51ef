"""Learning rates as a function of the step alone: nothing to save, and a resumed run has the rates it would have."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from fxcompress.errors import PreconditionError

__all__ = ["SCHEDULES", "Schedule", "schedule"]

Schedule = Callable[[int], float]
"""Optimizer step, counted from 0 → factor of the learning rate."""

SCHEDULES = ("constant", "cosine", "linear", "one_cycle", "step")

_ONE_CYCLE_RISE, _ONE_CYCLE_START, _ONE_CYCLE_END = 0.3, 1 / 25, 1e-4  # Smith & Topin 2018


def schedule(
    name: str | Callable[[float], float],
    total: int | None,
    *,
    warmup: float = 0.0,
    milestones: Sequence[float] = (),
    gamma: float = 0.1,
) -> Schedule:
    """The factor of the learning rate at every step.

    Args:
        name: one of :data:`SCHEDULES`, or a function of the share done in [0, 1].
        total: optimizer steps of the run; None only with ``constant``.
        warmup: steps in which the factor rises from 0 to 1: a share of ``total`` below 1, else a number.
            ``one_cycle`` takes a share as that of its rise.
        milestones: of ``step``: shares of the run.
        gamma: of ``step``.

    Raises:
        PreconditionError: the run is over before the rate has risen.
    """
    if total is not None and warmup >= 1 and warmup >= total:
        raise PreconditionError(
            f"warmup={warmup:g} steps are not less than the run's {total}",
            where="warmup",
            remedy="give a share, 0.1, or fewer steps",
        )
    if name == "one_cycle":
        rise = warmup if warmup else _ONE_CYCLE_RISE
        rising = rise * (total or 1) if rise < 1 else rise
        return lambda step: _one_cycle(step, max(total or 1, 1), rising)
    rising = warmup * (total or 0) if warmup < 1 else warmup
    after = _shape(name, milestones, gamma)

    def factor(step: int) -> float:
        if step < rising:
            return (step + 1) / (rising + 1)
        return after(min(1.0, (step - rising) / max((total or 0) - rising, 1)))

    return factor


def _shape(name: str | Callable[[float], float], milestones: Sequence[float], gamma: float) -> Callable[[float], float]:
    if callable(name):
        return name
    if name == "cosine":
        return lambda share: 0.5 * (1 + math.cos(math.pi * share))
    if name == "linear":
        return lambda share: 1 - share
    if name == "step":
        return lambda share: gamma ** sum(share >= milestone for milestone in milestones)
    return lambda share: 1.0


def _one_cycle(step: int, total: int, rising: float) -> float:
    """From a 25th up to 1, then down to a ten-thousandth, each along half a cosine."""
    if step < rising:
        return _between(_ONE_CYCLE_START, 1.0, step / max(rising, 1))
    return _between(1.0, _ONE_CYCLE_END, min(1.0, (step - rising) / max(total - rising, 1)))


def _between(start: float, end: float, share: float) -> float:
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * share))
