"""The options of channel removal, checked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fxcompress.errors import OptionError, nearest
from fxcompress.passes.pruning.importance import WEIGHT_CRITERIA

__all__ = ["DATA_CRITERIA", "check_options"]

DATA_CRITERIA = ("taylor", "obd", "activation")
_AMOUNTS = ("ratio", "parameters", "macs", "latency_ms", "speedup")
_KINDS = (
    *(f"Conv{n}d" for n in (1, 2, 3)),
    *(f"ConvTranspose{n}d" for n in (1, 2, 3)),
    "Linear",
    "Embedding",
    "LSTM",
    "GRU",
    "RNN",
)


def check_options(options: Any) -> None:
    """Check what types do not say.

    Raises:
        OptionError: names the option and what it may be.
    """
    given = [name for name in _AMOUNTS if getattr(options, name) is not None]
    if len(given) > 1:
        raise OptionError(f"{' and '.join(given)} both say how much shall go", remedy="give one of them")
    if options.ratio is not None and not 0 < options.ratio < 1:
        raise OptionError(
            f"ratio={options.ratio} is outside (0, 1)", where="ratio", remedy="0.5 removes half of the channels"
        )
    for name in ("parameters", "macs", "latency_ms"):
        value = getattr(options, name)
        if value is not None and not value > 0:
            raise OptionError(f"{name}={value} is not above 0", where=name)
    if options.speedup is not None and not options.speedup > 1:
        raise OptionError(f"speedup={options.speedup} is not above 1", where="speedup")
    for pattern, ratio in options.ratios.items():
        if not 0 <= ratio < 1:
            raise OptionError(f"the ratio {ratio} of {pattern!r} is outside [0, 1)", where="ratios")
    steps = options.round_to if isinstance(options.round_to, Mapping) else {}
    for kind in steps:
        if kind not in _KINDS:
            raise OptionError(f"there is no type of layer {kind!r}", where="round_to", remedy=nearest(kind, _KINDS))
    for name, value in (
        ("round_to", min(steps.values(), default=1) if isinstance(options.round_to, Mapping) else options.round_to),
        ("min_width", options.min_width),
        ("steps", options.steps),
        ("batches", 1 if options.batches is None else options.batches),
    ):
        if value < 1:
            raise OptionError(f"{name}={value} is below 1", where=name)
    if not 0 < options.max_ratio <= 1:
        raise OptionError(f"max_ratio={options.max_ratio} is outside (0, 1]", where="max_ratio")
    _check_data(options)


def _check_data(options: Any) -> None:
    importance = options.importance
    known = (*WEIGHT_CRITERIA, *DATA_CRITERIA)
    if isinstance(importance, str) and importance not in known:
        raise OptionError(
            f"there is no importance {importance!r}", where="importance", remedy=nearest(importance, known)
        )
    if options.calibration is None:
        for what, needs in (
            (f"importance={importance!r}", importance in DATA_CRITERIA if isinstance(importance, str) else False),
            ("reconstruct=True", options.reconstruct),
        ):
            if needs:
                raise OptionError(f"{what} needs data", where="calibration", remedy="give calibration=<batches>")
