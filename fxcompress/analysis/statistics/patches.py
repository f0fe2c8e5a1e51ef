"""What a layer multiplies by its weights, as rows: features of a linear layer, patches under a convolution's kernel.

A transposed convolution is a convolution with stride 1 of the flipped kernel over its input with zeros between, so one
form serves all: ``output[position] = kernel.flatten(1) @ patch[position]``.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from fxcompress.errors import PreconditionError

__all__ = ["geometry", "is_conv", "patches"]


def is_conv(layer: nn.Module | None) -> bool:
    """Whether the layer is a convolution, plain or transposed."""
    return isinstance(layer, nn.modules.conv._ConvNd)


def geometry(layer: nn.Module | None) -> Hashable:
    """What decides which rows the layer reads of a given input: equal for layers that read the same."""
    if not is_conv(layer):
        return None
    conv: Any = layer
    parts = (conv.transposed, conv.kernel_size, conv.stride, conv.padding, conv.padding_mode, conv.dilation)
    return (*parts, conv.groups, conv.output_padding)


def patches(layer: nn.Module | None, tensor: torch.Tensor, limit: int | None, chunk: int) -> Iterator[torch.Tensor]:
    """The rows that ``layer`` reads of its input ``tensor``: pieces of ``[groups, rows, d]``.

    Args:
        layer: a convolution, or anything else, which reads the last dimension.
        tensor: the input.
        limit: most rows, evenly spaced; None gives all.
        chunk: most elements of one piece (at least one sample).
    """
    if tensor.is_complex() or tensor.dim() == 0:
        raise PreconditionError(f"a {tensor.dtype} with {tensor.dim()} dimensions has no rows of real numbers")
    if not is_conv(layer):
        rows = tensor.reshape(-1, tensor.shape[-1])
        rows = rows if limit is None or len(rows) <= limit else rows[_spread(len(rows), limit, rows.device)]
        for piece in rows.split(max(1, chunk // max(1, rows.shape[1]))):
            yield piece[None]
        return
    conv: Any = layer
    rank = len(conv.kernel_size)
    samples = tensor if tensor.dim() == rank + 2 else tensor[None]
    windows = _windows(conv, samples)  # [N, C, positions…, kernel…], a view
    positions = math.prod(windows.shape[2 : 2 + rank])
    width = windows.shape[1] * math.prod(conv.kernel_size)
    total = len(samples) * positions
    wanted = None if limit is None or total <= limit else _spread(total, limit, tensor.device)
    step = max(1, chunk // max(1, positions * width))
    order = (0, *range(2, 2 + rank), 1, *range(2 + rank, 2 + 2 * rank))
    for start in range(0, len(samples), step):
        piece = windows[start : start + step].permute(order)  # [n, positions…, C, kernel…]
        if wanted is not None:
            chosen = wanted[(wanted >= start * positions) & (wanted < (start + len(piece)) * positions)]
            chosen = chosen - start * positions
            index = torch.unravel_index(chosen, piece.shape[: rank + 1])
            piece = piece[tuple(index)]
        rows = piece.reshape(-1, conv.groups, width // conv.groups)
        if len(rows):
            yield rows.transpose(0, 1)


def _spread(total: int, limit: int, device: torch.device) -> torch.Tensor:
    return torch.arange(limit, device=device) * total // limit


def _windows(conv: Any, samples: torch.Tensor) -> torch.Tensor:
    stride = conv.stride
    reach = [step * (size - 1) for step, size in zip(conv.dilation, conv.kernel_size, strict=True)]
    if conv.transposed:
        samples = _between(samples, stride)
        ends = [
            (span - pad, span - pad + more)
            for span, pad, more in zip(reach, conv.padding, conv.output_padding, strict=True)
        ]
        samples = functional.pad(samples, [width for pair in reversed(ends) for width in pair])
        stride = (1,) * len(reach)
    else:
        if conv.padding == "same":
            ends = [(span // 2, span - span // 2) for span in reach]
        else:
            pads = (0,) * len(reach) if conv.padding == "valid" else conv.padding
            ends = [(pad, pad) for pad in pads]
        mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
        if any(width for pair in ends for width in pair):
            samples = functional.pad(samples, [width for pair in reversed(ends) for width in pair], mode=mode)
    for dim, (span, step) in enumerate(zip(reach, stride, strict=True)):
        samples = samples.unfold(2 + dim, span + 1, step)
    picked: tuple[Any, ...] = (..., *(slice(None, None, step) for step in conv.dilation))
    return samples[picked]


def _between(samples: torch.Tensor, stride: tuple[int, ...]) -> torch.Tensor:
    """The samples with ``stride − 1`` zeros between neighbours."""
    if all(step == 1 for step in stride):
        return samples
    sizes = [(size - 1) * step + 1 for size, step in zip(samples.shape[2:], stride, strict=True)]
    spaced = samples.new_zeros(*samples.shape[:2], *sizes)
    places: tuple[Any, ...] = (..., *(slice(None, None, step) for step in stride))
    spaced[places] = samples
    return spaced
