"""Values that a graph computes from constants alone: permutations, tables of indices."""

from __future__ import annotations

import torch
from torch import fx, nn
from torch.fx.node import map_arg

__all__ = ["constant_value", "is_constant"]

_MOST = 64
"""Nodes that such a value may be computed from."""


def is_constant(graph_module: fx.GraphModule, path: str) -> bool:
    """Whether a tensor is neither a parameter nor a buffer of the model's state: a literal, a mask, a table."""
    owner, _, name = path.rpartition(".")
    module = graph_module.get_submodule(owner)
    return name not in module._parameters and (
        name not in module._buffers or name in module._non_persistent_buffers_set
    )


def constant_value(graph_module: fx.GraphModule, node: fx.Node) -> torch.Tensor | None:
    """The value of ``node`` where it depends on neither inputs nor parameters nor sizes of inputs; None elsewhere."""
    found: dict[fx.Node, torch.Tensor] = {}
    return _evaluate(graph_module, node, found)


def _evaluate(graph_module: fx.GraphModule, node: fx.Node, found: dict[fx.Node, torch.Tensor]) -> torch.Tensor | None:
    if node in found:
        return found[node]
    if node.op == "get_attr":
        owner, _, name = str(node.target).rpartition(".")
        tensor = getattr(graph_module.get_submodule(owner), name)
        return None if isinstance(tensor, nn.Parameter) else tensor.detach().cpu()
    if node.op != "call_function" or len(found) > _MOST or not isinstance(node.target, torch._ops.OpOverload):
        return None
    if torch.Tag.nondeterministic_seeded in node.target.tags:
        return None
    for source in node.all_input_nodes:
        value = _evaluate(graph_module, source, found)
        if value is None:
            return None
        found[source] = value
    args = map_arg(node.args, lambda n: found[n])
    kwargs = map_arg({key: value for key, value in node.kwargs.items() if key != "device"}, lambda n: found[n])
    with torch.no_grad():
        made = node.target(*args, **kwargs)
    return made if isinstance(made, torch.Tensor) else None
