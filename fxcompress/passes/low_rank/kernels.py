"""Convolution kernels in one form, and layers of kernels in that form.

The form is ``[groups, out, in, kernel…]`` as the output gathers it: ``output = kernel.flatten(2) @ patch``. A
transposed convolution's kernel is flipped and transposed into it, and back. Patches are those of
:mod:`fxcompress.analysis.statistics.patches`.
"""

from __future__ import annotations

from typing import Any

import torch

from fxcompress.passes.low_rank.sites import TRANSPOSED
from fxcompress.passes.low_rank.splice import conv_like

__all__ = ["kernel_of", "pointwise", "refuse_conv", "stage"]


def refuse_conv(layer: Any) -> tuple[str, str] | None:
    """Code and sentence for a convolution that is no site, or None."""
    if all(size == 1 for size in layer.kernel_size):
        return "pointwise", "Its kernel is 1×1: factorize_linear takes it."
    inputs, outputs = layer.in_channels // layer.groups, layer.out_channels // layer.groups
    if inputs == 1 or outputs == 1:
        what = "It is depthwise" if layer.groups > 1 else "It has one input or one output channel"
        return "depthwise", f"{what}: there are no channels to mix."
    return None


def kernel_of(layer: Any) -> torch.Tensor:
    """The kernel as ``[groups, out, in, kernel…]``, in the weight's dtype."""
    weight: torch.Tensor = layer.weight.detach()
    split = weight.unflatten(0, (layer.groups, -1))
    if type(layer) in TRANSPOSED:
        return split.transpose(1, 2).flip(tuple(range(3, split.dim())))
    return split


def stage(layer: Any, kernel: torch.Tensor, *, bias: torch.Tensor | None = None, axes: tuple[int, ...] = ()) -> Any:
    """A convolution of ``kernel`` that moves over the input as ``layer`` does along ``axes``.

    Args:
        layer: the convolution that is replaced.
        kernel: ``[groups, out, in, kernel…]``; its size is 1 along all other axes.
        bias: or None.
        axes: where stride, padding and dilation are those of ``layer``; elsewhere none.
    """
    every = range(len(layer.kernel_size))
    transposed = type(layer) in TRANSPOSED

    def along(values: Any, neutral: int) -> Any:
        if isinstance(values, str):
            return values  # "same" and "valid" mean nothing where the kernel is 1
        return tuple(values[axis] if axis in axes else neutral for axis in every)

    geometry = {
        "stride": along(layer.stride, 1),
        "padding": along(layer.padding, 0),
        "dilation": along(layer.dilation, 1),
        "padding_mode": layer.padding_mode,
    }
    if transposed:
        geometry["output_padding"] = along(layer.output_padding, 0)
        kernel = kernel.flip(tuple(range(3, kernel.dim()))).transpose(1, 2)
    return conv_like(layer, kernel.flatten(0, 1), bias, groups=kernel.shape[0], transposed=transposed, **geometry)


def pointwise(layer: Any, matrix: torch.Tensor, bias: torch.Tensor | None = None) -> Any:
    """A 1×1 convolution of ``[groups, out, in]``."""
    ones = (1,) * len(layer.kernel_size)
    return conv_like(layer, matrix.flatten(0, 1).reshape(-1, matrix.shape[2], *ones), bias, groups=matrix.shape[0])
