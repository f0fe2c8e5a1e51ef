"""The least removal that reaches a target: parameters, multiply-accumulates, or measured latency."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from fxcompress.errors import PreconditionError

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
) -> tuple[Classes, Classes]:
    """Bisect for the least ratio whose removal measures at most ``target``.

    Args:
        at: the classes that go at a ratio; more go at a larger one.
        measure: what is left after they went.
        target: in the unit of ``measure``.
        what: name of the measure with its unit, for the error.
        tries: measurements beyond the first.

    Returns:
        the classes that go, and the larger set's neighbour: those of the largest ratio found to fall short.

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
    return best, none


def refill(gone: Classes, pieces: Sequence[Classes], measure: Callable[[Classes], float], target: float) -> Classes:
    """Bisect for the most ``pieces``, in their order, that can stay after all.

    A ratio takes something from every group at once, and so overshoots a target. Between the ratio that reaches it and
    the one that falls short, groups can be told apart.

    Args:
        gone: the classes that would go.
        pieces: parts of ``gone``, what matters most first; each leaves a legal width.
        measure: what is left after classes went.
        target: in the unit of ``measure``.
    """
    low, high, best = 0, len(pieces), gone
    while low < high:
        middle = (low + high + 1) // 2
        fewer = np.setdiff1d(gone, np.concatenate(pieces[:middle]))
        if measure(fewer) <= target:
            low, best = middle, fewer
        else:
            high = middle - 1
    return best
