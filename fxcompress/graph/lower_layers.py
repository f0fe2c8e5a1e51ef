"""Which ATen call a ``torch.nn`` layer makes in eval mode: the inverse of ``capture/layers.py``.

A layer that has no rule here is not an error: :mod:`fxcompress.graph.lowering` traces it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.instancenorm import _InstanceNorm

__all__ = ["LOWERINGS", "Emitter"]

aten = torch.ops.aten


class Emitter(Protocol):
    """What a rule writes with."""

    def call(
        self, target: Any, args: Sequence[Any], kwargs: dict[str, Any] | None = None, *, result: bool = False
    ) -> Any:
        """Append an operation; ``result`` says that it gives what the layer gives."""

    def tensor(self, name: str) -> fx.Node | None:
        """The layer's parameter or buffer ``name``, None where the layer has none."""


# A rule gives the layer's result, or NotImplemented for a use of the layer that it does not know.
Lowering = Callable[[Emitter, Any, tuple[Any, ...]], Any]


def _linear(emit: Emitter, layer: nn.Linear, inputs: tuple[Any, ...]) -> Any:
    return emit.call(aten.linear.default, (*inputs, emit.tensor("weight"), emit.tensor("bias")), result=True)


def _convolution(operation: Any, operation_same: Any) -> Lowering:
    def lower(emit: Emitter, layer: _ConvNd, inputs: tuple[Any, ...]) -> Any:
        (x,) = inputs
        padding: Any = layer.padding if isinstance(layer.padding, str) else list(layer.padding)
        if layer.padding_mode != "zeros":
            x = emit.call(aten.pad.default, (x, _both_sides(layer), layer.padding_mode))
            padding = [0] * len(layer.kernel_size)
        target = operation_same if isinstance(padding, str) else operation
        weights = emit.tensor("weight"), emit.tensor("bias")
        steps = list(layer.stride), padding, list(layer.dilation), layer.groups
        return emit.call(target, (x, *weights, *steps), result=True)

    return lower


