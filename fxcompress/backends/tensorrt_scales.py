"""Scales of int8 inputs moved out of the kernels that TensorRT for RTX writes.

It holds every fused elementwise kernel as CUDA source of about 136 KB, to be compiled on the device, and writes the
scale of a tensor into it as a number. So each quantized layer has a kernel of its own, and an engine of many small
layers grows by being quantized. With a scale of 1 and the true one beside the weights, layers share a kernel::

    Conv(DQ(Q(x, s), s), DQ(W, t))  ⇒  Conv(DQ(Q(x / S, 1), 1), DQ(W, t · s))      S: s, once for each channel

Integers and products are the same and stay int8; only ``t · s`` is rounded, so that what lies on the edge between two
integers of the next layer may fall to the other one. Applies where all that
reads the int8 input is a convolution or a product with int8 weights of its own; the others are left.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnx.external_data_helper import load_external_data_for_tensor

__all__ = ["move_scales_to_weights"]


def move_scales_to_weights(path: Path) -> int:
    """Rewrite an ONNX file in place, its sub-graphs left alone.

    Returns:
        how many int8 inputs were rewritten; a file without any is not touched.
    """
    model = onnx.load(path, load_external_data=False)
    graph = _Graph(model.graph, path.parent)
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        division = graph.rewritten(node)
        nodes += [node] if division is None else [division, node]
    count = len(nodes) - len(model.graph.node)
    if count:
        del model.graph.node[:]
        model.graph.node.extend(nodes)
        read = {name for node in nodes for name in node.input} | {value.name for value in model.graph.output}
        kept = [tensor for tensor in model.graph.initializer if tensor.name in read]
        del model.graph.initializer[:]
        model.graph.initializer.extend(kept)
        path.write_bytes(model.SerializeToString())
    return count


class _Graph:
    def __init__(self, graph: onnx.GraphProto, directory: Path) -> None:
        self._graph, self._directory = graph, directory
        self._constants = {tensor.name: tensor for tensor in graph.initializer}
        self._makers = {name: node for node in graph.node for name in node.output}
        self._readers: dict[str, list[tuple[onnx.NodeProto, int]]] = defaultdict(list)
        for node in graph.node:
            for index, name in enumerate(node.input):
                self._readers[name].append((node, index))
        self._outputs = {value.name for value in graph.output}

    def rewritten(self, quantize: onnx.NodeProto) -> onnx.NodeProto | None:
        """The division to be put before this ``QuantizeLinear``; None, and nothing changed, where it is not legal."""
        scale = self._scalar(quantize) if quantize.op_type == "QuantizeLinear" else None
        if scale is None or quantize.output[0] in self._outputs:
            return None
        dequantizers = [node for node, _ in self._readers[quantize.output[0]]]
        layers = [reader for node in dequantizers for reader in self._readers[node.output[0]]]
        same = all(node.op_type == "DequantizeLinear" and self._scalar(node) == scale for node in dequantizers)
        if not same or not layers or any(node.output[0] in self._outputs for node in dequantizers):
            return None
        weights = [weight for node, index in layers if (weight := self._weight(node, index)) is not None]
        if len(weights) != len(layers):
            return None
        shapes = {self._channels(node) for node, _ in layers}
        if len(shapes) != 1 or None in shapes:
            return None
        for weight in weights:
            self._put(weight, self._array(weight.input[1]) * scale)
        for node in (quantize, *dequantizers):
            self._put(node, np.float32(1))
        shape = next(filter(None, shapes))
        x, divided = quantize.input[0], f"{quantize.output[0]}_divided"
        factor = self._add(f"{quantize.output[0]}_factor", np.full(shape, scale, np.float32))
        quantize.input[0] = divided
        return helper.make_node("Div", [x, factor], [divided], f"{quantize.name or quantize.output[0]}/Div")

    def _scalar(self, node: onnx.NodeProto) -> np.float32 | None:
        """The scale of one number that a node (de)quantizes float32 with, its zero point being 0."""
        tensor = self._constants.get(node.input[1])
        if tensor is None or tensor.data_type != TensorProto.FLOAT or int(np.prod(tensor.dims)) != 1:
            return None
        zero = node.input[2] if len(node.input) > 2 else ""
        if zero and (zero not in self._constants or self._array(zero).any()):
            return None
        return np.float32(self._array(node.input[1]).reshape(()))

    def _weight(self, node: onnx.NodeProto, index: int) -> onnx.NodeProto | None:
        """What dequantizes the weights of this layer, and of no other, in float32; None where the layer is another."""
        if node.op_type not in ("Conv", "Gemm", "MatMul") or index:
            return None
        weight = self._makers.get(node.input[1])
        known = weight is not None and weight.op_type == "DequantizeLinear" and weight.input[0] in self._constants
        if not known or weight is None or len(self._readers[weight.output[0]]) != 1:
            return None
        scale = self._constants.get(weight.input[1])
        return weight if scale is not None and scale.data_type == TensorProto.FLOAT else None

    def _channels(self, node: onnx.NodeProto) -> tuple[int, ...] | None:
        """The shape that a vector over the input channels of a layer has, to broadcast against its input."""
        sizes = list(self._constants[self._makers[node.input[1]].input[0]].dims)
        told = {attribute.name: attribute.i for attribute in node.attribute}
        if node.op_type == "Conv":
            return (sizes[1] * (told.get("group") or 1), *(1 for _ in sizes[2:]))
        if len(sizes) != 2 or told.get("transA"):
            return None
        return (sizes[1] if told.get("transB") else sizes[0],)

    def _put(self, node: onnx.NodeProto, scale: np.ndarray | np.float32) -> None:
        node.input[1] = self._add(f"{node.output[0]}_scale", np.asarray(scale, np.float32))

    def _add(self, name: str, value: np.ndarray) -> str:
        name = next(name for name in _numbered(name) if name not in self._constants and name not in self._makers)
        tensor = numpy_helper.from_array(value, name)
        self._graph.initializer.append(tensor)
        self._constants[name] = tensor
        return name

    def _array(self, name: str) -> np.ndarray:
        tensor = self._constants[name]
        if tensor.data_location == TensorProto.EXTERNAL:
            copied = TensorProto()
            copied.CopyFrom(tensor)
            load_external_data_for_tensor(copied, str(self._directory))
            tensor = copied
        return np.asarray(numpy_helper.to_array(tensor))


def _numbered(name: str) -> Iterator[str]:
    yield name
    yield from (f"{name}_{number}" for number in range(1, 1 << 30))
