"""Leave the user's model exactly as it was, whatever tracing does to it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

__all__ = ["preserved"]


@contextmanager
def preserved(model: nn.Module) -> Iterator[None]:
    """Restore every attribute of every submodule, and the random state, on leaving the block.

    Tracing runs the user's Python: a forward that caches a tensor on ``self``, or a recurrent layer that rebuilds
    its weight list, would otherwise be left holding fake tensors. Tensors themselves are not copied: an exported
    forward cannot write into them.
    """
    saved = [(module, _attributes(module)) for module in model.modules()]
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() and torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            for module, attributes in saved:
                module.__dict__.clear()
                module.__dict__.update(attributes)


def _attributes(module: nn.Module) -> dict[str, Any]:
    # Dicts, lists and sets are copied one level deep: registries of hooks and parameters are changed in place.
    return {
        name: value.copy() if isinstance(value, (dict, list, set)) else value for name, value in vars(module).items()
    }
