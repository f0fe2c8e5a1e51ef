"""ONNX forms of single ATen operations, where torch's own are missing, roundabout, or hard on engines.

* attention: torch's takes shapes apart at run time to transpose the keys; here it is one ``Transpose`` per ``MatMul``;
* convolution without bias: torch's computes a bias of zeros;
* splitting: torch's makes an ONNX sequence;
* batch norm and adaptive pooling: torch has none and decomposes them; engines look for ``BatchNormalization`` and
  ``GlobalAveragePool``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from fxcompress.backends.onnx_quantize import onnxruntime_translation, quantize_translation
from fxcompress.backends.onnx_recurrent import recurrent_translation

__all__ = ["translation_table"]

aten = torch.ops.aten


def translation_table(
    op: Any, opset: int, contributed: Callable[..., Any], *, onnxruntime_only: bool = False
) -> dict[Callable[..., Any], Callable[..., Any]]:
    """For ``torch.onnx.export(custom_translation_table=)``.

    Args:
        op: the ONNX opset to write with, ``onnxscript.opset18``.
        opset: of the file; some operations are new in a later one.
        contributed: from the schema of an operator that is not ONNX's own to a function that writes it.
        onnxruntime_only: whether operators may be used that no other engine has.
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

    def rms_norm(input: Any, normalized_shape: Any, weight: Any = None, eps: float | None = None) -> Any:
        return _rms_norm(op, input, len(normalized_shape), weight, eps)

    def adaptive_avg_pool(self: Any, output_size: Any) -> Any:
        if all(size == 1 for size in output_size):
            return op.GlobalAveragePool(self)
        factors = [int(size) // want for size, want in zip(self.shape[2:], output_size, strict=True)]
        return op.AveragePool(self, kernel_shape=factors, strides=factors)

    def split(self: Any, split_sizes: Any, dim: int = 0) -> Any:
        # `num_outputs` tells the exporter; ONNX takes it or the sizes, and `onnx_cleanup` leaves the sizes.
        return op.Split(self, op.Constant(value_ints=split_sizes), axis=dim, num_outputs=len(split_sizes))

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

    table: dict[Callable[..., Any], Callable[..., Any]] = {
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
        aten.split_with_sizes.default: split,
        aten.scaled_dot_product_attention.default: attention,
        **recurrent_translation(op, contributed if onnxruntime_only else None),
        **quantize_translation(op, contributed),
    }
    if opset < _OWN_RMS_NORM:
        table[aten.rms_norm.default] = rms_norm
    if onnxruntime_only:
        table.update(onnxruntime_translation(op, contributed))
    return table


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


def _rms_norm(op: Any, input: Any, dims: int, weight: Any, eps: float | None) -> Any:
    """The result of x / sqrt(mean(x²) + ε) · w; of a 16-bit x in 32 bits, as PyTorch computes it."""
    kind = int(input.dtype)
    narrow = kind in _NARROW
    eps = torch.finfo(_NARROW.get(kind, torch.float32)).eps if eps is None else eps
    x = op.Cast(input, to=_FLOAT) if narrow else input
    mean = op.ReduceMean(op.Mul(x, x), op.Constant(value_ints=list(range(-dims, 0))), keepdims=1)
    result = op.Div(x, op.Sqrt(op.Add(mean, eps)))
    result = op.Cast(result, to=kind) if narrow else result
    return result if weight is None else op.Mul(result, weight)


def _attention(op: Any, query: Any, key: Any, value: Any, mask: Any, causal: bool, scale: Any, grouped: bool) -> Any:
    """softmax(s·Q Kᵀ + M) V, with Q scaled first so that 16-bit products stay in range.

    A boolean mask picks: what it leaves out is so low that the softmax makes it exactly 0. A row that leaves out
    everything is 0 in PyTorch, which a factor on the result sees to. Both are made of the mask alone, so that all
    layers that share it share them.
    """
    rank = len(query.shape)
    given = key  # its shape is known, that of repeated heads may not be
    if grouped:
        key, value = (_repeat_heads(op, states, query) for states in (key, value))
    width = query.shape[-1]
    if scale is None and isinstance(width, int):
        scale = 1 / math.sqrt(width)
    if scale is None:
        scale = op.Reciprocal(op.Sqrt(op.CastLike(op.Shape(query, start=rank - 1), query)))
    swapped = [*range(rank - 2), rank - 1, rank - 2]
    scores = op.MatMul(op.Mul(query, scale), op.Transpose(key, perm=swapped))
    lowest = _lowest(int(query.dtype))
    picks = mask is not None and int(mask.dtype) == _BOOL
    if picks:
        scores = op.Add(scores, op.Where(mask, _like(op, 0.0, query), _like(op, lowest, query)))
    elif mask is not None:
        scores = op.Add(scores, op.Max(mask, lowest))  # rows of -inf alone would turn into NaN
    elif causal:
        scores = op.Add(scores, _lower_triangle(op, query, given, lowest))
    result = op.MatMul(op.Softmax(scores, axis=-1), value)
    if picks:
        picked = op.Where(mask, _like(op, 1.0, query), _like(op, 0.0, query))
        result = op.Mul(result, op.ReduceMax(picked, op.Constant(value_ints=[-1]), keepdims=1))
    return result


# Numbers of onnx.TensorProto.DataType.
_FLOAT, _BOOL, _HALF, _BFLOAT = 1, 9, 10, 16
_NARROW = {_HALF: torch.float16, _BFLOAT: torch.bfloat16}
_OWN_RMS_NORM = 23  # the opset since which ONNX has the operation


def _like(op: Any, number: float, value: Any) -> Any:
    """A number in the type of ``value``: ``Where`` does not convert by itself."""
    return op.CastLike(op.Constant(value_float=number), value)


def _lowest(kind: int) -> float:
    """Half of the least number: a score can be added to it. That of bfloat16 does for all wide types."""
    return torch.finfo(torch.float16 if kind == _HALF else torch.bfloat16).min / 2


def _lower_triangle(op: Any, query: Any, key: Any, lowest: float) -> Any:
    """0 where a query may look, ``lowest`` where the key comes later."""
    sizes = [value.shape[-2] for value in (query, key)]
    ends = [
        op.Constant(value_ints=[size]) if isinstance(size, int) else op.Shape(value, start=-2, end=-1)
        for size, value in zip(sizes, (query, key), strict=True)
    ]
    return op.Trilu(op.Expand(_like(op, lowest, query), op.Concat(*ends, axis=0)), op.Constant(value_int=1), upper=1)


def _repeat_heads(op: Any, states: Any, query: Any) -> Any:
    """[batch, few heads, length, width] → [batch, many heads, length, width]."""
    few, many = states.shape[1], query.shape[1]
    if few == many:
        return states
    one_more = op.Unsqueeze(states, op.Constant(value_ints=[2]))
    repeated = op.Expand(one_more, op.Constant(value_ints=[1, 1, int(many) // int(few), 1, 1]))
    return op.Reshape(repeated, op.Constant(value_ints=[0, int(many), -1, int(states.shape[3])]))
