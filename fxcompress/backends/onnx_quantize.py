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

__all__ = ["onnxruntime_translation", "quantize_translation"]

aten = torch.ops.aten

# Numbers of onnx.TensorProto.DataType, and what they hold.
_FLOAT, _UINT8, _INT8, _INT32 = 1, 2, 3, 6
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


def _step(value: Any) -> Any:
    """The scale of a value that is dequantized, or was and has been moved since; None of any other."""
    producer = value.producer()
    while producer is not None and producer.op_type in ("Reshape", "Transpose"):
        producer = producer.inputs[0].producer()
    return producer.inputs[1] if producer is not None and producer.op_type == "DequantizeLinear" else None


def _quick_gelu() -> onnx.defs.OpSchema:
    """ONNX Runtime's operator for x · sigmoid(alpha · x)."""
    schema = onnx.defs.OpSchema
    return schema(
        "QuickGelu",
        "com.microsoft",
        1,
        inputs=[schema.FormalParameter("X", "T")],
        outputs=[schema.FormalParameter("Y", "T")],
        type_constraints=[("T", ["tensor(float)"], "")],
        attributes=[schema.Attribute("alpha", schema.AttrType.FLOAT)],
    )


def onnxruntime_translation(
    op: Any, contributed: Callable[[onnx.defs.OpSchema], Callable[..., Any]]
) -> dict[Callable[..., Any], Callable[..., Any]]:
    """Entries for graphs with stubs that only ONNX Runtime shall have.

    * SiLU is one operator of its own. It finds x · sigmoid(x) by itself, but not where x is dequantized: each of the
      two readers has a ``DequantizeLinear`` of its own by then.
    * The hard sigmoid of a value that was quantized is an addition whose result is clipped: there is an integer kernel
      for that, and the clip is part of the quantization behind it. A sixth of the value are the same integers on
      another scale.
    * The bias of a linear layer on quantized inputs is an integer on the grid of its products. Where the layer's result
      is quantized ONNX Runtime sees to that by itself; where it is not, the layer would be in floating point.
    """

    def linear(input: Any, weight: Any, bias: Any = None) -> Any:
        swapped = [*range(len(weight.shape) - 2), len(weight.shape) - 1, len(weight.shape) - 2]
        if bias is None or len(input.shape) != 2 or len(weight.shape) != 2:
            product = op.MatMul(input, op.Transpose(weight, perm=swapped))
            return product if bias is None else op.Add(product, bias)
        steps = [_step(value) for value in (input, weight)]
        if all(step is not None for step in steps):
            step = op.Mul(*steps)
            integers = op.Cast(op.Round(op.Div(bias, step)), to=_INT32)
            # Of one axis there is one scale per entry, or one for all.
            bias = (
                op.DequantizeLinear(integers, step, axis=0)
                if len(steps[1].shape)
                else op.DequantizeLinear(integers, step)
            )
        return op.Gemm(input, weight, bias, transB=1)

    def hardsigmoid(self: Any) -> Any:
        rounded = self.producer()
        if rounded is None or rounded.op_type != "DequantizeLinear" or rounded.inputs[1].shape:
            return op.HardSigmoid(self, alpha=1 / 6, beta=0.5)
        integers, step, *zero = rounded.inputs
        sixth = op.DequantizeLinear(integers, op.Mul(step, op.Constant(value_float=1 / 6)), *zero)
        half = op.DequantizeLinear(
            op.Cast(op.Constant(value_int=255), to=_UINT8),
            op.Constant(value_float=0.5 / 255),
            op.Cast(op.Constant(value_int=0), to=_UINT8),
        )
        return op.Clip(op.Add(sixth, half), op.Constant(value_float=0.0), op.Constant(value_float=1.0))

    def silu(self: Any) -> Any:
        if int(self.dtype) != _FLOAT:
            return op.Mul(self, op.Sigmoid(self))
        return contributed(_quick_gelu())(self, alpha=1.0)

    return {aten.silu.default: silu, aten.hardsigmoid.default: hardsigmoid, aten.linear.default: linear}


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

    def dynamic_matmul(x: Any, y: Any) -> Any:
        (left, left_step, left_zero), (right, right_step, right_zero) = map(op.DynamicQuantizeLinear, (x, y))
        product = op.MatMulInteger(left, right, left_zero, right_zero)
        return op.Mul(op.Cast(product, to=_FLOAT), op.Mul(left_step, right_step))

    def block_linear(x: Any, packed: Any, scale: Any, zero_point: Any, bias: Any, bits: int, features: int) -> Any:
        # An operator of ONNX Runtime: ONNX itself can only say what it is, which engines would have to find out.
        block = int(packed.shape[2]) * 8 // bits
        options = {"K": features, "N": int(packed.shape[0]), "bits": bits, "block_size": block}
        scale, zero_point = (op.Reshape(part, op.Constant(value_ints=[-1])) for part in (scale, zero_point))
        return contributed(_mat_mul_n_bits())(x, packed, scale, zero_point, None, bias, **options)

    return {
        torch.ops.fxcompress.dynamic_linear.default: dynamic_linear,
        torch.ops.fxcompress.dynamic_matmul.default: dynamic_matmul,
        torch.ops.fxcompress.block_linear.default: block_linear,
        aten.fake_quantize_per_tensor_affine.default: per_tensor,
        aten.fake_quantize_per_channel_affine.default: per_channel,
    }