def _both_sides(layer: _ConvNd) -> list[int]:
    """The widths that ``pad`` takes: last dim first, before and after. ``'same'`` puts the odd one after."""
    if layer.padding == "valid":
        return [0, 0] * len(layer.kernel_size)
    widths: list[int] = []
    for dim in reversed(range(len(layer.kernel_size))):
        if isinstance(layer.padding, str):
            total = layer.dilation[dim] * (layer.kernel_size[dim] - 1)
            widths += [total // 2, total - total // 2]
        else:
            widths += [layer.padding[dim]] * 2
    return widths


def _transposed_convolution(operation: Any) -> Lowering:
    def lower(emit: Emitter, layer: _ConvTransposeNd, inputs: tuple[Any, ...]) -> Any:
        assert not isinstance(layer.padding, str)
        steps = list(layer.stride), list(layer.padding), list(layer.output_padding), layer.groups, list(layer.dilation)
        weights = emit.tensor("weight"), emit.tensor("bias")
        return emit.call(operation, (*inputs, *weights, *steps), result=True)

    return lower


def _batch_norm(emit: Emitter, layer: _BatchNorm, inputs: tuple[Any, ...]) -> Any:
    running = emit.tensor("running_mean"), emit.tensor("running_var")
    options = running == (None, None), layer.momentum or 0.0, layer.eps, True
    affine = emit.tensor("weight"), emit.tensor("bias")
    return emit.call(aten.batch_norm.default, (*inputs, *affine, *running, *options), result=True)


def _instance_norm(emit: Emitter, layer: _InstanceNorm, inputs: tuple[Any, ...]) -> Any:
    if inputs[0].meta["val"].dim() == layer._get_no_batch_dim():
        return NotImplemented
    running = emit.tensor("running_mean"), emit.tensor("running_var")
    options = not layer.track_running_stats, layer.momentum or 0.0, layer.eps, True
    affine = emit.tensor("weight"), emit.tensor("bias")
    return emit.call(aten.instance_norm.default, (*inputs, *affine, *running, *options), result=True)


def _layer_norm(emit: Emitter, layer: nn.LayerNorm, inputs: tuple[Any, ...]) -> Any:
    affine = emit.tensor("weight"), emit.tensor("bias")
    return emit.call(aten.layer_norm.default, (*inputs, list(layer.normalized_shape), *affine, layer.eps), result=True)


def _rms_norm(emit: Emitter, layer: nn.RMSNorm, inputs: tuple[Any, ...]) -> Any:
    shape = list(layer.normalized_shape)
    return emit.call(aten.rms_norm.default, (*inputs, shape, emit.tensor("weight"), layer.eps), result=True)


def _group_norm(emit: Emitter, layer: nn.GroupNorm, inputs: tuple[Any, ...]) -> Any:
    affine = emit.tensor("weight"), emit.tensor("bias")
    return emit.call(aten.group_norm.default, (*inputs, layer.num_groups, *affine, layer.eps), result=True)


def _embedding(emit: Emitter, layer: nn.Embedding, inputs: tuple[Any, ...]) -> Any:
    if layer.max_norm is not None:  # the layer rescales its own weight
        return NotImplemented
    padding = -1 if layer.padding_idx is None else layer.padding_idx
    return emit.call(aten.embedding.default, (emit.tensor("weight"), *inputs, padding), result=True)


def _prelu(emit: Emitter, layer: nn.PReLU, inputs: tuple[Any, ...]) -> Any:
    return emit.call(aten.prelu.default, (*inputs, emit.tensor("weight")), result=True)


def _bilinear(emit: Emitter, layer: nn.Bilinear, inputs: tuple[Any, ...]) -> Any:
    return emit.call(aten.bilinear.default, (*inputs, emit.tensor("weight"), emit.tensor("bias")), result=True)


def _rrelu(emit: Emitter, layer: nn.RReLU, inputs: tuple[Any, ...]) -> Any:
    return emit.call(aten.leaky_relu.default, (*inputs, (layer.lower + layer.upper) / 2), result=True)


def _identity(emit: Emitter, layer: nn.Module, inputs: tuple[Any, ...]) -> Any:
    return inputs[0]


def _recurrent(emit: Emitter, layer: nn.RNNBase, inputs: tuple[Any, ...]) -> Any:
    x, state = inputs if len(inputs) == 2 else (inputs[0], None)
    if x.meta["val"].dim() != 3:
        return NotImplemented
    is_lstm = isinstance(layer, nn.LSTM)
    if state is None:
        hidden = layer.proj_size or layer.hidden_size
        state = _zero_state(emit, layer, x, hidden)
        if is_lstm:
            same = layer.hidden_size == hidden
            state = [state, state if same else _zero_state(emit, layer, x, layer.hidden_size)]
    operation = {
        "LSTM": aten.lstm.input,
        "GRU": aten.gru.input,
        "RNN_TANH": aten.rnn_tanh.input,
        "RNN_RELU": aten.rnn_relu.input,
    }[layer.mode]
    weights = [emit.tensor(name) for cell in layer._all_weights for name in cell]
    shape = layer.bias, layer.num_layers, layer.dropout, False, layer.bidirectional, layer.batch_first
    results = emit.call(operation, (x, list(state) if is_lstm else state, weights, *shape), result=True)
    first, *states = (emit.call(operator.getitem, (results, index)) for index in range(3 if is_lstm else 2))
    return (first, tuple(states)) if is_lstm else (first, *states)


def _zero_state(emit: Emitter, layer: nn.RNNBase, x: fx.Node, width: int) -> Any:
    value = x.meta["val"]
    dim = 0 if layer.batch_first else 1
    batch: Any = value.shape[dim]
    if isinstance(batch, torch.SymInt):
        batch = emit.call(aten.sym_size.int, (x, dim))
    size = [layer.num_layers * (2 if layer.bidirectional else 1), batch, width]
    return emit.call(aten.zeros.default, (size,), {"dtype": value.dtype, "device": value.device})


LOWERINGS: dict[type[nn.Module], Lowering] = {
    nn.Linear: _linear,
    nn.Conv1d: _convolution(aten.conv1d.default, aten.conv1d.padding),
    nn.Conv2d: _convolution(aten.conv2d.default, aten.conv2d.padding),
    nn.Conv3d: _convolution(aten.conv3d.default, aten.conv3d.padding),
    nn.ConvTranspose1d: _transposed_convolution(aten.conv_transpose1d.default),
    nn.ConvTranspose2d: _transposed_convolution(aten.conv_transpose2d.input),
    nn.ConvTranspose3d: _transposed_convolution(aten.conv_transpose3d.input),
    nn.BatchNorm1d: _batch_norm,
    nn.BatchNorm2d: _batch_norm,
    nn.BatchNorm3d: _batch_norm,
    nn.InstanceNorm1d: _instance_norm,
    nn.InstanceNorm2d: _instance_norm,
    nn.InstanceNorm3d: _instance_norm,
    nn.LayerNorm: _layer_norm,
    nn.RMSNorm: _rms_norm,
    nn.GroupNorm: _group_norm,
    nn.Embedding: _embedding,
    nn.PReLU: _prelu,
    nn.Bilinear: _bilinear,
    nn.LSTM: _recurrent,
    nn.GRU: _recurrent,
    nn.RNN: _recurrent,
    nn.Identity: _identity,
    nn.Dropout: _identity,
    nn.Dropout1d: _identity,
    nn.Dropout2d: _identity,
    nn.Dropout3d: _identity,
    nn.AlphaDropout: _identity,
    nn.FeatureAlphaDropout: _identity,
    nn.RReLU: _rrelu,
}
