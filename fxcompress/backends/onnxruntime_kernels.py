"""Which operations of a graph ONNX Runtime computes in integers: read from the graph as it runs it, not as it was sent.

An operator that fuses with the quantization around it keeps its name, and with it the node of the captured graph that
it came from. So the optimized graph tells for each layer, product and residual addition what kernel runs it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import onnx
import torch
from torch import fx, nn

from fxcompress.analysis.cost import node_costs
from fxcompress.graph.queries import module_of
from fxcompress.quantization.fake_quant import Quantizer
from fxcompress.quantization.integer_layers import BlockLinear, DynamicLinear
from fxcompress.quantization.layers import QUANTIZED

__all__ = ["integer_share", "is_quantized"]

aten = torch.ops.aten

_INTEGER_KERNELS = {
    "QLinearConv",
    "QGemm",
    "QLinearMatMul",
    "QLinearAdd",
    "ConvInteger",
    "ConvIntegerToFloat",
    "MatMulInteger",
    "MatMulIntegerToFloat",
    "DynamicQuantizeMatMul",
    "DynamicQuantizeLSTM",
    "QAttention",
}
_PRODUCTS = ("MatMul", "Gemm", "MatMulInteger", "MatMulNBits", "Einsum")
_OPERATORS = {  # what computes an operation of each kind in an ONNX file
    "convolution": ("Conv", "ConvTranspose", "ConvInteger"),
    "linear": _PRODUCTS,
    "matrix product": _PRODUCTS,
    "recurrent": ("LSTM", "GRU", "RNN", "DynamicQuantizeLSTM"),
    "residual addition": ("Add",),
}
_PASSED_ON = {
    aten.add.Tensor,
    aten.cat.default,
    aten.clone.default,
    aten.expand.default,
    aten.flatten.using_ints,
    aten.permute.default,
    aten.reshape.default,
    aten.roll.default,
    aten.transpose.int,
    aten.view.default,
}
_CONVOLUTIONS = re.compile(r"aten\.(conv\d?d?|conv_transpose\dd|convolution)\b")
_COPY = re.compile(
    r"_token_\d+$"
)  # what ONNX Runtime appends to the name of an operator that it puts in another's place


@dataclass(frozen=True)
class _Operation:
    node: fx.Node
    kind: str
    site: str
    macs: int


def is_quantized(graph_module: fx.GraphModule) -> bool:
    """Whether the graph has stubs, or layers that hold integers."""
    kinds = (Quantizer, DynamicLinear, BlockLinear)
    return any(isinstance(module, kinds) for module in graph_module.modules())


def integer_share(
    graph_module: fx.GraphModule,
    exported: Iterable[onnx.NodeProto],
    optimized: Iterable[onnx.NodeProto],
    sources: Mapping[str, str],
) -> dict[str, Any]:
    """Count what runs in integers.

    Args:
        graph_module: what was lowered.
        exported: nodes of the ONNX file.
        optimized: nodes of the graph that ONNX Runtime made of it.
        sources: name of an ONNX node → name of the node of ``graph_module`` that it came from.

    Returns:
        ``kinds``: for each kind of operation ``kind``, ``count``, ``integer`` (how many of them run in integers),
        ``macs`` and ``integer_macs`` at batch 1; ``left``: for each that does not ``site``, ``kind``, ``macs`` and
        ``reason``. Plain values.
    """
    kernels = {_COPY.sub("", node.name): node.op_type for node in optimized if node.op_type in _INTEGER_KERNELS}
    held: dict[str, list[onnx.NodeProto]] = {}
    for written in exported:
        held.setdefault(sources.get(written.name, ""), []).append(written)
    kinds: dict[str, dict[str, Any]] = {}
    left: list[dict[str, Any]] = []
    for operation in _operations(graph_module):
        own = [node for node in held.get(operation.node.name, ()) if node.op_type in _OPERATORS[operation.kind]]
        if not own:  # computed beforehand, or fused away
            continue
        # Two products of one attention may differ; each has half of what it multiplies.
        whole = [node for node in own if node.op_type in _INTEGER_KERNELS or node.name in kernels]
        share = len(whole) / len(own)
        row = kinds.setdefault(
            operation.kind, {"kind": operation.kind, "count": 0, "integer": 0, "macs": 0, "integer_macs": 0}
        )
        row["count"] += 1
        row["integer"] += share == 1
        row["macs"] += operation.macs
        row["integer_macs"] += round(operation.macs * share)
        if share < 1:
            reason = _reason(graph_module, operation)
            macs = round(operation.macs * (1 - share))
            left.append({"site": operation.site, "kind": operation.kind, "macs": macs, "reason": reason})
    order = list(_OPERATORS)
    return {"kinds": sorted(kinds.values(), key=lambda row: order.index(row["kind"])), "left": left}


def _operations(graph_module: fx.GraphModule) -> list[_Operation]:
    costs = {item.node: item.macs or 0 for item in node_costs(graph_module)}
    moving: set[fx.Node] = set()  # what depends on the inputs
    found = []
    for node in graph_module.graph.nodes:
        if node.op == "placeholder" or any(source in moving for source in node.all_input_nodes):
            moving.add(node)
        kind = _kind(graph_module, node, costs.get(node.name, 0), moving)
        if kind is not None:
            site = str(node.target) if node.op == "call_module" else node.name
            found.append(_Operation(node, kind, site, costs.get(node.name, 0)))
    return found


def _kind(graph_module: fx.GraphModule, node: fx.Node, macs: int, moving: set[fx.Node]) -> str | None:
    layer = module_of(graph_module, node)
    if layer is not None:
        if isinstance(layer, nn.modules.conv._ConvNd):
            return "convolution"
        if isinstance(layer, (nn.Linear, DynamicLinear, BlockLinear)):
            return "linear"
        return "recurrent" if isinstance(layer, nn.RNNBase) else None
    if node.op != "call_function":
        return None
    if node.target is aten.add.Tensor:
        sides = [source for source in node.all_input_nodes if source in moving]
        shapes = {tuple(map(str, side.meta["val"].shape)) for side in sides}
        return "residual addition" if len(sides) == 2 and len(shapes) == 1 else None
    if not macs:
        return None
    if _CONVOLUTIONS.match(str(node.target)):
        return "convolution"
    return "linear" if node.target is aten.linear.default else "matrix product"


def _reason(graph_module: fx.GraphModule, operation: _Operation) -> str:
    node = operation.node
    layer = module_of(graph_module, node)
    if isinstance(layer, BlockLinear):
        return f"its weight is stored in {layer.bits} bits; it computes in floating point"
    if operation.kind in ("convolution", "linear", "recurrent") and not isinstance(layer, tuple(QUANTIZED.values())):
        return "the layer was not quantized"
    if operation.kind == "matrix product":
        return "a product of two activations, which was not quantized"
    stubs = [isinstance(module_of(graph_module, source), Quantizer) for source in node.all_input_nodes]
    if not all(stubs):
        told = "what it adds is not quantized" if not any(stubs) else "only one of its inputs is quantized"
        makers = _makers(graph_module, node)
        if makers:
            told += f": it comes from what computes in floating point ({', '.join(makers)})"
        readers = sorted({_named(graph_module, user) for user in node.users} - {"add"})
        return f"{told}; {', '.join(readers)} reads it" if readers else told
    if not _is_rounded(graph_module, node):
        return "what it gives is not quantized"
    return "ONNX Runtime has no integer kernel for it there"


def _makers(graph_module: fx.GraphModule, addition: fx.Node) -> list[str]:
    """What in floating point the values of an addition come from, through other additions and what only moves them."""
    found: set[str] = set()
    seen: set[fx.Node] = set()
    waiting = list(addition.all_input_nodes)
    while waiting:
        node = waiting.pop()
        if node in seen or not isinstance(node.meta.get("val"), torch.Tensor):
            continue
        if isinstance(module_of(graph_module, node), (Quantizer, *QUANTIZED.values())):
            continue
        seen.add(node)
        if node.target in _PASSED_ON:
            waiting += node.all_input_nodes
        else:
            found.add(_named(graph_module, node))
    return sorted(found)


def _named(graph_module: fx.GraphModule, node: fx.Node) -> str:
    """What kind of operation a node is."""
    layer = module_of(graph_module, node)
    if layer is not None:
        return "rounding" if isinstance(layer, Quantizer) else type(layer).__name__
    if node.op == "call_function":
        return str(node.target).removeprefix("aten.").partition(".")[0]
    return {"placeholder": "an input", "get_attr": "a parameter", "output": "the output"}[node.op]


def _is_rounded(graph_module: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a stub reads the node, directly or behind a clip."""
    readers = list(node.users)
    readers += [behind for reader in readers if reader.op == "call_function" for behind in reader.users]
    return any(isinstance(module_of(graph_module, reader), Quantizer) for reader in readers)
