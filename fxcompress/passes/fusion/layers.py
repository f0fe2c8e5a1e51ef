"""Linear layers as maps over channels: how an affine map before or after one goes into its weights.

With groups g, a convolution's weight is (g·o, i, k…) and a transposed convolution's (g·i, o, k…), where i and o count
the input and output channels of one group. After: W' = s·W over output channels and b' = s·b + t. Before:
W' = W·s over input channels and b' = b + Σ W·t over input channels and kernel, which holds for every position of the
output only if the kernel never reads padding; otherwise the shift t must be zero.

Every function returns a new layer and computes in float64; no tensor of the old one is written to.
"""

from __future__ import annotations

import math
from typing import Any, TypeVar

import torch
from torch import nn

from fxcompress.passes.fusion.affine import Affine

__all__ = [
    "CONVS",
    "LINEARS",
    "TRANSPOSED",
    "after",
    "before",
    "before_norm",
    "channel_dim",
    "dtype_fits",
    "input_channels",
    "no_shift_before",
    "output_channels",
    "representable",
    "with_padding",
    "with_tensors",
]

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
LINEARS: tuple[type[nn.Module], ...] = (nn.Linear, *CONVS, *TRANSPOSED)

LayerT = TypeVar("LayerT", bound=nn.Module)


def output_channels(layer: Any) -> int:
    """How many channels the layer (a norm with weights, too) produces."""
    return int(layer.out_channels if type(layer) in TRANSPOSED else layer.weight.shape[0])


def input_channels(layer: Any) -> int:
    """How many channels the layer takes."""
    return int(layer.in_features if type(layer) is nn.Linear else layer.in_channels)


def channel_dim(layer: Any, value: torch.Tensor | None) -> int | None:
    """The dimension of the layer's output (or input) ``value`` that counts channels; None where that is not known."""
    if type(layer) is nn.Linear:
        return None if value is None else value.dim() - 1
    return 1 if value is None else value.dim() - 1 - len(layer.kernel_size)


def dtype_fits(layer: Any, dtype: torch.dtype) -> bool:
    """Whether all floating-point tensors of the layer have ``dtype``."""
    tensors = [*layer.parameters(), *layer.buffers()]
    return all(tensor.dtype == dtype for tensor in tensors if tensor.is_floating_point())


def with_tensors(
    layer: LayerT, weight: torch.Tensor, bias: torch.Tensor | None, *, trainable: bool | None = None
) -> LayerT:
    """A layer like ``layer`` with other weights, rounded to its dtype; a bias where it had none is as trainable."""
    made = _copy(layer)
    old_weight: nn.Parameter = layer._parameters["weight"]  # type: ignore[assignment]
    old_bias = layer._parameters.get("bias")
    for name, tensor, old in (("weight", weight, old_weight), ("bias", bias, old_bias)):
        if tensor is None and old is None:
            continue  # an RMS norm does not even have the name
        learns = (old if old is not None else old_weight).requires_grad if trainable is None else trainable
        made._parameters[name] = None if tensor is None else nn.Parameter(tensor.to(old_weight.dtype), learns)
    return made


def with_padding(layer: LayerT, padding: tuple[int, ...]) -> LayerT:
    """A convolution like ``layer``, with its very weights and another padding."""
    made = _copy(layer)
    made.__dict__["padding"] = padding
    made.__dict__["_reversed_padding_repeated_twice"] = tuple(width for width in reversed(padding) for _ in range(2))
    return made


def after(layer: LayerT, affine: Affine) -> LayerT:
    """The layer followed by ``affine`` over its output channels."""
    weight, bias = _tensors(layer)
    count = output_channels(layer)
    affine = affine.on(count, weight.device)
    if type(layer) in TRANSPOSED:
        groups = int(layer.groups)  # type: ignore[arg-type]
        split = weight.reshape(groups, -1, *weight.shape[1:])
        scaled = split * _lined_up(affine.scale.reshape(groups, 1, -1), split)
    else:
        scaled = weight * _lined_up(affine.scale, weight)
    if bias is None and not affine.shifts():
        return with_tensors(layer, scaled.reshape(weight.shape), None)
    shifted = affine.shift.clone() if bias is None else bias.double() * affine.scale + affine.shift
    return with_tensors(layer, scaled.reshape(weight.shape), shifted)


