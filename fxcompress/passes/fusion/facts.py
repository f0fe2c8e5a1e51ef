"""What rules ask about a graph, each answer computed once: layers, their callers, and who else holds a tensor."""

from __future__ import annotations

import bisect
from functools import cached_property
from typing import Any

import torch
from torch import fx, nn

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


_Holder = tuple[int, int, str, fx.Node]  # first byte, last byte, path, reader


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
    def calls(self) -> dict[str, list[fx.Node]]:
        """The nodes that call each layer."""
        calls: dict[str, list[fx.Node]] = {}
        for node in self.nodes:
            if node.op == "call_module":
                calls.setdefault(str(node.target), []).append(node)
        return calls

    @cached_property
    def reads(self) -> dict[str, list[fx.Node]]:
        """The ``get_attr`` nodes that read each tensor."""
        reads: dict[str, list[fx.Node]] = {}
        for node in self.nodes:
            if node.op == "get_attr":
                reads.setdefault(str(node.target), []).append(node)
        return reads

    @cached_property
    def _holders(self) -> dict[int, tuple[list[int], list[list[_Holder]]]]:
        # Per storage, the tensors of the graph in clusters whose memory overlaps, and the first byte of each cluster.
        held: dict[int, dict[_Holder, None]] = {}
        for node in self.nodes:
            for path, tensor in self.held(node):
                held.setdefault(_storage(tensor), {})[(*_span(tensor), path, node)] = None
        holders: dict[int, tuple[list[int], list[list[_Holder]]]] = {}
        for storage, found in held.items():
            starts, clusters, reach = holders.setdefault(storage, ([], []))[0], holders[storage][1], -1
            for holder in sorted(found, key=lambda item: item[:2]):
                if holder[0] > reach:
                    starts.append(holder[0])
                    clusters.append([])
                clusters[-1].append(holder)
                reach = max(reach, holder[1])
        return holders

    def held(self, node: fx.Node) -> list[tuple[str, torch.Tensor]]:
        """Path and tensor of everything that ``node`` holds: a layer's weights, or what a ``get_attr`` reads."""
        if node.op == "call_module":
            layer = self.layer(node)
            named = [*layer.named_parameters(remove_duplicate=False), *layer.named_buffers(remove_duplicate=False)]
            return [(f"{node.target}.{name}", tensor) for name, tensor in named]
        tensor = self.constant(node)
        return [] if tensor is None else [(str(node.target), tensor)]

    def readers(self, tensor: torch.Tensor) -> list[tuple[str, fx.Node]]:
        """Path and node of everything that reads memory of ``tensor``, by whatever name or view."""
        starts, clusters = self._holders.get(_storage(tensor), ([], []))
        first, last = _span(tensor)
        index = bisect.bisect_right(starts, first) - 1
        if index < 0:
            return []
        return [(path, node) for start, stop, path, node in clusters[index] if start <= last and stop >= first]

    def tied(self, site: str, node: fx.Node) -> Skip | None:
        """A skip where a parameter that ``node`` (a layer call or a ``get_attr``) holds is read elsewhere too."""
        if node.op == "call_module":
            tensors = [(f"{node.target}.{name}", tensor) for name, tensor in self.layer(node).named_parameters()]
        else:
            held = self.constant(node)
            tensors = [(str(node.target), held)] if isinstance(held, nn.Parameter) else []
        for path, tensor in tensors:
            others = [(other, reader) for other, reader in self.readers(tensor) if (other, reader) != (path, node)]
            if node.op == "get_attr" and len(node.users) > 1:
                others.append((path, node))
            if others:
                names = ", ".join(sorted({repr(other) for other, _ in others}))
                reason = f"The weight {path!r} is also read as {names}; changing it for one reader would untie it."
                return Skip(site, "tied_weight", reason, tuple(dict.fromkeys(reader.name for _, reader in others)))
        return None

    def unshared(self, site: str, node: fx.Node) -> Skip | None:
        """A skip where the layer that ``node`` calls must keep its weights: called elsewhere, tied, or without data."""
        others = tuple(other.name for other in self.calls[str(node.target)] if other is not node)
        if others:
            reason = f"The layer {node.target!r} is called {len(others) + 1} times; its weights serve every call."
            return Skip(site, "shared_layer", reason, others)
        if any(tensor.device.type == "meta" for tensor in self.layer(node).parameters()):
            return Skip(site, "no_data", f"The weights of {node.target!r} are on the meta device.", (node.name,))
        return self.tied(site, node)


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    """First and last byte within the storage."""
    size = tensor.element_size()
    first = int(tensor.storage_offset()) * size
    reach = sum((int(length) - 1) * int(stride) for length, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return first, first + (reach + 1) * size - 1
