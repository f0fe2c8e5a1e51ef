"""The same graph in another floating-point precision."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from fxcompress.graph.copying import copy_graph
from fxcompress.graph.info import info
from fxcompress.graph.shapes import propagate

__all__ = ["cast_graph", "cast_leaves"]


def cast_graph(graph_module: fx.GraphModule, dtype: torch.dtype) -> fx.GraphModule:
    """A copy whose parameters, buffers, inputs and explicit casts of real floating-point dtypes are ``dtype``.

    The given graph and its weights are left as they are. Tied weights stay tied.
    """
    copied = copy_graph(graph_module)
    made: dict[int, torch.Tensor] = {}

    def cast(tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.is_floating_point():
            return tensor
        if id(tensor) not in made:
            fresh = tensor.detach().to(dtype)
            trains = tensor.requires_grad
            made[id(tensor)] = nn.Parameter(fresh, trains) if isinstance(tensor, nn.Parameter) else fresh
        return made[id(tensor)]

    for module in copied.modules():
        for store in (module._parameters, module._buffers):
            for name, tensor in store.items():
                if tensor is not None:
                    store[name] = cast(tensor)  # type: ignore[assignment]
        if isinstance(module, nn.RNNBase):
            module._flat_weights = [getattr(module, name) for name in module._flat_weights_names]
    mode = info(copied).fake_mode
    for node in copied.graph.nodes:
        if node.op == "placeholder":
            value = node.meta.get("val")
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                with mode:
                    node.meta["val"] = value.to(dtype)
        elif node.op == "call_function":
            node.args = pytree.tree_map_only(torch.dtype, lambda given: _cast_dtype(given, dtype), node.args)
            node.kwargs = pytree.tree_map_only(torch.dtype, lambda given: _cast_dtype(given, dtype), node.kwargs)
    propagate(copied)
    copied.recompile()
    return copied


def cast_leaves(leaves: list[Any], dtype: torch.dtype) -> list[Any]:
    """Inputs or outputs with every floating-point tensor in ``dtype``."""
    return [leaf.to(dtype) if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() else leaf for leaf in leaves]


def _cast_dtype(given: torch.dtype, dtype: torch.dtype) -> torch.dtype:
    return dtype if given.is_floating_point else given
