"""Values inside a model while it runs: of named layers or nodes of a graph, of named modules of any other model.

They are kept as ``[batch, channels, places …]``, whichever way the model has them.
"""

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
_STEPS = 8  # from an operation back to the layer that says where channels are

_CHANNELS_FIRST = (
    nn.modules.conv._ConvNd,
    nn.modules.batchnorm._NormBase,
    nn.GroupNorm,
    nn.PReLU,
    nn.modules.pooling._MaxPoolNd,
    nn.modules.pooling._AvgPoolNd,
    nn.modules.pooling._AdaptiveAvgPoolNd,
    nn.modules.pooling._AdaptiveMaxPoolNd,
)
_CHANNELS_LAST = (nn.Linear, nn.LayerNorm, nn.RMSNorm, nn.Embedding, nn.RNNBase, nn.MultiheadAttention)


class _Tap(nn.Module):
    """Passes on what it gets, and keeps it."""

    def __init__(self, store: dict[str, torch.Tensor], name: str, first: bool | None) -> None:
        super().__init__()
        self.store, self.tapped, self.first = store, name, first

    def forward(self, value: Any) -> Any:
        _keep(self.store, self.tapped, value, self.first)
        return value


@contextmanager
def tapped(model: nn.Module, names: Iterable[str]) -> Iterator[Mapping[str, torch.Tensor]]:
    """Inside, every run of ``model`` leaves the values of ``names`` in the mapping; after it the model is as it was.

    Args:
        model: a captured graph, whose names are layers (of several calls the last) or nodes; or any module, whose
            names are those of ``named_modules()``.
        names: of values that are tensors, or whose first leaf is one. The layer that made a value says which dim its
            channels are; where none does, images and volumes have them first, sequences last.

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
        modules[name].register_forward_hook(
            lambda module, _, value, name=name: _keep(store, name, value, _first(module))
        )
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
        graph_module.add_module(path, _Tap(store, name, _made_first(graph_module, known[name])))
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


def _keep(store: dict[str, torch.Tensor], name: str, value: Any, first: bool | None) -> None:
    found = next((leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)), None)
    if found is not None:
        first = found.dim() != 3 if first is None else first
        store[name] = found if first or found.dim() < 3 else found.movedim(-1, 1)


def _first(module: nn.Module | None) -> bool | None:
    """Whether a layer has channels in dim 1, or last; None where it does not say."""
    if isinstance(module, _CHANNELS_FIRST):
        return True
    return False if isinstance(module, _CHANNELS_LAST) else None


def _made_first(graph_module: fx.GraphModule, node: fx.Node) -> bool | None:
    """The same of a node: of the layer that it is, or that its operation got a value of the same shape from."""
    shape = getattr(node.meta.get("val"), "shape", None)
    for _ in range(_STEPS):
        if node.op == "call_module":
            told = _first(graph_module.get_submodule(str(node.target)))
            if told is not None:
                return told
        if not node.all_input_nodes:
            return None
        node = node.all_input_nodes[0]
        if shape is None or getattr(node.meta.get("val"), "shape", None) != shape:
            return None
    return None
