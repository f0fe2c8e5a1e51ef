"""Values inside a model while it runs: of named layers or nodes of a graph, of named modules of any other model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from fxcompress.errors import OptionError, nearest
from fxcompress.graph.info import GraphInfo

__all__ = ["tapped"]

_PREFIX = "_tap"


class _Tap(nn.Module):
    """Passes on what it gets, and keeps it."""

    def __init__(self, store: dict[str, torch.Tensor], name: str) -> None:
        super().__init__()
        self.store, self.tapped = store, name

    def forward(self, value: Any) -> Any:
        _keep(self.store, self.tapped, value)
        return value


@contextmanager
def tapped(model: nn.Module, names: Iterable[str]) -> Iterator[Mapping[str, torch.Tensor]]:
    """Inside, every run of ``model`` leaves the values of ``names`` in the mapping; after it the model is as it was.

    Args:
        model: a captured graph, whose names are layers (of several calls the last) or nodes; or any module, whose
            names are those of ``named_modules()``.
        names: of values that are tensors, or whose first leaf is one.

    Raises:
        OptionError: a name is unknown; the nearest is suggested.
    """
    store: dict[str, torch.Tensor] = {}
    wanted = list(dict.fromkeys(names))
    if not wanted:
        yield store
        return
    if isinstance(model, fx.GraphModule) and isinstance(model.meta.get("fxcompress"), GraphInfo):
        with _in_graph(model, wanted, store):
            yield store
        return
    modules = {name: module for name, module in model.named_modules() if name}
    for name in wanted:
        if name not in modules:
            raise OptionError(f"the teacher has no module {name!r}", where="features", remedy=nearest(name, modules))
    handles = [
        modules[name].register_forward_hook(lambda _, __, value, name=name: _keep(store, name, value))
        for name in wanted
    ]
    try:
        yield store
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _in_graph(graph_module: fx.GraphModule, names: list[str], store: dict[str, torch.Tensor]) -> Iterator[None]:
    """Nodes that nobody reads, put behind those of interest and taken out again."""
    of_layer = {str(node.target): node for node in graph_module.graph.find_nodes(op="call_module")}
    of_node = {node.name: node for node in graph_module.graph.nodes if node.op != "output"}
    known = {**of_node, **of_layer}
    for name in names:
        if name not in known:
            raise OptionError(f"the graph has no layer or node {name!r}", where="features", remedy=nearest(name, known))
    added: list[fx.Node] = []
    for index, name in enumerate(names):
        path = f"{_PREFIX}{index}"
        graph_module.add_module(path, _Tap(store, name))
        with graph_module.graph.inserting_after(known[name]):
            added.append(graph_module.graph.call_module(path, (known[name],)))
    graph_module.recompile()
    try:
        yield
    finally:
        for node in added:
            graph_module.graph.erase_node(node)
            delattr(graph_module, str(node.target))
        graph_module.recompile()


def _keep(store: dict[str, torch.Tensor], name: str, value: Any) -> None:
    found = next((leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)), None)
    if found is not None:
        store[name] = found
