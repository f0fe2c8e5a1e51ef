"""A graph on another device for as long as it trains, and back where it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import fx
from torch.utils import _pytree as pytree

__all__ = ["device_of", "on_device"]


def device_of(graph_module: fx.GraphModule) -> torch.device:
    """Where its first parameter or buffer is; the CPU for a graph without any."""
    tensors = [*graph_module.parameters(), *graph_module.buffers()]
    return tensors[0].device if tensors else torch.device("cpu")


@contextmanager
def on_device(graph_module: fx.GraphModule, device: torch.device) -> Iterator[None]:
    """Inside, weights and what the graph itself makes (``arange``, masks) are on ``device``; parameters stay the same
    objects. The weights must be the graph's own.
    """
    home = device_of(graph_module)
    if home == device:
        yield
        return
    written = [
        (node, node.args, node.kwargs)
        for node in graph_module.graph.nodes
        if node.op == "call_function"
        and any(isinstance(leaf, torch.device) for leaf in pytree.tree_leaves((node.args, node.kwargs)))
    ]
    for node, args, kwargs in written:
        node.args = pytree.tree_map_only(torch.device, lambda _: device, args)
        node.kwargs = pytree.tree_map_only(torch.device, lambda _: device, kwargs)
    graph_module.recompile()
    graph_module.to(device)
    try:
        yield
    finally:
        graph_module.to(home)
        for node, args, kwargs in written:
            node.args, node.kwargs = args, kwargs
        graph_module.recompile()
