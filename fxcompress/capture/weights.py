"""The graph's own parameters, and the module tree that holds them under the user's names."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from fxcompress.capture.flatten import Flat
from fxcompress.graph.serialize_layers import build_layer, layer_config

__all__ = ["Weights", "module_tree"]


class Weights:
    """The graph's own parameters: new objects that share memory with the user's, one per user's tensor.

    Only the statistics of norms are copies: a forward pass in training writes into them.
    """

    def __init__(self, flat: Flat) -> None:
        self._flat = flat
        self._made: dict[int, torch.Tensor] = {}
        self._names: dict[int, str] = {}

    def name(self, ours: torch.Tensor) -> str | None:
        """The user's name of one of the graph's tensors; None where only a layer of theirs tells it."""
        return self._names.get(id(ours))

    def theirs(self, name: str) -> torch.Tensor:
        """The user's tensor."""
        return self._flat.tensors[name]

    def get(self, name: str) -> torch.Tensor:
        """The graph's tensor for the user's of this name."""
        tensor = self.of(self.theirs(name))
        self._names.setdefault(id(tensor), name)
        return tensor

    def of(self, theirs: torch.Tensor) -> torch.Tensor:
        """The graph's tensor for one of the user's."""
        if id(theirs) not in self._made:
            if isinstance(theirs, nn.Parameter):
                self._made[id(theirs)] = nn.Parameter(theirs.detach(), requires_grad=theirs.requires_grad)
            else:
                self._made[id(theirs)] = theirs.detach()
        return self._made[id(theirs)]

    def own(self, theirs: torch.Tensor) -> torch.Tensor:
        """A copy of a buffer, one per user's tensor."""
        if id(theirs) not in self._made:
            self._made[id(theirs)] = theirs.detach().clone()
        return self._made[id(theirs)]

    def layer(self, theirs: nn.Module) -> nn.Module:
        """The graph's own layer like one of the user's."""
        config = layer_config(theirs, type(theirs).__name__)
        made = build_layer(config, type(theirs).__name__)
        for name, parameter in theirs.named_parameters(recurse=False):
            setattr(made, name, self.of(parameter))
        for name, buffer in theirs.named_buffers(recurse=False):
            made._buffers[name] = self.own(buffer)
        if isinstance(made, (nn.modules.dropout._DropoutNd, nn.RReLU)):
            made.inplace = False
        return made.eval()


def module_tree(flat: Flat, layers: Mapping[str, nn.Module], weights: Weights) -> nn.Module:
    """A root that holds ``layers`` and every tensor that the graph reads, in the order of the user's ``state_dict``.

    Optimizers know parameters by their order.
    """
    order = {name: index for index, name in enumerate(flat.order)}
    last = len(order)
    reads = dict.fromkeys(str(node.target) for node in flat.graph.find_nodes(op="get_attr"))

    def first(path: str) -> int:
        if path in reads:
            return order.get(path, last)
        held = [*layers[path].named_parameters(), *layers[path].named_buffers()]
        places = [order.get(f"{path}.{name}", order.get(weights.name(tensor) or "", last)) for name, tensor in held]
        return min(places, default=last)

    root = nn.Module()
    for path in sorted({*layers, *reads}, key=lambda path: (first(path), path)):
        owner, name = _owner(root, path)
        if path in layers:
            owner.add_module(name, layers[path])
        # A tensor that a layer holds and the graph also reads directly is there already, and the same object.
        elif name not in owner._parameters and name not in owner._buffers:
            tensor = weights.get(path)
            if isinstance(tensor, nn.Parameter):
                owner.register_parameter(name, tensor)
            else:
                owner.register_buffer(name, tensor, persistent=path not in flat.transient)
    return root


def _owner(root: nn.Module, path: str) -> tuple[nn.Module, str]:
    owner = root
    *parents, name = path.split(".")
    for part in parents:
        if part not in owner._modules:
            owner.add_module(part, nn.Module())
        child = owner._modules[part]
        assert child is not None
        owner = child
    return owner, name
