"""Grids for each channel of what depthwise convolutions read, at no cost.

Engines have one scale for an activation, and a channel with a hundredth of the range of another is left with two or
three steps. Where only depthwise convolutions read the channels, each can be made a_c times larger by the layer that
makes it, and the convolution's kernel for it a_c times smaller: the function stays, weights have a scale for each
channel anyway, and all channels fill the grid.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import fx, nn

from fxcompress.analysis.scaling import Factors, apply_factors, scaling
from fxcompress.analysis.statistics import Range, collect
from fxcompress.graph.copying import copy_graph
from fxcompress.graph.edit import GraphEditor
from fxcompress.graph.queries import calls_of
from fxcompress.quantization.fake_quant import Quantizer

__all__ = ["equalize_depthwise", "without_limits"]

aten = torch.ops.aten

_LEAST = 1e-3  # range of a channel, relative to the largest, that is still brought up to it


def equalize_depthwise(
    graph_module: fx.GraphModule,
    data: Iterable[Any],
    *,
    limit: int | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> list[str]:
    """Bring the channels that depthwise convolutions read to one range. What the graph computes stays the same.

    Clips between the layers get limits for each channel; :func:`without_limits` takes out those that grids repeat.

    Args:
        graph_module: before stubs are placed; it is changed.
        data: batches for the ranges.
        limit: most batches to read.
        progress: called with (done, total, what).

    Returns:
        paths of the convolutions.
    """
    found = scaling(graph_module, clips=True)
    groups = [group for group in found.groups if all(_is_depthwise(graph_module, item.path) for item in group.readers)]
    if not groups:
        return []
    nodes = {item.path: calls_of(graph_module, item.path) for group in groups for item in group.readers}
    kinds = {path: Range("input", -1 - len(_layer(graph_module, path).kernel_size)) for path in nodes}
    requests = {node.name: kinds[path] for path, calls in nodes.items() for node in calls}
    ranges = collect(graph_module, data, requests, limit=limit, progress=progress)
    factors = Factors(graph_module, found)
    for group in groups:
        reach = torch.zeros(found.count, dtype=torch.float64)
        for item in group.readers:
            for node in nodes[item.path]:
                low, high = ranges[node.name, kinds[item.path]]
                reach.scatter_reduce_(0, item.classes, torch.maximum(-low, high).cpu(), "amax")
        own = reach[group.classes]
        largest = own.max()
        if float(largest) > 0:
            own = torch.where(own > 0, own, largest) / largest
            factors.values[group.classes] = own.clamp_min(_LEAST)
    apply_factors(graph_module, found, factors.values)
    moved = [group for group in groups if bool((factors.values[group.classes] != 1).any())]
    return list(dict.fromkeys(item.path for group in moved for item in group.readers))


def without_limits(graph_module: fx.GraphModule) -> fx.GraphModule:
    """For engines, which fuse a relu: a clip with limits for each channel is one where its grid ends before them.

    Without the grid the network needs its limits, so it keeps them until then.

    Args:
        graph_module: with calibrated stubs; left as it is.

    Returns:
        a copy, or the graph itself where there is no such clip.
    """
    if not graph_module.graph.find_nodes(op="call_function", target=aten.clamp.Tensor):
        return graph_module
    graph_module = copy_graph(graph_module)
    with GraphEditor(graph_module) as editor:
        for node in graph_module.graph.find_nodes(op="call_function", target=aten.clamp.Tensor):
            low, high = (_constant(graph_module, end) for end in (*node.args, None)[1:3])  # one may be left out
            (user, *others) = node.users or (None,)
            if low is None or high is None or others or user is None or user.op != "call_module":
                continue
            stub = graph_module.get_submodule(str(user.target))
            if not isinstance(stub, Quantizer) or not stub.enabled or bool(low.any()):
                continue
            last = (stub.kind.maximum - stub.zero_point) * stub.scale
            if bool((high > last - stub.scale / 2).all()):  # what is cut there rounds to the last integer either way
                editor.retarget(node, aten.relu.default, (node.args[0],))
    return graph_module


def _is_depthwise(graph_module: fx.GraphModule, path: str) -> bool:
    layer = _layer(graph_module, path)
    return type(layer) in (nn.Conv1d, nn.Conv2d, nn.Conv3d) and layer.groups == layer.in_channels > 1


def _layer(graph_module: fx.GraphModule, path: str) -> Any:
    return graph_module.get_submodule(path)


def _constant(graph_module: fx.GraphModule, node: Any) -> torch.Tensor | None:
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        return None
    owner, _, name = str(node.target).rpartition(".")
    found: torch.Tensor = getattr(graph_module.get_submodule(owner), name)
    return found
