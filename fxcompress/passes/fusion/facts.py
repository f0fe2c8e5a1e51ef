"""What rules ask about a graph, each answer computed once: layers, their callers, and who else holds a tensor."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from torch import fx, nn

from fxcompress.graph.queries import GraphIndex
from fxcompress.passes.base import Skip

__all__ = ["Facts", "attribute", "first_input", "tensor_value"]


def tensor_value(node: object) -> torch.Tensor | None:
    """The fake tensor that ``node`` produces; None where it is no node or produces something else."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return value if isinstance(value, torch.Tensor) else None


def first_input(node: fx.Node) -> fx.Node | None:
    """The first argument, where that is a node."""
    first = node.args[0] if node.args else None
    return first if isinstance(first, fx.Node) else None


def attribute(graph_module: fx.GraphModule, path: str) -> Any:
    """The tensor at a dotted path."""
    owner, _, name = path.rpartition(".")
    return getattr(graph_module.get_submodule(owner), name)


class Facts:
    """Facts about one state of a graph. Thrown away after each rewrite of the graph."""

    def __init__(self, graph_module: fx.GraphModule) -> None:
        self.graph_module = graph_module
        self.nodes: tuple[fx.Node, ...] = tuple(graph_module.graph.nodes)
        self._layers: dict[str, nn.Module] = {}

    def layer(self, node: fx.Node) -> nn.Module:
        """The layer that a ``call_module`` node calls."""
        path = str(node.target)
        if path not in self._layers:
            self._layers[path] = self.graph_module.get_submodule(path)
        return self._layers[path]

    def layer_of(self, node: object, *kinds: type[nn.Module]) -> nn.Module | None:
        """The layer that ``node`` calls, if it is exactly one of ``kinds``: a subclass may compute something else."""
        if not isinstance(node, fx.Node) or node.op != "call_module":
            return None
        layer = self.layer(node)
        return layer if type(layer) in kinds else None

    def constant(self, node: object) -> torch.Tensor | None:
        """The tensor that a ``get_attr`` node reads."""
        if not isinstance(node, fx.Node) or node.op != "get_attr":
            return None
        found = attribute(self.graph_module, str(node.target))
        return found if isinstance(found, torch.Tensor) else None

    @cached_property
    def index(self) -> GraphIndex:
        """Who calls which layer and who shares which memory."""
        return GraphIndex(self.graph_module)

    @property
    def calls(self) -> Mapping[str, tuple[fx.Node, ...]]:
        """The nodes that call each layer."""
        return self.index.calls

    def held(self, node: fx.Node) -> list[tuple[str, torch.Tensor]]:
        """Path and tensor of everything that ``node`` holds: a layer's weights, or what a ``get_attr`` reads."""
        if node.op == "call_module":
            layer = self.layer(node)
            named = [*layer.named_parameters(remove_duplicate=False), *layer.named_buffers(remove_duplicate=False)]
            return [(f"{node.target}.{name}", tensor) for name, tensor in named]
        tensor = self.constant(node)
        return [] if tensor is None else [(str(node.target), tensor)]

    def readers(self, path: str) -> list[fx.Node]:
        """Every node that reads memory of the tensor at ``path``, by whatever name or view."""
        return list(dict.fromkeys(reader for user in self.index.users_of(path) for reader in user.nodes))

    def tied(self, site: str, node: fx.Node) -> Skip | None:
        """A skip where a parameter that ``node`` (a layer call or a ``get_attr``) holds is read elsewhere too."""
        for path, tensor in self.held(node):
            if isinstance(tensor, nn.Parameter):
                others = [reader for reader in self.readers(path) if reader is not node]
                others += list(node.users) if node.op == "get_attr" and len(node.users) > 1 else []
                names = [user.path for user in self.index.users_of(path) if user.path != path]
                if others or names:
                    by = " and ".join(map(repr, names or [path]))
                    reason = f"The weight {path!r} is also read as {by}; changing it for one reader would untie it."
                    return Skip(site, "tied_weight", reason, tuple(other.name for other in others))
        return None

    def unshared(self, site: str, node: fx.Node) -> Skip | None:
        """A skip where the layer that ``node`` calls must keep its weights: called elsewhere, tied, or without data."""
        others = tuple(other.name for other in self.calls[str(node.target)] if other is not node)
        if others:
            reason = f"The layer {node.target!r} is called {len(others) + 1} times; its weights serve every call."
            return Skip(site, "shared_layer", reason, others)
        for tensor in self.layer(node).parameters():
            if tensor.device.type == "meta" or type(tensor) is not nn.Parameter:
                reason = f"A weight of {node.target!r} has no plain numbers: it is on the meta device, or packed."
                return Skip(site, "no_data", reason, (node.name,))
        return self.tied(site, node)