def before(layer: LayerT, affine: Affine) -> LayerT:
    """The layer preceded by ``affine`` over its input channels; see :func:`no_shift_before` for when it may shift."""
    weight, bias = _tensors(layer)
    affine = affine.on(input_channels(layer), weight.device)
    groups = int(getattr(layer, "groups", 1))
    split = weight.reshape(groups, -1, *weight.shape[1:])  # (groups, out, in, k…); transposed: (groups, in, out, k…)
    transposed = type(layer) in TRANSPOSED
    form = (groups, -1, 1) if transposed else (groups, 1, -1)
    scaled = split * _lined_up(affine.scale.reshape(form), split)
    if not affine.shifts():
        return with_tensors(layer, scaled.reshape(weight.shape), bias)
    pushed = split * _lined_up(affine.shift.reshape(form), split)
    kept = 2 if transposed else 1
    shift = pushed.sum([dim for dim in range(1, split.dim()) if dim != kept]).reshape(-1)
    return with_tensors(layer, scaled.reshape(weight.shape), shift if bias is None else bias.double() + shift)


def before_norm(layer: LayerT, affine: Affine) -> LayerT | None:
    """A batch norm preceded by ``affine``, which goes into the statistics so that it trains as before.

    norm(s·x + t) has μ' = (μ − t)/s, σ'² + ε = (σ² + ε)/s² and γ' = γ·sign(s). None where s is zero or so large that
    σ'² would not be positive.
    """
    norm: Any = layer
    affine = affine.on(norm.running_mean.shape[0], norm.running_mean.device)
    variance = (norm.running_var.detach().double() + norm.eps) / affine.scale.square() - norm.eps
    mean = (norm.running_mean.detach().double() - affine.shift) / affine.scale
    if not bool(((variance > 0) & variance.isfinite() & mean.isfinite()).all()):
        return None
    weight, bias = _tensors(norm)
    made = with_tensors(layer, weight * affine.scale.sign(), bias)
    made._buffers["running_mean"] = mean.to(norm.running_mean.dtype)
    made._buffers["running_var"] = variance.to(norm.running_var.dtype)
    return made


def no_shift_before(layer: Any) -> str | None:
    """Why no shift may go into the layer from before, or None where it may."""
    if type(layer) is nn.Linear:
        return None
    padded = layer.padding != "valid" and any(width != 0 for width in layer.padding)
    if type(layer) in TRANSPOSED:
        if padded or any(size != 1 for size in (*layer.kernel_size, *layer.stride)) or any(layer.output_padding):
            return "outputs of the transposed convolution sum a varying number of inputs"
        return None
    return "the convolution pads with zeros, which the shift does not reach" if padded else None


def representable(layer: Any, affine: Affine, *, ahead: bool = False) -> bool:
    """Whether the weights are finite and stay so, in their dtype, when ``affine`` goes in (a safe bound).

    ``ahead`` tells that the map comes before the layer, so that its shift is summed over the weights.
    """
    limit = torch.finfo(layer.weight.dtype).max
    scale, shift, weight = _peak(affine.scale), _peak(affine.shift), _peak(layer.weight)
    bias = _peak(layer.bias) if getattr(layer, "bias", None) is not None else 0.0
    if ahead:
        bounds = (weight * scale, bias + shift * weight * layer.weight.numel() / output_channels(layer))
    else:
        bounds = (weight * scale, bias * scale + shift)
    return all(math.isfinite(bound) and bound <= limit for bound in bounds)


def _peak(tensor: torch.Tensor) -> float:
    """The largest magnitude; NaN where there is one."""
    if tensor.numel() == 0:
        return 0.0
    low, high = torch.aminmax(tensor.detach())
    return float(torch.maximum(low.abs(), high.abs()))


def _copy(layer: LayerT) -> LayerT:
    """A layer of its own that holds the same tensors."""
    made = type(layer).__new__(type(layer))
    made.__dict__.update(layer.__dict__)
    for kind in ("_parameters", "_buffers", "_modules"):
        made.__dict__[kind] = dict(layer.__dict__[kind])
    return made


def _tensors(layer: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    bias = getattr(layer, "bias", None)
    return layer.weight.detach().double(), None if bias is None else bias.detach()


def _lined_up(values: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """``values`` with trailing dimensions of one, to broadcast along the leading ones of ``tensor``."""
    return values.reshape(*values.shape, *(1,) * (tensor.dim() - values.dim()))
