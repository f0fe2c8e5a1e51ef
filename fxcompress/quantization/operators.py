"""Operators of our own that engines have kernels for, defined by what they are in ATen.

Where nobody knows them (TorchScript, torch.export) they fall apart into that; the ONNX exporter writes them as the
engine's operator.
"""

from __future__ import annotations

import torch

from fxcompress.analysis.macs import count_like_matmul

__all__ = ["dynamic_matmul", "pack", "unpack"]

_LIBRARY = torch.library.Library("fxcompress", "FRAGMENT")
_LIBRARY.define("dynamic_linear(Tensor x, Tensor weight, Tensor scale, Tensor? bias) -> Tensor")
_LIBRARY.define("dynamic_matmul(Tensor x, Tensor y) -> Tensor")
_LIBRARY.define(
    "block_linear(Tensor x, Tensor packed, Tensor scale, Tensor zero_point, Tensor? bias, int bits, int features) "
    "-> Tensor"
)


def _dynamic_linear(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """Linear on an int8 weight ``[out, in]`` and ``x`` rounded to uint8 over its own range (one for the tensor)."""
    return torch.nn.functional.linear(_rounded(x), weight.to(x.dtype) * scale[:, None].to(x.dtype), bias)


def _dynamic_matmul(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Product of two tensors, each rounded to uint8 over its own range."""
    return torch.matmul(_rounded(x), _rounded(y))


def _rounded(x: torch.Tensor) -> torch.Tensor:
    low, high = x.amin().clamp(max=0), x.amax().clamp(min=0)
    step = (high - low) / 255
    step = torch.where(step > 0, step, torch.ones_like(step))
    zero = (-low / step).round().clamp(0, 255)
    return (((x / step).round() + zero).clamp(0, 255) - zero) * step


def _block_linear(
    x: torch.Tensor,
    packed: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    bias: torch.Tensor | None,
    bits: int,
    features: int,
) -> torch.Tensor:
    """Linear on a weight of integers with a scale and a zero point per block of inputs."""
    integers, zero = unpack(packed, bits), unpack(zero_point, bits)[:, : scale.shape[1]]
    weight = (integers - zero[..., None]).to(scale.dtype) * scale[..., None]
    return torch.nn.functional.linear(x, weight.flatten(1)[:, :features].to(x.dtype), bias)


_LIBRARY.impl("dynamic_linear", _dynamic_linear, "CompositeImplicitAutograd")
_LIBRARY.impl("dynamic_matmul", _dynamic_matmul, "CompositeImplicitAutograd")
_LIBRARY.impl("block_linear", _block_linear, "CompositeImplicitAutograd")

dynamic_matmul = torch.ops.fxcompress.dynamic_matmul.default
count_like_matmul(dynamic_matmul, "x", "y")


def pack(integers: torch.Tensor, bits: int) -> torch.Tensor:
    """``[..., n]`` unsigned integers as uint8; of 4 bits two to a byte, the first in the low half, padded with 0."""
    if bits == 8:
        return integers.to(torch.uint8)
    if integers.shape[-1] % 2:
        integers = torch.nn.functional.pad(integers, (0, 1))
    pairs = integers.to(torch.uint8).unflatten(-1, (-1, 2))
    return pairs[..., 0] | (pairs[..., 1] << 4)


def unpack(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """What :func:`pack` packed, int32; of 4 bits as many as the bytes hold."""
    if bits == 8:
        return packed.to(torch.int32)
    wide = packed.to(torch.int32)
    return torch.stack([wide & 15, wide >> 4], -1).flatten(-2)
