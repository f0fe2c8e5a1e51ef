"""Layers whose weight is quantized: the layer of torch.nn with a stub on its weight.

They are subclasses, so that every pass that knows a ``Linear`` knows these, and share the weight of the layer they
are made from. In ONNX the weight is stored as integers with one ``DequantizeLinear`` behind it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fxcompress.graph.lower_layers import LOWERINGS, Emitter
from fxcompress.graph.serialize_layers import register_layer
from fxcompress.quantization.fake_quant import Quantizer, emit_fake_quant, quantizer_config, quantizer_from
from fxcompress.quantization.types import QuantType

__all__ = ["QUANTIZED", "quantized_layer"]

aten = torch.ops.aten


class _Quantized:
    """What the quantized layers have beside their own.

    Attributes:
        weight_quantizer: of the weight.
        bias_before: the bias before it was moved to make up for rounding, which serves without rounding; else None.
    """

    weight_quantizer: Quantizer
    weight: Any
    bias: Any
    bias_before: torch.Tensor | None

    @property
    def bias_now(self) -> Any:
        """The bias that belongs to the weight as it is now, rounded or not; None or ``[channels]``."""
        return self.bias if self.bias_before is None or self.weight_quantizer.enabled else self.bias_before

    def move_bias(self, shift: torch.Tensor) -> None:
        """Add ``shift`` to the bias that goes with the rounded weight; no tensor that was there is written to."""
        before = torch.zeros_like(shift) if self.bias is None else self.bias.detach()
        trains = (self.weight if self.bias is None else self.bias).requires_grad
        if self.bias_before is None:
            self.bias_before = before.to(self.weight.dtype)
        self.bias = nn.Parameter((before.double() + shift.double()).to(self.weight.dtype), trains)

    def restore_bias(self) -> None:
        """Take back all that :meth:`move_bias` did."""
        if self.bias_before is not None:
            self.bias = nn.Parameter(self.bias_before, self.bias.requires_grad)
            self.bias_before = None

    @property
    def stored_as(self) -> dict[str, torch.dtype]:
        """What engines hold the weight as, once it is calibrated."""
        return {"weight": torch.int8} if self.weight_quantizer.enabled else {}


class QuantizedLinear(_Quantized, nn.Linear):
    """A linear layer with a quantized weight; shapes as :class:`torch.nn.Linear`."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(input, self.weight_quantizer(self.weight), self.bias_now)


class _QuantizedConv(_Quantized):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        conv: Any = self
        result: torch.Tensor = conv._conv_forward(input, conv.weight_quantizer(conv.weight), conv.bias_now)
        return result


class QuantizedConv1d(_QuantizedConv, nn.Conv1d):
    """A convolution with a quantized weight; shapes as :class:`torch.nn.Conv1d`."""


class QuantizedConv2d(_QuantizedConv, nn.Conv2d):
    """A convolution with a quantized weight; shapes as :class:`torch.nn.Conv2d`."""


class QuantizedConv3d(_QuantizedConv, nn.Conv3d):
    """A convolution with a quantized weight; shapes as :class:`torch.nn.Conv3d`."""


QUANTIZED: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: QuantizedLinear,
    nn.Conv1d: QuantizedConv1d,
    nn.Conv2d: QuantizedConv2d,
    nn.Conv3d: QuantizedConv3d,
}
"""The quantized form of each layer that has one."""


def quantized_layer(layer: nn.Module, kind: QuantType, *, per_channel: bool) -> Any:
    """The quantized form of a layer. It shares the layer's tensors; its weight stub is not calibrated.

    Raises:
        KeyError: there is none; see :data:`QUANTIZED`.
    """
    cls = QUANTIZED[type(layer)]
    made = cls.__new__(cls)
    for name, value in layer.__dict__.items():
        made.__dict__[name] = value.copy() if isinstance(value, (dict, list, set)) else value
    axis = 0 if per_channel else None  # output channels
    weight: Any = layer.weight
    made.register_buffer("bias_before", None)
    made.add_module("weight_quantizer", Quantizer(kind, axis, weight.shape[axis] if axis is not None else None))
    return made


# --- lowering ---------------------------------------------------------------------------------------------------


class _WithQuantizedWeight:
    """An emitter for which ``weight`` is the quantized weight."""

    def __init__(self, emit: Emitter, layer: _Quantized) -> None:
        self._emit, self._layer = emit, layer
        self.call = emit.call

    def tensor(self, name: str) -> Any:
        found = self._emit.tensor(name)
        if name != "weight":
            return found
        quantizer = self._layer.weight_quantizer
        return emit_fake_quant(self._emit, quantizer, "weight_quantizer.", found, quantizer.axis)


def _linear(emit: Emitter, layer: QuantizedLinear, inputs: tuple[Any, ...]) -> Any:
    (x,) = inputs
    if x.meta["val"].dim() == 2:
        return LOWERINGS[nn.Linear](_WithQuantizedWeight(emit, layer), layer, inputs)
    # Engines have an integer kernel for a matrix product with a bias, but only for two dimensions.
    sizes = list(x.meta["val"].shape)
    flat = emit.call(aten.reshape.default, (x, [-1, sizes[-1]]))
    weight = _WithQuantizedWeight(emit, layer).tensor("weight")
    product = emit.call(aten.linear.default, (flat, weight, emit.tensor("bias")))
    lead = [
        emit.call(aten.sym_size.int, (x, dim)) if isinstance(size, torch.SymInt) else size
        for dim, size in enumerate(sizes[:-1])
    ]
    return emit.call(aten.reshape.default, (product, [*lead, layer.out_features]), result=True)


def _convolution(plain: type[nn.Module]) -> Callable[[Emitter, Any, tuple[Any, ...]], Any]:
    def lower(emit: Emitter, layer: Any, inputs: tuple[Any, ...]) -> Any:
        return LOWERINGS[plain](_WithQuantizedWeight(emit, layer), layer, inputs)

    return lower


LOWERINGS[QuantizedLinear] = _linear
for _plain in (nn.Conv1d, nn.Conv2d, nn.Conv3d):
    LOWERINGS[QUANTIZED[_plain]] = _convolution(_plain)


# --- saving -----------------------------------------------------------------------------------------------------

_LINEAR = ("in_features", "out_features")
_CONV = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")


def _register(plain: type[nn.Module], names: tuple[str, ...]) -> None:
    def config(layer: Any) -> dict[str, Any]:
        told = {name: getattr(layer, name) for name in names} | {"bias": layer.bias is not None}
        told["moved_bias"] = layer.bias_before is not None
        return told | {"quantizer": quantizer_config(layer.weight_quantizer)}

    def build(told: dict[str, Any]) -> nn.Module:
        quantizer, moved = quantizer_from(told.pop("quantizer")), told.pop("moved_bias", False)
        made = quantized_layer(plain(**told, device="meta"), quantizer.kind, per_channel=quantizer.axis is not None)
        made.weight_quantizer = quantizer
        if moved:
            made.bias_before = torch.empty_like(made.bias)
        result: nn.Module = made
        return result

    register_layer(QUANTIZED[plain], config, build)


_register(nn.Linear, _LINEAR)
for _plain in (nn.Conv1d, nn.Conv2d, nn.Conv3d):
    _register(_plain, _CONV)
