"""A zero point for each weight in 8 bits, where equal ones were made one.

x64 processors without VNNI add products of unsigned and signed bytes in 16 bits, which 8-bit weights overflow. ONNX
Runtime has a mode that computes exactly there: it turns signed weights into unsigned ones, with their zero points. It
cannot open a model in which two weights have one zero point between them.
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx
import torch
from onnx import numpy_helper

__all__ = ["separate_zero_points"]

_INPUTS = {"DequantizeLinear": (2,), "DynamicQuantizeLSTM": (9, 11)}


def separate_zero_points(graph: onnx.GraphProto, weights: Mapping[str, torch.Tensor]) -> None:
    """Give every node that reads a signed zero point one of its own.

    Args:
        graph: is changed.
        weights: by the names of the graph inputs that stand for them.
    """
    known = {t.name: numpy_helper.to_array(t) for t in graph.initializer if t.data_type == onnx.TensorProto.INT8}
    known |= {
        name: tensor.numpy(force=True)
        for name, tensor in weights.items()
        if tensor.dtype == torch.int8 and tensor.dim() <= 2
    }
    read: dict[str, int] = {}
    for node in graph.node:
        for index in _INPUTS.get(node.op_type, ()):
            name = node.input[index] if index < len(node.input) else ""
            if name not in known:
                continue
            read[name] = read.get(name, 0) + 1
            if read[name] > 1:
                node.input[index] = f"{name}_{read[name]}"
                graph.initializer.append(numpy_helper.from_array(known[name], node.input[index]))
