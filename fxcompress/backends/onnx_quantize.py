"""Fake quantization as ``QuantizeLinear`` and ``DequantizeLinear``.

Of a weight the first of the two is computed beforehand, so that integers are stored
(:mod:`fxcompress.backends.onnx_weights`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

__all__ = ["quantize_translation"]

aten = torch.ops.aten

# Numbers of onnx.TensorProto.DataType, and what they hold.
_UINT8, _INT8 = 2, 3
_RANGES = {_UINT8: (0, 255), _INT8: (-128, 127)}


def quantize_translation(op: Any) -> dict[Callable[..., Any], Callable[..., Any]]:
    """Entries of the translation table; ``op`` as for :mod:`fxcompress.backends.onnx_translate`."""

    def per_tensor(self: Any, scale: float, zero_point: int, quant_min: int, quant_max: int) -> Any:
        kind = _INT8 if quant_min < 0 else _UINT8
        x = self
        if (quant_min, quant_max) != _RANGES[kind]:  # the operator saturates at the whole range of its type only
            low, high = ((edge - zero_point) * scale for edge in (quant_min, quant_max))
            x = op.Clip(x, op.Constant(value_float=low), op.Constant(value_float=high))
        grid = op.Constant(value_float=scale), op.Cast(op.Constant(value_int=zero_point), to=kind)
        return op.DequantizeLinear(op.QuantizeLinear(x, *grid), *grid)

    def per_channel(self: Any, scale: Any, zero_point: Any, axis: int, quant_min: int, quant_max: int) -> Any:
        kind = _INT8 if quant_min < 0 else _UINT8
        grid = scale, op.Cast(zero_point, to=kind)
        return op.DequantizeLinear(op.QuantizeLinear(self, *grid, axis=axis), *grid, axis=axis)

    return {
        aten.fake_quantize_per_tensor_affine.default: per_tensor,
        aten.fake_quantize_per_channel_affine.default: per_channel,
    }
