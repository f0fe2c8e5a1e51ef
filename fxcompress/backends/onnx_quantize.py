"""Fake quantization as ``QuantizeLinear`` and ``DequantizeLinear``.

Of a weight the first of the two is computed beforehand, so that integers are stored
(:mod:`fxcompress.backends.onnx_weights`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx
import torch

import fxcompress.quantization.operators  # noqa: F401  defines the operators that are translated here

__all__ = ["quantize_translation"]

aten = torch.ops.aten

# Numbers of onnx.TensorProto.DataType, and what they hold.
_FLOAT, _UINT8, _INT8 = 1, 2, 3
_RANGES = {_UINT8: (0, 255), _INT8: (-128, 127)}


def _mat_mul_n_bits() -> onnx.defs.OpSchema:
    """ONNX Runtime's operator for a product with a weight of 4 or 8 bits, as its documentation has it."""
    schema = onnx.defs.OpSchema
    optional = schema.FormalParameterOption.Optional
    inputs = [
        schema.FormalParameter("A", "T1"),
        schema.FormalParameter("B", "T2"),
        schema.FormalParameter("scales", "T1"),
        schema.FormalParameter("zero_points", "T3", param_option=optional),
        schema.FormalParameter("g_idx", "T4", param_option=optional),
        schema.FormalParameter("bias", "T1", param_option=optional),
    ]
    kinds = {"T1": ["tensor(float)"], "T2": ["tensor(uint8)"], "T3": ["tensor(uint8)"], "T4": ["tensor(int32)"]}
    return schema(
        "MatMulNBits",
        "com.microsoft",
        1,
        inputs=inputs,
        outputs=[schema.FormalParameter("Y", "T1")],
        type_constraints=[(name, types, "") for name, types in kinds.items()],
        attributes=[schema.Attribute(name, schema.AttrType.INT) for name in ("K", "N", "bits", "block_size")],
    )


def quantize_translation(
    op: Any, contributed: Callable[[onnx.defs.OpSchema], Callable[..., Any]]
) -> dict[Callable[..., Any], Callable[..., Any]]:
    """Entries of the translation table.

    Args:
        op: as for :mod:`fxcompress.backends.onnx_translate`.
        contributed: makes a function to write an operator that is not ONNX's own.
    """

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

    def dynamic_linear(x: Any, weight: Any, scale: Any, bias: Any = None) -> Any:
        integers, step, zero = op.DynamicQuantizeLinear(x)
        product = op.MatMulInteger(integers, op.Transpose(weight, perm=[1, 0]), zero)
        result = op.Mul(op.Cast(product, to=_FLOAT), op.Mul(step, scale))
        return result if bias is None else op.Add(result, bias)

    def block_linear(x: Any, packed: Any, scale: Any, zero_point: Any, bias: Any, bits: int, features: int) -> Any:
        # An operator of ONNX Runtime: ONNX itself can only say what it is, which engines would have to find out.
        block = int(packed.shape[2]) * 8 // bits
        options = {"K": features, "N": int(packed.shape[0]), "bits": bits, "block_size": block}
        scale, zero_point = (op.Reshape(part, op.Constant(value_ints=[-1])) for part in (scale, zero_point))
        return contributed(_mat_mul_n_bits())(x, packed, scale, zero_point, None, bias, **options)

    return {
        torch.ops.fxcompress.dynamic_linear.default: dynamic_linear,
        torch.ops.fxcompress.block_linear.default: block_linear,
        aten.fake_quantize_per_tensor_affine.default: per_tensor,
        aten.fake_quantize_per_channel_affine.default: per_channel,
    }
