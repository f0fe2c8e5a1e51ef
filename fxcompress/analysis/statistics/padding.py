"""Which positions of a batch of sequences are padding, and activations without them.

What a model computes at a padded position is read by nothing that counts, so it should not weigh in a statistic of what
layers read. Known are the names by which PyTorch and transformers call such masks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

__all__ = ["real_positions", "without_padding"]


def real_positions(graph_module: fx.GraphModule, leaves: Sequence[Any]) -> torch.Tensor | None:
    """``[batch, length]``, True where a position is no padding; None where no input says so, or none is padding.

    An input ``attention_mask`` holds 0 at padding, one whose name ends in ``key_padding_mask`` True.

    Args:
        graph_module: a captured graph.
        leaves: its flat inputs.
    """
    inputs = (node for node in graph_module.graph.nodes if node.op == "placeholder")
    for node, leaf in zip(inputs, leaves, strict=False):
        if not isinstance(leaf, torch.Tensor) or leaf.dim() != 2:
            continue
        if node.name.endswith("key_padding_mask") and leaf.dtype == torch.bool:
            real = ~leaf
        elif node.name == "attention_mask" and (
            not leaf.is_floating_point() or bool(((leaf == 0) | (leaf == 1)).all())
        ):
            real = leaf != 0
        else:
            continue
        return None if bool(real.all()) else real
    return None


def without_padding(tensor: torch.Tensor, real: torch.Tensor | None) -> torch.Tensor:
    """``[positions, features]`` of ``[batch, length, features]`` or ``[batch · length, features]``; else the tensor."""
    if real is None:
        return tensor
    if tensor.dim() == 3 and tensor.shape[:2] == real.shape:
        return tensor[real]
    if tensor.dim() == 2 and len(tensor) == real.numel():
        return tensor[real.flatten()]
    return tensor
