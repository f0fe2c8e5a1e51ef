"""What each engine wants: number formats, and where quantize and dequantize have to stand.

One graph cannot serve all. ONNX Runtime runs an operation in integers if every input comes from a
``DequantizeLinear`` and the output goes to a ``QuantizeLinear``. TensorRT wants inputs and weights quantized, and
outputs only where the next layer asks for it; it takes no zero points.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from fxcompress.errors import OptionError, nearest
from fxcompress.quantization.types import QuantType

__all__ = ["SCHEMES", "Scheme", "scheme_of"]


@dataclass(frozen=True)
class Scheme:
    """Formats and placement for one engine.

    Attributes:
        name: of the backend that it is for.
        activation: format of activations; one scale per tensor.
        weight: format of weights.
        per_channel: weights have one scale per output channel.
        placement: ``values`` quantizes every input and output of an integer operation; ``inputs`` quantizes what
            layers read, and the skip branch of a residual addition.
        results: with ``values``, quantize also results that only floating-point operations read. Without, such a layer
            writes floats itself, and what follows can be fused into it.
        split_gates: with ``values``, compute SiLU and hard swish in integers, as a gate and a product. Without, the
            engine is taken to fuse the whole activation into the layer before it.
    """

    name: str
    activation: QuantType
    weight: QuantType
    per_channel: bool = True
    placement: Literal["values", "inputs"] = "values"
    results: bool = True
    split_gates: bool = False


_UINT8 = QuantType(8, signed=False, symmetric=False)
_INT8 = QuantType(8, signed=True, symmetric=True)
_INT8_WEIGHT = QuantType(8, signed=True, symmetric=True, narrow=True)

SCHEMES = {
    "onnxruntime": Scheme("onnxruntime", _UINT8, _INT8_WEIGHT, split_gates=True),
    "openvino": Scheme("openvino", _UINT8, _INT8_WEIGHT, results=False),
    "tensorrt": Scheme("tensorrt", _INT8, _INT8_WEIGHT, placement="inputs"),
}
"""The schemes by the name of their backend."""


def scheme_of(given: str | Scheme, *, weight_bits: int = 8) -> Scheme:
    """A scheme by name or as it is.

    Args:
        given: a name, or a scheme.
        weight_bits: 7 for x64 processors without VNNI, where sums of 8-bit products saturate.

    Raises:
        OptionError: the name is unknown.
    """
    if isinstance(given, str):
        if given not in SCHEMES:
            raise OptionError(f"there is no scheme {given!r}", where="scheme", remedy=nearest(given, SCHEMES))
        given = SCHEMES[given]
    if weight_bits == given.weight.bits:
        return given
    weight = QuantType(weight_bits, given.weight.signed, given.weight.symmetric, given.weight.narrow)
    return replace(given, weight=weight)
