"""Weights and layers cut down to the indices that stay."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import fx, nn

from fxcompress.analysis.dependency.constants import is_constant
from fxcompress.analysis.dependency.recurrent import GATES
from fxcompress.analysis.dependency.removal import Removal
from fxcompress.graph.edit import GraphEditor

__all__ = ["shrink_weights"]


def shrink_weights(
    graph_module: fx.GraphModule, removal: Removal, editor: GraphEditor
) -> dict[str, dict[int, list[int]]]:
    """Cut every weight that loses indices; a tied weight is cut once and stays tied.

    Returns:
        for each weight that changed: dimension → indices kept. Constants of the graph, which have no place in the
        model's state, are cut without being listed.
    """
    kept: dict[str, dict[int, list[int]]] = {}
    made: dict[int, torch.Tensor] = {}
    fresh: dict[str, torch.Tensor] = {}
    for path in removal.builder.weights:
        indices = removal.kept_indices(path)
        if not indices:
            continue
        if not is_constant(graph_module, path):
            kept[path] = {dim: index.tolist() for dim, index in indices.items()}
        owner, _, name = path.rpartition(".")
        old = getattr(graph_module.get_submodule(owner), name)
        if id(old) not in made:
            made[id(old)] = _cut(old, indices)
        fresh[path] = made[id(old)]
    layers: dict[str, dict[str, torch.Tensor]] = {}
    for path, tensor in fresh.items():
        owner, _, name = path.rpartition(".")
        if owner and type(graph_module.get_submodule(owner)) is not nn.Module:
            layers.setdefault(owner, {})[name] = tensor
        else:
            editor.set_tensor(path, tensor)
    for path, tensors in layers.items():
        groups = removal.builder.groups.get(path)
        layer = _refitted(graph_module.get_submodule(path), tensors, removal.kept(groups) if groups else None)
        if isinstance(layer, nn.RMSNorm):
            _recount(layer, graph_module.get_submodule(path), path, removal, editor)
        editor.set_module(path, layer)
    return kept


def _cut(tensor: torch.Tensor, indices: dict[int, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        result = tensor.detach()
        for dim, index in indices.items():
            result = result.index_select(dim, index.to(result.device))
        result = result.contiguous()
    return nn.Parameter(result, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else result


def _recount(layer: nn.RMSNorm, before: nn.Module, path: str, removal: Removal, editor: GraphEditor) -> None:
    """Let a smaller RMS norm divide by the count of channels that there were: ``eps·N/k``, ``weight·√(N/k)``."""
    assert isinstance(before, nn.RMSNorm)
    assert layer.weight is not None
    assert before.weight is not None
    ratio = before.normalized_shape[0] / layer.normalized_shape[0]
    layer.eps = (torch.finfo(layer.weight.dtype).eps if layer.eps is None else layer.eps) * ratio
    if removal.builder.shared(before.weight):  # others need the weight as it is
        for node in [node for node in editor.graph.nodes if node.op == "call_module" and node.target == path]:
            made = editor.insert_call(torch.ops.aten.mul.Tensor, (node, ratio**0.5), after=node, like=node)
            removal.builder.values[made] = removal.builder.values[node]
            editor.replace(node, made)
        return
    layer.weight = nn.Parameter(layer.weight.detach() * ratio**0.5, requires_grad=layer.weight.requires_grad)


def _refitted(layer: nn.Module, tensors: dict[str, torch.Tensor], groups: int | None) -> nn.Module:
    """A copy of a layer with smaller tensors and the attributes that say so."""
    fresh = copy.copy(layer)
    for kind in ("_parameters", "_buffers", "_modules"):
        fresh.__dict__[kind] = dict(layer.__dict__[kind])
    for name, tensor in tensors.items():
        store: Any = fresh._parameters if name in fresh._parameters else fresh._buffers
        store[name] = tensor
    widths: Any = fresh
    if isinstance(fresh, nn.Linear):
        widths.out_features, widths.in_features = fresh.weight.shape
    elif isinstance(fresh, nn.modules.conv._ConvNd):
        if groups is not None:
            widths.groups = int(groups)
        first, second = fresh.weight.shape[0], fresh.weight.shape[1] * fresh.groups
        widths.out_channels, widths.in_channels = (second, first) if fresh.transposed else (first, second)
    elif isinstance(fresh, nn.modules.batchnorm._NormBase):
        widths.num_features = len(next(t for t in (*fresh._parameters.values(), fresh.running_mean) if t is not None))
    elif isinstance(fresh, (nn.LayerNorm, nn.RMSNorm)):
        widths.normalized_shape = tuple(fresh.weight.shape)
    elif isinstance(fresh, nn.GroupNorm):
        widths.num_channels = len(fresh.weight)
        widths.num_groups = int(groups) if groups is not None else fresh.num_groups
    elif isinstance(fresh, nn.Embedding):
        widths.num_embeddings, widths.embedding_dim = fresh.weight.shape
    elif isinstance(fresh, nn.Bilinear):
        widths.out_features, widths.in1_features, widths.in2_features = fresh.weight.shape
    elif isinstance(fresh, nn.PReLU):
        widths.num_parameters = len(fresh.weight)
    elif isinstance(fresh, nn.RNNBase):
        widths.hidden_size = widths.weight_ih_l0.shape[0] // GATES[type(fresh).__name__]
        widths.input_size = widths.weight_ih_l0.shape[1]
        widths.proj_size = widths.weight_hr_l0.shape[0] if fresh.proj_size else 0
        widths._flat_weights = [getattr(fresh, name) for name in fresh._flat_weights_names]
    return fresh
