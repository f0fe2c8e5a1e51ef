"""What every node produces after a removal, read off the layouts: no operation has to be run on fake tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fxcompress.analysis.dependency.layout import Dim, Layout, blocks
from fxcompress.analysis.dependency.removal import Removal
from fxcompress.graph.info import info

__all__ = ["values_after"]


def values_after(graph_module: fx.GraphModule, removal: Removal) -> dict[fx.Node, Any]:
    """New fake values of all nodes that lose indices."""
    found: dict[fx.Node, Any] = {}
    known: dict[Any, torch.Tensor] = {}  # nodes of one shape share one fake tensor: to make it is what takes time
    with info(graph_module).fake_mode:
        for node in graph_module.graph.nodes:
            layout = removal.builder.values.get(node)
            if layout is not None:
                value = _after(node.meta["val"], layout, removal, known)
                if value is not node.meta["val"]:
                    found[node] = value
    return found


def _after(value: Any, layout: Any, removal: Removal, known: dict[Any, torch.Tensor]) -> Any:
    if isinstance(value, (tuple, list)):
        made = [_after(item, part, removal, known) for item, part in zip(value, layout, strict=True)]
        return value if all(a is b for a, b in zip(made, value, strict=True)) else type(value)(made)
    return _tensor_after(value, layout, removal, known)


def _tensor_after(
    value: torch.Tensor, layout: Layout, removal: Removal, known: dict[Any, torch.Tensor]
) -> torch.Tensor:
    touched = [removal.touches(dim) for dim in layout]
    if not any(touched):
        return value
    sizes: list[Any] = list(value.shape)
    for index, dim in enumerate(layout):
        if touched[index]:
            kept = removal.kept(dim)
            sizes[index] = kept if isinstance(kept, int) else _scaled(sizes[index], dim, removal)
    named = tuple(size.node.expr if isinstance(size, torch.SymInt) else size for size in sizes)
    key = named, value.dtype, value.device
    if key not in known:
        known[key] = torch.empty(sizes, dtype=value.dtype, device=value.device)
    return known[key]


def _scaled(size: Any, dim: Dim, removal: Removal) -> Any:
    """A symbolic size, of which a share stays: of batch times channels, say."""
    for block in blocks(dim):
        gone = removal.removed[block.labels]
        size = size // gone.size * int((~gone).sum())
    return size
