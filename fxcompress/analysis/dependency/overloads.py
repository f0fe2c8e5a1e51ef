"""Names of operations to the overloads that a graph may call."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["overloads"]


def overloads(names: str) -> list[Any]:
    """All functional overloads of ATen operations, named with spaces between."""
    found = []
    for name in names.split():
        packet = getattr(torch.ops.aten, name, None)
        if packet is not None:
            found += [getattr(packet, overload) for overload in packet.overloads()]
    return [overload for overload in found if not overload._schema.is_mutable and "out" not in overload._overloadname]
