"""Products of matrices that are no layers, on inputs rounded anew in every call."""

from __future__ import annotations

from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import fx, nn

from fxcompress.graph.edit import GraphEditor
from fxcompress.graph.queries import is_tied
from fxcompress.quantization.integer_layers import DynamicLinear
from fxcompress.quantization.operators import dynamic_matmul

__all__ = ["Product", "product_sites"]

aten = torch.ops.aten

_PRODUCTS = {aten.matmul.default, aten.bmm.default, aten.mm.default}


@dataclass(frozen=True)
class Product:
    """A call of ``matmul``.

    Attributes:
        node: the call.
        weight: its second operand if that is a parameter ``[in, out]``, which becomes a layer's weight.
    """

    node: fx.Node
    weight: torch.Tensor | None

    def write(self, editor: GraphEditor) -> str:
        """Put the quantized form in the place of the call; gives what it became."""
        left, right = self.node.args
        if self.weight is None:
            made = editor.insert_call(dynamic_matmul, (left, right), before=self.node, like=self.node)
            editor.replace(self.node, made)
            return "both sides rounded in each call"
        inputs, outputs = self.weight.shape
        layer = nn.Linear(inputs, outputs, bias=False, device="meta")
        layer.weight = nn.Parameter(self.weight.detach().T, requires_grad=False)
        path = editor.add_module(f"{self.node.name}_linear", DynamicLinear.of(layer))
        editor.replace(self.node, editor.insert_module(path, (left,), before=self.node, like=self.node))
        return "int8 parameter, inputs rounded in each call"


def product_sites(graph_module: fx.GraphModule) -> tuple[dict[str, Product], dict[str, tuple[str, str]]]:
    """Products that can be quantized, by the name of the node; and of what cannot, code and reason."""
    found: dict[str, Product] = {}
    left: dict[str, tuple[str, str]] = {}
    for node in graph_module.graph.find_nodes(op="call_function", target=aten.scaled_dot_product_attention.default):
        left[node.name] = ("attention", "attention as one operation has its products inside")
    for node in graph_module.graph.nodes:
        if node.op != "call_function" or node.target not in _PRODUCTS:
            continue
        values = [side.meta.get("val") for side in node.args]
        fits = all(isinstance(v, torch.Tensor) and v.dtype == torch.float32 and v.dim() >= 2 for v in values)
        weights = [side.op == "get_attr" for side in node.args]
        if not fits:
            left[node.name] = ("dtype", "it is no product of two float32 matrices")
        elif weights[0]:
            left[node.name] = ("parameter_first", "its first operand is a parameter")
        elif not weights[1]:
            found[node.name] = Product(node, None)
        else:
            right: Any = node.args[1]
            weight = attrgetter(str(right.target))(graph_module)
            if weight.dim() != 2 or len(right.users) > 1 or is_tied(graph_module, str(right.target)):
                left[node.name] = ("shared_weight", "its parameter is no matrix, or something else reads it too")
            else:
                found[node.name] = Product(node, weight)
    return found, left
