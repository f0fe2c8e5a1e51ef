"""Factors written into weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import fx, nn

from fxcompress.analysis.scaling.flow import Scaling
from fxcompress.analysis.scaling.rules import CONVS, NORMS, TRANSPOSED, limits
from fxcompress.graph.edit import GraphEditor

__all__ = ["Factors", "apply_factors"]


class Factors:
    """The factor of each class, float64; class 0 has 1. What makes a channel is divided by it.

    Weights with the factors so far are kept for the paths that were asked for.
    """

    def __init__(self, graph_module: fx.GraphModule, scaling: Scaling) -> None:
        self.graph_module, self.scaling = graph_module, scaling
        self.values = torch.ones(scaling.count, dtype=torch.float64)
        self._weights: dict[str, torch.Tensor] = {}

    def weight(self, path: str) -> torch.Tensor:
        """``[groups, outputs, inputs, positions]`` of a layer, float32, with the factors so far."""
        if path not in self._weights:
            layer: Any = self.graph_module.get_submodule(path)
            self._weights[path] = _blocks(layer, layer.weight.detach()).abs().float().amax(-1)
        return self._weights[path]

    def columns(self, path: str, classes: torch.Tensor) -> torch.Tensor:
        """``[classes]`` largest absolute weight that reads each class, 0 where none does."""
        blocks = self._scaled(path)
        return self._spread(blocks.amax(1).reshape(-1), classes)

    def rows(self, path: str, classes: torch.Tensor) -> torch.Tensor:
        """``[classes]`` largest absolute weight that makes each class: of the row, or of a norm weight and bias."""
        layer = _at(self.graph_module, path)
        if isinstance(layer, (*CONVS, nn.Linear)):
            return self._spread(self._scaled(path).amax(2).reshape(-1), classes)
        tensors = [layer] if isinstance(layer, torch.Tensor) else [layer.weight, getattr(layer, "bias", None)]
        total: Any = sum(tensor.detach().reshape(-1).double().abs() for tensor in tensors if tensor is not None)
        return self._spread(total / self.values[classes], classes)

    def _scaled(self, path: str) -> torch.Tensor:
        """``[groups, outputs, inputs]`` with the factors."""
        blocks = self.weight(path).double()
        groups, outputs, inputs = blocks.shape
        read, made = self.scaling.readers.get(path), self.scaling.makers.get(path)
        if read is not None:
            blocks = blocks * self.values[read].reshape(groups, 1, inputs)
        if made is not None:
            blocks = blocks / self.values[made].reshape(groups, outputs, 1)
        return blocks

    def _spread(self, amounts: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
        found = torch.zeros(self.scaling.count, dtype=torch.float64)
        found.scatter_reduce_(0, classes, amounts.double(), "amax")
        found[0] = 0
        return found


def apply_factors(graph_module: fx.GraphModule, scaling: Scaling, factors: torch.Tensor) -> None:
    """Write factors into weights, and into the limits of clips that they pass; no tensor is written to.

    Args:
        graph_module: as it was analysed; it is changed.
        scaling: what was found.
        factors: ``[classes]``, positive, 1 for class 0.
    """
    with GraphEditor(graph_module) as editor:
        for path, tensor in _scaled_weights(graph_module, scaling, factors):
            editor.set_tensor(path, tensor)
        for node, classes in scaling.clips.items():
            _clip(editor, node, factors[classes])


def _clip(editor: GraphEditor, node: fx.Node, factors: torch.Tensor) -> None:
    """A clip with limits of its own for each channel."""
    if bool((factors == 1).all()):
        return
    value = node.meta["val"]
    args: list[Any] = [node.args[0]]
    for end in limits(node):
        if end is None:
            args.append(None)
            continue
        path = editor.add_tensor(f"{node.name}_limit", (end / factors).to(value.dtype))
        args.append(editor.insert_get(path, before=node, like=node))
    editor.replace(node, editor.insert_call(torch.ops.aten.clamp.Tensor, args, before=node, like=node))


def _scaled_weights(
    graph_module: fx.GraphModule, scaling: Scaling, factors: torch.Tensor
) -> Iterator[tuple[str, torch.Tensor]]:
    """Path and new value of every parameter that factors change; the graph is not changed."""
    for path in _changed((*scaling.makers, *scaling.readers), scaling, factors):
        item = _at(graph_module, path)
        made = factors[scaling.makers[path]] if path in scaling.makers else None
        if isinstance(item, torch.Tensor):
            assert made is not None
            yield path, (item.detach().double() / made.reshape(item.shape)).to(item.dtype)
            continue
        weight = item.weight.detach()
        if isinstance(item, NORMS):
            assert made is not None
            yield f"{path}.weight", (weight.double() / made).to(weight.dtype)
        else:
            blocks = _blocks(item, weight).double()
            groups, outputs, inputs, _ = blocks.shape
            if path in scaling.readers:
                blocks = blocks * factors[scaling.readers[path]].reshape(groups, 1, inputs, 1)
            if made is not None:
                blocks = blocks / made.reshape(groups, outputs, 1, 1)
            yield f"{path}.weight", _unblocked(item, blocks, weight)
        bias = getattr(item, "bias", None)
        if bias is not None and made is not None:
            yield f"{path}.bias", (bias.detach().double() / made).to(bias.dtype)


def _changed(paths: Iterable[str], scaling: Scaling, factors: torch.Tensor) -> Iterator[str]:
    for path in dict.fromkeys(paths):
        sides = (scaling.makers.get(path), scaling.readers.get(path))
        if any(side is not None and bool((factors[side] != 1).any()) for side in sides):
            yield path


def _at(graph_module: fx.GraphModule, path: str) -> Any:
    owner, _, name = path.rpartition(".")
    return getattr(graph_module.get_submodule(owner), name)


def _blocks(layer: Any, weight: torch.Tensor) -> torch.Tensor:
    """``[groups, outputs, inputs, positions]`` of a weight, of one group each."""
    groups = getattr(layer, "groups", 1)
    if isinstance(layer, TRANSPOSED):  # [inputs, outputs of a group, …]
        return weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1).transpose(1, 2)
    return weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)


def _unblocked(layer: Any, blocks: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    if isinstance(layer, TRANSPOSED):
        blocks = blocks.transpose(1, 2)
    return blocks.reshape(weight.shape).to(weight.dtype)
