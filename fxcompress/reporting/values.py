"""Plain values for reports: what JSON can hold, and back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

__all__ = ["from_json", "to_json"]


def to_json(value: Any) -> Any:
    """``value`` as JSON has it: tuples and sets are lists, keys are strings, tensors and arrays are nested lists.

    Infinities and NaN are ``"inf"``, ``"-inf"`` and ``"nan"``; what JSON has no form for is its ``str``.
    """
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, (int, np.integer)):
        return int(value)
    if isinstance(value, (float, np.floating)):
        return float(value) if math.isfinite(value) else str(float(value))
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted((to_json(item) for item in value), key=str)
    if isinstance(value, (list, tuple)):
        return [to_json(item) for item in value]
    if isinstance(value, (torch.Tensor, np.ndarray)):
        return to_json(value.tolist())
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    return str(value) if isinstance(value, (Path, torch.device)) else getattr(value, "__qualname__", str(value))


def from_json(detail: dict[str, Any]) -> dict[str, Any]:
    """A rewrite's detail with the keys that are numbers made numbers again: the dims in ``detail["kept"]``."""
    kept = detail.get("kept")
    if not isinstance(kept, Mapping):
        return detail
    return detail | {
        "kept": {
            name: {int(dim): indices for dim, indices in dims.items()} if isinstance(dims, Mapping) else dims
            for name, dims in kept.items()
        }
    }
