"""The bytes of a tensor as they would lie in a file."""

from __future__ import annotations

import numpy as np
import torch

__all__ = ["raw_bytes"]


def raw_bytes(tensor: torch.Tensor) -> np.ndarray:
    """Values of any dtype, row by row, as a flat array of ``uint8``; shares memory with ``tensor`` where it can."""
    flat = tensor.detach().cpu().contiguous().flatten()
    if flat.numel() < 2:
        flat = flat.clone(memory_format=torch.contiguous_format)  # a single value counts as dense at any stride
    return flat.view(torch.uint8).numpy()
