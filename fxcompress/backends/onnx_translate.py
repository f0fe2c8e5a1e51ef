"""ONNX forms of single ATen operations, where torch's own are missing, roundabout, or hard on engines.

* attention: torch's takes shapes apart at run time to transpose the keys; here it is one ``Transpose`` per ``MatMul``;
* convolution without bias: torch's computes a bias of zeros;
* batch norm and adaptive pooling: torch has none and decomposes them; engines look for ``BatchNormalization`` and
  ``GlobalAveragePool``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

__all__ = ["translation_table"]

aten = torch.ops.aten


def translation_table(op: Any) -> dict[Callable[..., Any], Callable[..., Any]]:
    """For ``torch.onnx.export(custom_translation_table=)``.

    Args:
        op: the ONNX opset to write with, ``onnxscript.opset18``.
    """

    def batch_norm(
        input: Any,
        weight: Any = None,
        bias: Any = None,
        running_mean: Any = None,
        running_var: Any = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
        cudnn_enabled: bool = True,
    ) -> Any:
        if weight is None:
            weight = _filled(op, 1.0, running_mean)
        if bias is None:
            bias = _filled(op, 0.0, running_mean)
        return op.BatchNormalization(input, weight, bias, running_mean, running_var, epsilon=eps)

    def convolution(
        input: Any,
        weight: Any,
        bias: Any = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Any:
        steps = _steps(weight, strides=stride, dilations=dilation)
        return op.Conv(input, weight, bias, pads=_pads(weight, padding), group=groups, **steps)

    def transposed_convolution(
        input: Any,
        weight: Any,
        bias: Any = None,
        stride: Any = 1,
        padding: Any = 0,
        output_padding: Any = 0,
        groups: int = 1,
        dilation: Any = 1,
    ) -> Any:
        steps = _steps(weight, strides=stride, dilations=dilation, output_padding=output_padding)
        return op.ConvTranspose(input, weight, bias, pads=_pads(weight, padding), group=groups, **steps)

    def any_convolution(
        input: Any,
        weight: Any,
        bias: Any,
        stride: Any,
        padding: Any,
        dilation: Any,
        transposed: bool,
        output_padding: Any,
        groups: int,
    ) -> Any:
        if transposed:
            return transposed_convolution(input, weight, bias, stride, padding, output_padding, groups, dilation)
        return convolution(input, weight, bias, stride, padding, dilation, groups)

    def adaptive_avg_pool(self: Any, output_size: Any) -> Any:
        if all(size == 1 for size in output_size):
            return op.GlobalAveragePool(self)
        factors = [int(size) // want for size, want in zip(self.shape[2:], output_size, strict=True)]
        return op.AveragePool(self, kernel_shape=factors, strides=factors)

    def attention(
        query: Any,
        key: Any,
        value: Any,
        attn_mask: Any = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        *,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Any:
        return _attention(op, query, key, value, attn_mask, is_causal, scale, enable_gqa)

    return {
        aten.conv1d.default: convolution,
        aten.conv2d.default: convolution,
        aten.conv3d.default: convolution,
        aten.conv_transpose1d.default: transposed_convolution,
        aten.conv_transpose2d.input: transposed_convolution,
        aten.conv_transpose3d.input: transposed_convolution,
        aten.convolution.default: any_convolution,
        aten.batch_norm.default: batch_norm,
        aten.adaptive_avg_pool1d.default: adaptive_avg_pool,
        aten.adaptive_avg_pool2d.default: adaptive_avg_pool,
        aten.adaptive_avg_pool3d.default: adaptive_avg_pool,
        aten.scaled_dot_product_attention.default: attention,
    }


def _steps(weight: Any, **values: Any) -> dict[str, list[int]]:
    rank = len(weight.shape) - 2
    return {name: _per_dim(value, rank) for name, value in values.items()}


def _pads(weight: Any, padding: Any) -> list[int]:
    return _per_dim(padding, len(weight.shape) - 2) * 2


def _per_dim(value: Any, rank: int) -> list[int]:
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    return values * rank if len(values) == 1 else values


def _filled(op: Any, number: float, like: Any) -> Any:
    return op.CastLike(op.Constant(value_floats=[number] * int(like.shape[0])), like)


def _attention(op: Any, query: Any, key: Any, value: Any, mask: Any, causal: bool, scale: Any, grouped: bool) -> Any:
    """softmax(s·Q Kᵀ + M) V, with Q scaled first so that 16-bit products stay in range.

    A boolean mask picks: what it leaves out becomes exactly 0 after the softmax, also in rows that leave out
    everything, as PyTorch has it.
    """
    rank = len(query.shape)
    if grouped:
        key, value = (_repeat_heads(op, states, query) for states in (key, value))
    width = query.shape[-1]
    if scale is None and isinstance(width, int):
        scale = 1 / math.sqrt(width)
    if scale is None:
        scale = op.Reciprocal(op.Sqrt(op.CastLike(op.Shape(query, start=rank - 1), query)))
    swapped = [*range(rank - 2), rank - 1, rank - 2]
    scores = op.MatMul(op.Mul(query, scale), op.Transpose(key, perm=swapped[: len(key.shape)]))
    lowest = _LOWEST[_bits(query)]
    if causal:
        mask = _lower_triangle(op, query, key, lowest)
    picks = mask is not None and int(mask.dtype) == _BOOL and not causal
    if picks:
        scores = op.Where(mask, scores, lowest)
    elif mask is not None:
        scores = op.Add(scores, mask if causal else op.Max(mask, lowest))  # rows of -inf alone would turn into NaN
    weights = op.Softmax(scores, axis=-1)
    if picks:
        weights = op.Where(mask, weights, 0.0)
    return op.MatMul(weights, value)


_BOOL = 9  # onnx.TensorProto.BOOL
_HALF = (10,)  # onnx.TensorProto.FLOAT16
# Half of the least number: a score can be added to it.
_LOWEST = {16: torch.finfo(torch.float16).min / 2, 32: torch.finfo(torch.bfloat16).min / 2}


def _bits(value: Any) -> int:
    return 16 if int(value.dtype) in _HALF else 32


def _lower_triangle(op: Any, query: Any, key: Any, lowest: float) -> Any:
    """0 where a query may look, ``lowest`` where the key comes later."""
    sizes = [value.shape[-2] for value in (query, key)]
    ends = [
        op.Constant(value_ints=[size]) if isinstance(size, int) else op.Shape(value, start=-2, end=-1)
        for size, value in zip(sizes, (query, key), strict=True)
    ]
    lowest = op.CastLike(op.Constant(value_float=lowest), query)
    return op.Trilu(op.Expand(lowest, op.Concat(*ends, axis=0)), op.Constant(value_int=1), upper=1)


def _repeat_heads(op: Any, states: Any, query: Any) -> Any:
    """[batch, few heads, length, width] → [batch, many heads, length, width]."""
    few, many = states.shape[1], query.shape[1]
    if few == many:
        return states
    one_more = op.Unsqueeze(states, op.Constant(value_ints=[2]))
    repeated = op.Expand(one_more, op.Constant(value_ints=[1, 1, int(many) // int(few), 1, 1]))
    return op.Reshape(repeated, op.Constant(value_ints=[0, int(many), -1, int(states.shape[3])]))
