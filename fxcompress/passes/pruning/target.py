"""The least removal that reaches a target: parameters, multiply-accumulates, or measured latency."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from fxcompress.errors import PreconditionError
from fxcompress.passes.pruning.select import Piece

__all__ = ["reach", "refill"]

Classes = NDArray[np.int64]

_RATIO_STEP = 1e-3


def reach(
    at: Callable[[float], Classes],
    measure: Callable[[Classes], float],
    target: float,
    *,
    what: str,
    tries: int = 12,
) -> Classes:
    """Bisect for the least ratio whose removal measures at most ``target``.

    Args:
        at: the classes that go at a ratio; more go at a larger one.
        measure: what is left after they went.
        target: in the unit of ``measure``.
        what: name of the measure with its unit, for the error.
        tries: measurements beyond the first.

    Returns:
        the classes that go.

    Raises:
        PreconditionError: not even the largest removal reaches the target.
    """
    low, high = 0.0, 1.0 - _RATIO_STEP
    none, best = at(low), at(high)
    least = measure(best)
    if least > target:
        raise PreconditionError(
            f"the target of {target:,.6g} {what} cannot be reached: with all that may go, {least:,.6g} remain",
            remedy="set a target above that, or allow more: fewer layers in ignore, a smaller min_width or round_to",
        )
    for _ in range(tries):
        if high - low < _RATIO_STEP or np.array_equal(none, best):
            break
        middle = (low + high) / 2
        classes = at(middle)
        if not np.array_equal(classes, best) and measure(classes) > target:
            low, none = middle, classes
        else:
            high, best = middle, classes
    return best


def refill(
    gone: Classes,
    pieces: Sequence[Piece],
    measure: Callable[[Classes], float],
    target: float,
    *,
    tries: int = 24,
) -> Classes:
    """Give back ``pieces``, in their order, while the target holds.

    A ratio takes something from every group at once, and so overshoots a target. What is left of the budget buys
    single channels back. Where the next piece does not fit, its group is done, and smaller ones of others are tried.

    Args:
        gone: the classes that would go.
        pieces: parts of ``gone``, what shall stay first; each leaves a legal width with those before it.
        measure: what is left after classes went.
        target: in the unit of ``measure``.
        tries: measurements.
    """
    rest, step, growing = list(pieces), 1, True
    for _ in range(tries):
        if not rest:
            break
        fewer = np.setdiff1d(gone, np.concatenate([piece.classes for piece in rest[:step]]))
        if measure(fewer) <= target:
            gone, rest = fewer, rest[step:]
            step = step * 2 if growing else max(step // 2, 1)
        elif step > 1:
            step, growing = step // 2, False
        else:
            rest = [piece for piece in rest if piece.group != rest[0].group]
            growing = True
    return gone
