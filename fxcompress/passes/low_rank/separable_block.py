"""The layers of a depthwise-separable block: depthwise kernels, and the norm and activation between."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fxcompress.analysis.statistics import Moments
from fxcompress.passes.low_rank.sites import TRANSPOSED
from fxcompress.passes.low_rank.splice import conv_like

__all__ = ["ACTIVATIONS", "block_norm", "depthwise"]

aten = torch.ops.aten

ACTIVATIONS: dict[str, tuple[Any, tuple[float, ...]]] = {
    "relu": (aten.relu.default, ()),
    "relu6": (aten.hardtanh.default, (0.0, 6.0)),
    "silu": (aten.silu.default, ()),
    "hardswish": (aten.hardswish.default, ()),
}
"""Operation of each activation, and its arguments after the input."""

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def depthwise(layer: Any, kernels: torch.Tensor) -> Any:
    """A depthwise convolution that moves as ``layer`` does.

    Args:
        layer: the convolution that is replaced.
        kernels: ``[groups, in, terms, kernel elements]`` as the output gathers them.
    """
    groups, inputs, terms, _ = kernels.shape
    weight = kernels.reshape(groups * inputs, terms, *layer.kernel_size)
    transposed = type(layer) in TRANSPOSED
    geometry = {
        "stride": layer.stride,
        "padding": layer.padding,
        "dilation": layer.dilation,
        "padding_mode": layer.padding_mode,
    }
    if transposed:
        weight = weight.flip(tuple(range(2, weight.dim())))
        geometry["output_padding"] = layer.output_padding
    else:
        weight = weight.flatten(0, 1).unsqueeze(1)
    return conv_like(layer, weight, groups=groups * inputs, transposed=transposed, **geometry)


def block_norm(layer: Any, kernels: torch.Tensor, moments: Moments | None, *, trains: bool) -> nn.Module:
    """A batch norm of what the depthwise kernels produce, with its statistics where there is data.

    Args:
        layer: the convolution that is replaced.
        kernels: ``[groups, in, terms, kernel elements]``.
        moments: of the patches that the layer reads.
        trains: scale 1 and shift 0, as before an activation; else those that make the norm the identity.
    """
    groups, inputs, terms, size = kernels.shape
    count = groups * inputs * terms
    norm: Any = _NORMS[len(layer.kernel_size) - 1](count, device=layer.weight.device, dtype=layer.weight.dtype)
    mean = torch.zeros(count, dtype=torch.float64, device=layer.weight.device)
    variance = torch.ones_like(mean)
    if moments is not None:
        wide = kernels.double()
        means = moments.mean.reshape(groups, inputs, size)
        blocks = moments.second.reshape(groups, inputs, size, inputs, size).diagonal(dim1=1, dim2=3)  # [g, k, l, in]
        mean = torch.einsum("gitk,gik->git", wide, means).flatten()
        square = torch.einsum("gitk,gkli,gitl->git", wide, blocks, wide).flatten()
        variance = (square - mean.square()).clamp_min(1e-12)
    with torch.no_grad():
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(variance)
        if not trains:
            norm.weight.copy_((norm.running_var.double() + norm.eps).sqrt())
            norm.bias.copy_(norm.running_mean)
    return norm.requires_grad_(layer.weight.requires_grad)
