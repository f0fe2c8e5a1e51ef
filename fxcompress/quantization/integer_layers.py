"""Linear layers that hold their weight as integers: half-way home without calibration data.

:class:`DynamicLinear` rounds its input anew in every call and multiplies integers; :class:`BlockLinear` only stores
integers, with a scale for each block of inputs, and multiplies in floating point.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn

from fxcompress.analysis.macs import count_like_linear
from fxcompress.graph.lower_layers import LOWERINGS, Emitter
from fxcompress.graph.serialize_layers import register_layer
from fxcompress.quantization.operators import pack
from fxcompress.quantization.types import QuantType, parameters_of_range

__all__ = ["BlockLinear", "DynamicLinear"]

_WEIGHT = QuantType(8, signed=True, symmetric=True, narrow=True)


class _IntegerLinear(nn.Module):
    _integers: ClassVar[str] = "weight"

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features

    @property
    def held_as_integers(self) -> dict[str, int]:
        """The buffer with the weight, and how many elements that has: the report counts them as parameters."""
        return {self._integers: self.in_features * self.out_features}

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


class DynamicLinear(_IntegerLinear):
    """A linear layer with an int8 weight, on inputs rounded to uint8 over the range that they have in each call.

    Attributes:
        weight: int8 ``[out, in]``.
        scale: float32 ``[out]``.
        bias: ``[out]`` or None.
    """

    weight: torch.Tensor
    scale: torch.Tensor

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__(in_features, out_features)
        self.register_buffer("weight", torch.zeros(out_features, in_features, dtype=torch.int8))
        self.register_buffer("scale", torch.ones(out_features))
        self.register_parameter("bias", nn.Parameter(torch.zeros(out_features)) if bias else None)

    @classmethod
    def of(cls, layer: nn.Linear) -> DynamicLinear:
        """The layer with its weight rounded; the bias is shared."""
        made = cls(layer.in_features, layer.out_features, layer.bias is not None)
        weight = layer.weight.detach()
        made.scale, _ = parameters_of_range(weight.amin(1), weight.amax(1), _WEIGHT)
        made.weight = (weight / made.scale[:, None]).round().clamp(_WEIGHT.minimum, _WEIGHT.maximum).to(torch.int8)
        made.bias = layer.bias
        return made

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = torch.ops.fxcompress.dynamic_linear(x, self.weight, self.scale, self.bias)
        return result


class BlockLinear(_IntegerLinear):
    """A linear layer whose weight is stored in 4 or 8 bits, with a scale and a zero point per block of inputs.

    Attributes:
        packed: uint8 ``[out, blocks, block · bits / 8]``.
        scale: float32 ``[out, blocks]``.
        zero_point: uint8 ``[out, ⌈blocks · bits / 8⌉]``.
        bias: ``[out]`` or None.
    """

    _integers = "packed"
    packed: torch.Tensor
    scale: torch.Tensor
    zero_point: torch.Tensor

    def __init__(self, in_features: int, out_features: int, bits: int, block: int, bias: bool = True) -> None:
        super().__init__(in_features, out_features)
        self.bits, self.block = bits, block
        blocks = -(-in_features // block)
        self.register_buffer("packed", torch.zeros(out_features, blocks, block * bits // 8, dtype=torch.uint8))
        self.register_buffer("scale", torch.ones(out_features, blocks))
        self.register_buffer("zero_point", torch.zeros(out_features, -(-blocks * bits // 8), dtype=torch.uint8))
        self.register_parameter("bias", nn.Parameter(torch.zeros(out_features)) if bias else None)

    @classmethod
    def of(
        cls, layer: nn.Linear, integers: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, bits: int
    ) -> BlockLinear:
        """The layer with its weight given as integers ``[out, blocks, block]``; the bias is shared."""
        made = cls(layer.in_features, layer.out_features, bits, integers.shape[2], layer.bias is not None)
        made.packed, made.scale, made.zero_point = pack(integers, bits), scale.float(), pack(zero, bits)
        made.bias = layer.bias
        return made

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        grid = self.packed, self.scale, self.zero_point
        result: torch.Tensor = torch.ops.fxcompress.block_linear(x, *grid, self.bias, self.bits, self.in_features)
        return result

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, bits={self.bits}, block={self.block}"


def _lower_dynamic(emit: Emitter, layer: DynamicLinear, inputs: tuple[Any, ...]) -> Any:
    tensors = emit.tensor("weight"), emit.tensor("scale"), emit.tensor("bias")
    return emit.call(torch.ops.fxcompress.dynamic_linear.default, (*inputs, *tensors), result=True)


def _lower_block(emit: Emitter, layer: BlockLinear, inputs: tuple[Any, ...]) -> Any:
    tensors = (emit.tensor(name) for name in ("packed", "scale", "zero_point", "bias"))
    args = (*inputs, *tensors, layer.bits, layer.in_features)
    return emit.call(torch.ops.fxcompress.block_linear.default, args, result=True)


LOWERINGS[DynamicLinear] = _lower_dynamic
LOWERINGS[BlockLinear] = _lower_block
count_like_linear(_IntegerLinear)


def _shape(layer: Any) -> dict[str, Any]:
    told = {"in_features": layer.in_features, "out_features": layer.out_features, "bias": layer.bias is not None}
    return told | ({"bits": layer.bits, "block": layer.block} if isinstance(layer, BlockLinear) else {})


register_layer(DynamicLinear, _shape, lambda told: DynamicLinear(**told))
register_layer(BlockLinear, _shape, lambda told: BlockLinear(**told))
