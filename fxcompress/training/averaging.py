"""Weights beside those that train: an exponential moving average, and the best so far."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from fxcompress.training.checkpoint import copy_into, tensors_of

__all__ = ["Average", "placed", "snapshot"]


class Average:
    """Exponential moving average of all floating-point parameters and buffers (Polyak averaging).

    The decay rises to the one given, ``(1 + n) / (10 + n)`` at step n, so that the start is soon forgotten.

    Args:
        module: what trains.
        decay: in (0, 1).
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.tensors = snapshot(module)

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        """Take in the weights after optimizer step ``step``, counted from 1."""
        decay = min(self.decay, (1 + step) / (10 + step))
        current = floats(module)
        get_ema_multi_avg_fn(decay)(list(self.tensors.values()), [current[name] for name in self.tensors], step)


def floats(module: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers of floating-point numbers."""
    return {name: tensor for name, tensor in tensors_of(module).items() if tensor.is_floating_point()}


def snapshot(module: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of them."""
    return {name: tensor.detach().clone() for name, tensor in floats(module).items()}


@contextmanager
def placed(module: nn.Module, tensors: Mapping[str, torch.Tensor] | None) -> Iterator[None]:
    """Inside, the module has these weights; None leaves its own."""
    if tensors is None:
        yield
        return
    own = snapshot(module)
    copy_into(floats(module), tensors)
    try:
        yield
    finally:
        copy_into(floats(module), own)
