"""An LSTM with 8-bit weights: the layer of torch.nn with a stub on each of its weights.

In ONNX the weights are integers, and ONNX Runtime runs it as ``DynamicQuantizeLSTM``, which rounds inputs and states
anew in each step; PyTorch computes with these in floating point. There is no such kernel for a GRU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fxcompress.graph.lower_layers import LOWERINGS, Emitter
from fxcompress.graph.serialize_layers import register_layer
from fxcompress.quantization.fake_quant import Quantizer, emit_fake_quant
from fxcompress.quantization.types import QuantType, parameters_of_range

__all__ = ["QuantizedLSTM"]

_WEIGHT = QuantType(8, signed=True, symmetric=True, narrow=True)
_SHAPE = ("input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout", "bidirectional")


class QuantizedLSTM(nn.LSTM):
    """An LSTM without projection, its weights on int8 grids with one scale per row; shapes as :class:`torch.nn.LSTM`.

    Attributes:
        quantizers: name of a weight → its stub.
    """

    @classmethod
    def of(cls, layer: nn.LSTM) -> QuantizedLSTM:
        """The layer with its weights rounded; it shares the layer's tensors."""
        made = cls.__new__(cls)
        for name, value in layer.__dict__.items():
            made.__dict__[name] = value.copy() if isinstance(value, (dict, list, set)) else value
        stubs = {}
        for name in made._weights():
            weight = getattr(layer, name).detach()
            stubs[name] = Quantizer(_WEIGHT, 0, weight.shape[0])
            stubs[name].set(*parameters_of_range(weight.amin(1), weight.amax(1), _WEIGHT))
        made.add_module("quantizers", nn.ModuleDict(stubs))
        return made

    def _weights(self) -> list[str]:
        return [name for name in self._flat_weights_names if name.startswith("weight")]

    @property
    def stored_as(self) -> dict[str, torch.dtype]:
        """What engines hold the weights as."""
        return dict.fromkeys(self._weights(), torch.int8)

    def forward(self, input: Any, hx: Any = None) -> Any:
        stubs: Any = self.quantizers
        plain = nn.LSTM.__new__(nn.LSTM)
        plain.__dict__.update(self.__dict__)
        # References to the parameters would have the layer take them, which are not rounded, anew.
        plain.__dict__["_flat_weight_refs"] = [None] * len(self._flat_weights_names)
        plain.__dict__["_flat_weights"] = [
            stubs[name](getattr(self, name)) if name in stubs else getattr(self, name)
            for name in self._flat_weights_names
        ]
        return nn.LSTM.forward(plain, input, hx)


class _WithQuantizedWeights:
    """An emitter for which each weight is the quantized one."""

    def __init__(self, emit: Emitter, layer: QuantizedLSTM) -> None:
        self._emit = emit
        self._stubs: Any = layer.quantizers
        self.call = emit.call

    def tensor(self, name: str) -> Any:
        found = self._emit.tensor(name)
        if name not in self._stubs:
            return found
        return emit_fake_quant(self._emit, self._stubs[name], f"quantizers.{name}.", found, 0)


def _lower(emit: Emitter, layer: QuantizedLSTM, inputs: tuple[Any, ...]) -> Any:
    return LOWERINGS[nn.LSTM](_WithQuantizedWeights(emit, layer), layer, inputs)


def _config(layer: QuantizedLSTM) -> dict[str, Any]:
    return {name: getattr(layer, name) for name in _SHAPE}


LOWERINGS[QuantizedLSTM] = _lower
register_layer(QuantizedLSTM, _config, lambda told: QuantizedLSTM.of(nn.LSTM(**told)))
