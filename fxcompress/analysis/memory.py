"""The most bytes of activations alive at once, from when each value is made and last read.

The nodes run in graph order. A value is alive from the node that makes it to the last that reads it, an input from the
start to its last reader, an output to the end; while a node runs, its inputs and its result are alive. Views share the
memory of what they show. Weights, buffers and constants do not count, nor does what a kernel needs for itself.
Engines that write results over inputs they no longer need stay below this figure.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx, nn

from fxcompress.analysis.sizes import GraphSizes
from fxcompress.graph.info import tensors_of
from fxcompress.graph.queries import module_of

__all__ = ["activation_peak"]

aten = torch.ops.aten

_CONVERSIONS = {aten.to.device, aten.to.dtype, aten.to.other, aten.to.dtype_layout}
_RESHAPES = {aten.reshape.default, aten.reshape_as.default, aten.flatten.using_ints, aten.ravel.default}


def activation_peak(graph_module: fx.GraphModule, sizes: GraphSizes) -> int:
    """Bytes; see the module's text for what is counted.

    Args:
        graph_module: a captured graph with shapes.
        sizes: numbers for its symbolic sizes.
    """
    nodes: list[fx.Node] = list(graph_module.graph.nodes)
    owner: dict[fx.Node, fx.Node | None] = {}  # whose memory a node's value lies in; None is a weight's
    last: dict[fx.Node, int] = {}
    for index, node in enumerate(nodes):
        source = _shown(graph_module, node, sizes)
        if node.op == "get_attr":
            owner[node] = None
        else:
            owner[node] = owner[source] if source is not None else node
        for value in [*node.all_input_nodes, node]:
            held = owner[value]
            if held is not None:
                last[held] = len(nodes) if node.op == "output" else index
    dying: dict[int, list[fx.Node]] = {}
    for node, index in last.items():
        dying.setdefault(index, []).append(node)
    length = {node: sum(map(sizes.bytes_of, tensors_of(node.meta.get("val")))) for node in last}
    alive = peak = sum(length[node] for node in nodes if node.op == "placeholder")
    for index, node in enumerate(nodes):
        if owner[node] is node and node.op != "placeholder":
            alive += length[node]
            peak = max(peak, alive)
        alive -= sum(length[dead] for dead in dying.get(index, ()))
    return peak


def _shown(graph_module: fx.GraphModule, node: fx.Node, sizes: GraphSizes) -> fx.Node | None:
    """The input whose memory the result of ``node`` is a view of; None where it has memory of its own."""
    source = next(iter(node.all_input_nodes), None)
    if source is None or node.op == "output":
        return None
    if node.op == "call_module":
        module = module_of(graph_module, node)
        idle = isinstance(module, nn.modules.dropout._DropoutNd) and not module.training
        return source if idle or isinstance(module, nn.Identity) else None
    if node.target is operator.getitem:
        return source
    if not isinstance(node.target, torch._ops.OpOverload):
        return None
    returns, arguments = node.target._schema.returns, node.target._schema.arguments
    if not returns or returns[0].alias_info is None or not arguments or arguments[0].alias_info is None:
        return None
    return None if _copies(node, source, sizes) else source


def _copies(node: fx.Node, source: fx.Node, sizes: GraphSizes) -> bool:
    """Whether an operation that may give a view has to copy."""
    given, made = source.meta["val"], node.meta["val"]
    if node.target in _CONVERSIONS:
        return bool(given.dtype != made.dtype or given.device != made.device or node.kwargs.get("copy"))
    if node.target in _RESHAPES or node.target is aten.contiguous.default:
        layout = torch.empty_strided(sizes.of(given), sizes.strides(given), dtype=torch.uint8, device="meta")
        if node.target is aten.contiguous.default:
            wanted: Any = node.kwargs.get("memory_format", torch.contiguous_format)
            return not layout.is_contiguous(memory_format=wanted)
        return layout.reshape(sizes.of(made)).untyped_storage()._cdata != layout.untyped_storage()._cdata
    return False
