"""An ONNX graph as the importability check reads it: types, small constants, the layers its nodes came from."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper
from onnx.external_data_helper import load_external_data_for_tensor

from fxcompress.backends.tensorrt_operators import QDQ, QUANTIZING
from fxcompress.backends.tensorrt_sizes import sizes_from_values

__all__ = ["Graph", "attribute", "layer_of", "text"]


def layer_of(node_name: str) -> str:
    """The PyTorch layer in a node's name, as :mod:`fxcompress.backends.onnx_cleanup` gives them."""
    return node_name.rpartition("/")[0]


class Graph:
    """Types and small constants of a model, those of the graphs inside it included."""

    def __init__(self, model: onnx.ModelProto, directory: Path) -> None:
        self.model, self.directory = model, directory
        self.ends = {value.name for value in (*model.graph.input, *model.graph.output)}
        self.nodes: list[onnx.NodeProto] = []
        self.near: dict[str, list[str]] = {}
        self.dequantized: dict[str, list[str]] = {}
        self.named: Counter[str] = Counter()
        self.types: dict[str, int] = {}
        self.constants: dict[str, TensorProto] = {}
        self.readers: dict[str, set[str]] = {}
        self._take(model.graph)
        sizes = sizes_from_values(model.graph.input, self.nodes, set(self.constants))
        self.sizes = {id(self.nodes[index]): told for index, told in sizes.items()}

    def _take(self, graph: onnx.GraphProto) -> None:
        for value in (*graph.input, *graph.value_info, *graph.output):
            self.types[value.name] = value.type.tensor_type.elem_type
        for tensor in graph.initializer:
            self.types[tensor.name], self.constants[tensor.name] = tensor.data_type, tensor
        for node in graph.node:
            self.nodes.append(node)
            self.named[node.name] += 1
            for name in node.input:
                self.readers.setdefault(name, set()).add(node.op_type)
            for name in (*node.input, *node.output):
                if layer_of(node.name):
                    self.near.setdefault(name, []).append(layer_of(node.name))
            if node.op_type in QDQ:
                self.dequantized.setdefault(node.input[0], []).append(node.output[0])
            for attribute in node.attribute:
                if node.op_type == "Constant" and attribute.name == "value":
                    self.types[node.output[0]], self.constants[node.output[0]] = attribute.t.data_type, attribute.t
                for inner in (attribute.g, *attribute.graphs) if attribute.HasField("g") else attribute.graphs:
                    self._take(inner)

    def type_of(self, node: onnx.NodeProto, index: int) -> int:
        """The type of an input of a node, 0 if it is absent or unknown."""
        return self.types.get(node.input[index], 0) if index < len(node.input) else 0

    def layer(self, node: onnx.NodeProto) -> str:
        """The PyTorch layer of a node; of quantization under another name, that of a neighbour, what reads it first."""
        if layer_of(node.name) or node.op_type not in QUANTIZING:
            return layer_of(node.name)
        names, ends = [*node.output], list(node.input[:1])
        for name in names:  # a quantized value is read by what dequantizes it, and that by the layer
            names += [made for made in self.dequantized.get(name, ()) if made not in names]
        return next((layer for name in (*names, *ends) for layer in self.near.get(name, ())), "")

    def constant(self, node: onnx.NodeProto, index: int) -> np.ndarray | None:
        """The value of an input of a node; None if it is absent or no constant."""
        tensor = self.constants.get(node.input[index]) if index < len(node.input) else None
        if tensor is None:
            return None
        if tensor.data_location == TensorProto.EXTERNAL:
            copied = TensorProto()
            copied.CopyFrom(tensor)
            load_external_data_for_tensor(copied, str(self.directory))
            tensor = copied
        return numpy_helper.to_array(tensor)


def attribute(node: onnx.NodeProto, name: str, default: int) -> int:
    """A number that a node has as attribute."""
    return next((int(a.i) for a in node.attribute if a.name == name), default)


def text(node: onnx.NodeProto, name: str) -> str:
    """A text that a node has as attribute; empty where it has none."""
    return next((a.s.decode() for a in node.attribute if a.name == name), "")
