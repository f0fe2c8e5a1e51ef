"""What 8-bit weights ask of a processor, as a sentence for the report.

x64 processors without VNNI (before Ice Lake and Zen 4) add products of unsigned and signed bytes in pairs in 16 bits,
which weights of 8 bits overflow: wrong numbers, and no error. A bundle may be built on a processor with VNNI and run on
one without, so that the sentence does not depend on where it was built.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from fxcompress.quantization.integer_layers import DynamicLinear
from fxcompress.quantization.layers import QUANTIZED
from fxcompress.quantization.recurrent_layers import QuantizedLSTM

__all__ = ["in_onnxruntime", "in_openvino", "widest_weight"]

_SEVEN = "weights of 7 bits: their products overflow on no processor"


def widest_weight(graph_module: fx.GraphModule) -> int:
    """Bits of the widest weight that integer kernels multiply; 0 if there is none."""
    widest = 0
    for module in graph_module.modules():
        if isinstance(module, (DynamicLinear, QuantizedLSTM)):
            widest = max(widest, 8)
        elif isinstance(module, tuple(QUANTIZED.values())):
            quantizer: Any = module.weight_quantizer
            widest = max(widest, quantizer.kind.bits)
    return widest


def in_onnxruntime(bits: int) -> str:
    """For an engine of ONNX Runtime with weights of so many bits."""
    if bits == 8:
        return (
            "weights of 8 bits: exact on every processor in this engine, which opens ONNX Runtime with "
            "session.x64quantprecision=1. A session of your own over model.onnx overflows on x64 without VNNI and says "
            "nothing: set that entry there, without the optimizer ConstantSharing, or Quantize(weight_bits=7)"
        )
    return _SEVEN if bits == 7 else ""


def in_openvino(bits: int) -> str:
    """For an engine of OpenVINO with weights of so many bits."""
    if bits == 8:
        return (
            "weights of 8 bits: on x64 without VNNI their products overflow in OpenVINO, which says nothing, wherever "
            "the engine was built. For such processors Quantize(weight_bits=7); `fxcompress verify` on the device tells"
        )
    return _SEVEN if bits == 7 else ""
