"""Copies of a graph that share its weights: what a pass may edit without touching the graph it was given."""

from __future__ import annotations

import copy

from torch import fx, nn

from fxcompress.graph.info import assemble, info

__all__ = ["copy_graph"]


def copy_graph(graph_module: fx.GraphModule) -> fx.GraphModule:
    """A copy with its own nodes and module tree that shares every weight with ``graph_module``.

    Module objects are shallow copies: replacing a tensor in the copy leaves the other graph as it was.
    """
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    output = graph.graph_copy(graph_module.graph, mapping)
    graph.output(output)
    copied = assemble(_shallow_tree(graph_module), graph, copy.deepcopy(info(graph_module)))
    copied.training = graph_module.training
    copied.meta = {**graph_module.meta, **copied.meta}
    return copied


def _shallow_tree(module: nn.Module, memo: dict[int, nn.Module] | None = None) -> nn.Module:
    memo = {} if memo is None else memo
    if id(module) in memo:
        return memo[id(module)]
    is_root = isinstance(module, fx.GraphModule)
    copied = nn.Module() if is_root else module.__class__.__new__(module.__class__)
    memo[id(module)] = copied
    kinds = ("_parameters", "_buffers", "_non_persistent_buffers_set")
    attributes = {kind: module.__dict__[kind] for kind in kinds} if is_root else module.__dict__
    for name, value in attributes.items():
        # Registries, of hooks too, and a recurrent layer's list of weights are changed in place.
        copied.__dict__[name] = value.copy() if isinstance(value, (dict, list, set)) else value
    children = {name: _shallow_tree(child, memo) for name, child in module._modules.items() if child is not None}
    copied.__dict__["_modules"] = children
    return copied
