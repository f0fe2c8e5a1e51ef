"""The stub that stands for quantize and dequantize: it rounds to an integer grid and stays in floating point.

In eval mode it computes what the two ONNX operators do. In training it lets gradients through (straight-through
estimator, Bengio et al. 2013), to the scale as well where that is learned (LSQ, Esser et al. 2020). What trains is not
the scale but a factor of it that starts at 1, so that a step of the optimizer is a share of the scale, however small
that is, as in the logarithmic domain of TQT (Jain et al. 2020): scales of the channels of one layer differ by orders of
magnitude once norms are folded into it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fxcompress.errors import PreconditionError
from fxcompress.graph.lower_layers import LOWERINGS, Emitter
from fxcompress.graph.serialize_layers import register_layer
from fxcompress.quantization.types import QuantType

__all__ = ["Quantizer", "emit_fake_quant", "quantizer_config", "quantizer_from"]

aten = torch.ops.aten


_META = torch.library.Library("aten", "IMPL", "Meta")  # torch has no shape rule for what it fake-quantizes with


def _same_shape(x: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(x), torch.empty_like(x, dtype=torch.bool)


for _name in ("fake_quantize_per_tensor_affine_cachemask", "fake_quantize_per_channel_affine_cachemask"):
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{_name}", "Meta"):
        _META.impl(_name, _same_shape)


class Quantizer(nn.Module):
    """Quantize and dequantize. Until it is calibrated it passes values on as they are.

    Args:
        kind: the grid.
        axis: dimension along which scales differ; None for one scale.
        channels: size of that dimension.

    Attributes:
        scale: float32, a scalar or ``[channels]``.
        zero_point: int32, of the same shape.
        gain: what the scale is multiplied by, of its shape, a parameter; None unless the scale is learned.
        enabled: whether it rounds; calibration switches it on.
    """

    scale: torch.Tensor
    zero_point: torch.Tensor
    gain: nn.Parameter | None

    def __init__(self, kind: QuantType, axis: int | None = None, channels: int | None = None) -> None:
        super().__init__()
        self.kind, self.axis, self.enabled = kind, axis, False
        shape = () if axis is None else (int(channels or 1),)
        self.register_buffer("scale", torch.ones(shape))
        self.register_buffer("zero_point", torch.zeros(shape, dtype=torch.int32))
        self.register_parameter("gain", None)

    def set(self, scale: torch.Tensor, zero_point: torch.Tensor) -> None:
        """Switch it on with these; shapes as in the attributes.

        Raises:
            PreconditionError: a scale is not finite and above 0.
        """
        if not bool((torch.isfinite(scale) & (scale > 0)).all()):
            raise PreconditionError(f"a scale of {scale.min().item()} is no scale", remedy="check the calibration data")
        self.scale = scale.to(torch.float32).reshape(self.scale.shape)
        self.zero_point = zero_point.to(torch.int32).reshape(self.zero_point.shape)
        self.enabled = True

    def learn(self) -> None:
        """Let training adjust the scale: by its gain, which :meth:`absorb` takes in."""
        if self.gain is None:
            self.gain = nn.Parameter(torch.ones_like(self.scale))

    @torch.no_grad()
    def absorb(self) -> None:
        """Take the gain into the scale, within a factor of two, and start from 1 again."""
        if self.gain is not None:
            self.scale.mul_(self.gain.clamp(0.5, 2.0))
            self.gain.fill_(1.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x`` on the grid; any shape, floating point."""
        if not self.enabled:
            return x
        low, high = self.kind.minimum, self.kind.maximum
        trains = torch.is_grad_enabled() and (x.requires_grad or self.gain is not None)
        if trains or type(x) not in (torch.Tensor, nn.Parameter):  # fake tensors have no kernel with a tensor as scale
            return self._differentiable(x)
        if self.axis is None:
            return torch.fake_quantize_per_tensor_affine(x, self.scale, self.zero_point, low, high)
        return torch.fake_quantize_per_channel_affine(x, self.scale, self.zero_point, self.axis, low, high)

    def integers(self, x: torch.Tensor) -> torch.Tensor:
        """The integers that stand for ``x``, int32."""
        scale, zero = self.grid(x)
        return (x / scale + zero).round().clamp(self.kind.minimum, self.kind.maximum).to(torch.int32)

    def grid(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and zero point, of a shape that goes with ``x`` element by element."""
        if self.axis is None:
            return self.scale, self.zero_point
        shape = [1] * x.dim()
        shape[self.axis] = -1
        return self.scale.reshape(shape), self.zero_point.reshape(shape)

    def _differentiable(self, x: torch.Tensor) -> torch.Tensor:
        scale, zero = self.grid(x)
        if self.gain is not None:
            scale = scale * self.gain.reshape(scale.shape)
        place = x.float() / scale + zero  # half precision cannot tell 256 values apart
        clipped = place.clamp(self.kind.minimum, self.kind.maximum)
        rounded = clipped + (clipped.round() - clipped).detach()
        return ((rounded - zero) * scale).to(x.dtype)

    def extra_repr(self) -> str:
        kind = f"{'' if self.kind.signed else 'u'}int{self.kind.bits}"
        where = "" if self.axis is None else f", axis={self.axis}"
        state = "" if self.enabled else ", not calibrated"
        return f"{kind}{'' if self.kind.symmetric else ', affine'}{where}{state}"


def emit_fake_quant(
    emit: Emitter, quantizer: Quantizer, path: str, x: Any, axis: int | None, *, result: bool = False
) -> Any:
    """Write a quantizer's operation on ``x``.

    Args:
        emit: to write with.
        quantizer: of the layer that is being lowered.
        path: of the quantizer in that layer, with a dot at its end, or empty.
        x: node of the new graph.
        axis: where the quantizer's channels are in ``x``; None if it has none.
        result: it gives what the layer gives.

    Raises:
        PreconditionError: it was not calibrated.
    """
    if not quantizer.enabled:
        raise PreconditionError(
            "a quantization stub was not calibrated", remedy="run the pass Calibrate(data), or Quantize(data)"
        )
    low, high = quantizer.kind.minimum, quantizer.kind.maximum
    if axis is None:
        args: tuple[Any, ...] = (x, float(quantizer.scale), int(quantizer.zero_point), low, high)
        return emit.call(aten.fake_quantize_per_tensor_affine.default, args, result=result)
    grid = emit.tensor(f"{path}scale"), emit.tensor(f"{path}zero_point"), axis
    return emit.call(aten.fake_quantize_per_channel_affine.default, (x, *grid, low, high), result=result)


def _lower(emit: Emitter, quantizer: Quantizer, inputs: tuple[Any, ...]) -> Any:
    return emit_fake_quant(emit, quantizer, "", inputs[0], quantizer.axis, result=True)


LOWERINGS[Quantizer] = _lower


def quantizer_config(quantizer: Quantizer) -> dict[str, Any]:
    """What :func:`quantizer_from` needs to make an equal one."""
    kind = quantizer.kind
    return {
        "bits": kind.bits,
        "signed": kind.signed,
        "symmetric": kind.symmetric,
        "narrow": kind.narrow,
        "axis": quantizer.axis,
        "channels": quantizer.scale.numel(),
        "enabled": quantizer.enabled,
        "learned": quantizer.gain is not None,
    }


def quantizer_from(config: dict[str, Any]) -> Quantizer:
    """A quantizer of that configuration, its scale not yet filled in."""
    kind = QuantType(config["bits"], config["signed"], config["symmetric"], config["narrow"])
    made = Quantizer(kind, config["axis"], config["channels"])
    made.enabled = config["enabled"] is True
    if config["learned"]:
        made.learn()
    return made


register_layer(Quantizer, quantizer_config, quantizer_from)
