"""From a graph to its dependencies: which indices of which weights must go together, and why some may not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from fxcompress.analysis.dependency import (
    contraction,
    convolution,
    elementwise,
    indexing,
    movement,
    norms,
    recurrent,
    reductions,
    sampling,
    scattering,
    spectral,
)
from fxcompress.analysis.dependency.builder import Builder, Rule
from fxcompress.analysis.dependency.constants import is_constant
from fxcompress.analysis.dependency.layers import layer
from fxcompress.analysis.dependency.layout import dirtied, distinct, inert

__all__ = ["build"]

_RULES: dict[Any, Rule] = {
    **elementwise.RULES,
    **reductions.RULES,
    **movement.RULES,
    **indexing.RULES,
    **contraction.RULES,
    **convolution.RULES,
    **norms.RULES,
    **recurrent.RULES,
    **scattering.RULES,
    **sampling.RULES,
    **spectral.RULES,
}


def build(graph_module: fx.GraphModule, choices: Mapping[str, int] | None = None) -> Builder:
    """Walk the graph once. ``choices`` decides sites where a view splits removable indices in two."""
    builder = Builder(graph_module, dict(choices or {}))
    for node in graph_module.graph.nodes:
        builder.labels.begin(node.name)
        if node.op == "output":
            builder.pin(builder.dims_of_all(node), node.name, "it is an output of the model")
        else:
            builder.values[node] = _layout(builder, node)
    return builder


def _layout(builder: Builder, node: fx.Node) -> Any:
    value = node.meta.get("val")
    if node.op == "placeholder":
        return _inert(value)
    if node.op == "get_attr":
        return _constant(builder, node)
    if not any(isinstance(leaf, torch.Tensor) for leaf in pytree.tree_leaves(value)):
        return None  # sizes and what is computed from them
    if node.op == "call_module":
        return layer(builder, node)
    rule = _RULES.get(node.target)
    if rule is None:
        builder.barrier(node, f"{node.target} has no rule: what it does to channels is not known")
        return _inert(value)
    made = rule(builder, node)
    return distinct(made) if isinstance(made, tuple) else made


def _constant(builder: Builder, node: fx.Node) -> Any:
    path = str(node.target)
    owner, _, name = path.rpartition(".")
    tensor = getattr(builder.graph_module.get_submodule(owner), name)
    trained = isinstance(tensor, nn.Parameter)
    if not trained and not tensor.is_floating_point() and tensor.dtype is not torch.bool:
        return _inert(tensor)  # indices
    layout = builder.weight(path, tensor, layout=(None,) * tensor.dim(), site=node.name)
    if is_constant(builder.graph_module, path):
        return tuple(map(dirtied, layout))  # it is cut with the channels, but nobody can zero it in the model
    return layout


def _inert(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return tuple(inert(size) for size in value.shape)
    if isinstance(value, (tuple, list)):
        return [_inert(item) for item in value]
    return None
