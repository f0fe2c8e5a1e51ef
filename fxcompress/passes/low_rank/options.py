"""Options that the low-rank passes have in common, checked."""

from __future__ import annotations

from typing import Any

from fxcompress.errors import OptionError
from fxcompress.passes.base import PassContext
from fxcompress.passes.low_rank.ranks import Goal

__all__ = ["check_common", "check_latency", "goal_of", "patterns"]

_AMOUNTS = ("rank", "ratio", "energy", "error")


def patterns(options: Any, *names: str) -> None:
    """Let each of these options be given as one pattern or as a list."""
    for name in names:
        value = getattr(options, name)
        if isinstance(value, (list, str)):
            object.__setattr__(options, name, (value,) if isinstance(value, str) else tuple(value))


def check_common(options: Any, amounts: tuple[str, ...] = _AMOUNTS) -> None:
    """Check what types do not say.

    Raises:
        OptionError: names the option and what it may be.
    """
    given = [name for name in amounts if getattr(options, name) is not None]
    if len(given) > 1:
        raise OptionError(f"{' and '.join(given)} both say how much to keep", remedy="give one of them")
    for name in ("ratio", "energy"):
        value = getattr(options, name, None)
        if value is not None and not 0 < value < 1:
            raise OptionError(
                f"{name}={value} is outside (0, 1)", where=name, remedy="0.5 keeps half of the parameters, or energy"
            )
    error = options.error
    if error is not None and not 0 <= error < 1:
        raise OptionError(f"error={error} is outside [0, 1)", where="error", remedy="0.05 allows 5 % of relative error")
    for name in ("rank", "terms", "round_to", "batches", "moments_mib"):
        value = getattr(options, name, None)
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, int) and number < 1:
                raise OptionError(f"{name}={value} is below 1", where=name)
    if options.calibration is None:
        for name in ("refit", "correct_bias"):
            if getattr(options, name, None):
                raise OptionError(f"{name}=True needs data", where="calibration", remedy="give calibration=<batches>")


def goal_of(options: Any) -> Goal:
    """What the options ask for; with none of them half of the cost."""
    given = {name: getattr(options, name) for name in _AMOUNTS}
    if all(value is None for value in given.values()):
        given["ratio"] = 0.5
    return Goal(**given, round_to=options.round_to)


def check_latency(options: Any, context: PassContext) -> None:
    """Refuse a latency goal where no latency can be measured.

    Raises:
        OptionError: the pass runs outside of ``compile()``, or there is no such backend.
    """
    if options.cost == "latency" and context.latency is None:
        raise OptionError(
            "latency cannot be measured here", where="cost", remedy="run the pass inside compile(), or count parameters"
        )
    if options.cost == "latency" and context.check_backend is not None:
        context.check_backend(options.backend)
