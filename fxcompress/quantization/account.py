"""What quantization did, as rewrites and skips of a report."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fxcompress.quantization.calibrate import Calibrated
from fxcompress.quantization.noise import Noise
from fxcompress.quantization.placement import Placement
from fxcompress.quantization.repair import Repaired
from fxcompress.quantization.schemes import Scheme

__all__ = ["described", "layer_details", "repair_details", "unusual"]


def layer_details(
    placement: Placement,
    scheme: Scheme,
    grids: Iterable[Calibrated] = (),
    noise: Mapping[str, Noise] | None = None,
    repaired: Mapping[str, Repaired] | None = None,
) -> dict[str, dict[str, Any]]:
    """For each quantized layer what the report tells of it."""
    by_layer = {grid.values[0]: grid for grid in grids if grid.path.endswith(".weight_quantizer")}
    details: dict[str, dict[str, Any]] = {}
    for path in placement.layers:
        detail: dict[str, Any] = {
            "weight": f"int{scheme.weight.bits}" + (", per channel" if scheme.per_channel else ""),
            "activation": f"{'' if scheme.activation.signed else 'u'}int{scheme.activation.bits}",
        }
        if path in by_layer:
            detail["weight_scale"] = by_layer[path].scale
            if by_layer[path].note:
                detail["note"] = by_layer[path].note
        if noise is not None and path in noise:
            detail["signal_to_noise_db"] = noise[path].decibels
        if repaired is not None and path in repaired:
            detail["largest_shift"] = repaired[path].shift
        details[path] = detail
    return details


def unusual(grids: Iterable[Calibrated]) -> list[str]:
    """What was odd about the grids of activations, in a few words each."""
    stubs = [grid for grid in grids if not grid.path.endswith(".weight_quantizer")]
    zero = sum(grid.low == grid.high == 0 for grid in stubs)
    told = [f"{zero} {'value was' if zero == 1 else 'values were'} zero on all data"] if zero else []
    instead = next((grid.note for grid in stubs if " instead: " in grid.note), "")
    return [*told, f"ranges {instead}"] if instead else told


def described(grid: Calibrated, users: Sequence[str] = ()) -> dict[str, Any]:
    """A grid as plain values."""
    told: dict[str, Any] = {
        "values": list(grid.values),
        "low": grid.low,
        "high": grid.high,
        "scale": grid.scale,
        "zero_point": grid.zero_point,
    }
    if users:
        told["read_by"] = list(users)
    if grid.note:
        told["note"] = grid.note
    return told


def repair_details(repaired: Repaired) -> dict[str, Any]:
    """What a repair did to one layer, as plain values."""
    told: dict[str, Any] = {
        "signal_to_noise_db_before": Noise(repaired.signal, repaired.noise).decibels,
        "signal_to_noise_db": Noise(repaired.signal, repaired.left).decibels,
        "largest_shift": repaired.shift,
    }
    if repaired.weight is not None:
        told["weights_not_to_nearest"] = repaired.flipped
    return told
