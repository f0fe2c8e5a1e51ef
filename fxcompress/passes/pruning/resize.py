"""Sizes that a graph carries as constants, rewritten to what remains: views, splits, slices, attention scale."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from fxcompress.analysis.dependency.layout import Layout, is_live, size_of
from fxcompress.analysis.dependency.removal import Removal
from fxcompress.capture.raising import call_arguments
from fxcompress.errors import PassError
from fxcompress.graph.edit import GraphEditor
from fxcompress.graph.shapes import where

__all__ = ["resize_constants"]

aten = torch.ops.aten

_SIZED = {aten.view.default: "size", aten.reshape.default: "shape", aten._unsafe_view.default: "size"}


def resize_constants(graph_module: fx.GraphModule, removal: Removal, editor: GraphEditor) -> None:
    """Rewrite every baked size that no longer holds. One walk over the graph.

    Raises:
        PassError: a size cannot be expressed any more; names the node.
    """
    values = removal.builder.values
    for node in list(graph_module.graph.nodes):
        rule = _RULES.get(node.target) if node.op == "call_function" else None
        if rule is None:
            continue
        touched = [layout for n in (node, *node.all_input_nodes) for layout in _layouts(values.get(n))]
        if any(removal.touches(dim) for layout in touched for dim in layout):
            rule(node, removal, editor)


def _layouts(value: Any) -> list[Layout]:
    if value is None:
        return []
    if isinstance(value, list):
        return [layout for item in value for layout in _layouts(item)]
    return [value]


def _sizes(node: fx.Node, removal: Removal, editor: GraphEditor) -> None:
    layout = removal.builder.values[node]
    given = list(node.args[1])  # type: ignore[arg-type]
    fresh, open_ = [], -1 in given
    for size, dim in zip(given, layout, strict=True):
        if not removal.touches(dim) or size == -1:
            fresh.append(size)
        elif isinstance(size, int):
            fresh.append(int(removal.kept(dim)))
        elif not open_:
            fresh.append(-1)  # a symbolic size times one that shrank: the only one left to infer
            open_ = True
        else:
            raise PassError("two symbolic sizes shrink in one view", where=where(node))
    editor.set_args(node, (node.args[0], fresh, *node.args[2:]))


def _unflatten(node: fx.Node, removal: Removal, editor: GraphEditor) -> None:
    source: Any
    source, dim, sizes = node.args
    rank = len(removal.builder.values[source])
    first = int(dim) % rank  # type: ignore[arg-type]
    layout = removal.builder.values[node][first : first + len(sizes)]  # type: ignore[arg-type]
    fresh = [
        size if not isinstance(size, int) or size == -1 else int(removal.kept(part))
        for size, part in zip(sizes, layout, strict=True)  # type: ignore[arg-type]
    ]
    editor.set_args(node, (source, dim, fresh))


def _expand(node: fx.Node, removal: Removal, editor: GraphEditor) -> None:
    layout = removal.builder.values[node]
    given = list(node.args[1])  # type: ignore[arg-type]
    fresh = [
        int(removal.kept(dim)) if isinstance(size, int) and size != -1 and removal.touches(dim) else size
        for size, dim in zip(given, layout, strict=True)
    ]
    editor.set_args(node, (node.args[0], fresh, *node.args[2:]))


def _pieces(node: fx.Node, removal: Removal, editor: GraphEditor) -> None:
    a = call_arguments(node)
    source, pieces = removal.builder.values[a["self"]], removal.builder.values[node]
    dim = int(a["dim"]) % len(source)
    if not removal.touches(source[dim]):
        return
    sizes = [int(removal.kept(piece[dim])) for piece in pieces]
    editor.retarget(node, aten.split_with_sizes.default, (a["self"], sizes, dim))


def _slice(node: fx.Node, removal: Removal, editor: GraphEditor) -> None:
    a = call_arguments(node)
    source = removal.builder.values[a["self"]]
    dim = int(a["dim"]) % len(source)
    if not removal.touches(source[dim]) or not is_live(source[dim]):
        return
    keep = removal.kept_mask(source[dim])
    start, stop, _ = slice(a["start"], a["end"], a["step"]).indices(len(keep))
    first = int(keep[:start].sum())
    editor.set_args(node, (a["self"], dim, first, first + int(keep[start:stop].sum()), a["step"]), {})


def _roll(node: fx.Node, removal: Removal, editor: GraphEditor) -> None:
    a = call_arguments(node)
    source = removal.builder.values[a["self"]]
    shifts = []
    for shift, dim in zip(a["shifts"], a["dims"], strict=True):
        axis = source[int(dim) % len(source)]
        if removal.touches(axis):
            keep = removal.kept_mask(axis)
            wrapped = int(shift) % len(keep)
            shift = int(keep[len(keep) - wrapped :].sum()) if wrapped else 0
        shifts.append(shift)
    editor.set_args(node, (a["self"], shifts, a["dims"]))


def _attention(node: fx.Node, removal: Removal, editor: GraphEditor) -> None:
    a = call_arguments(node)
    head = removal.builder.values[a["query"]][-1]
    if a["scale"] is None and removal.touches(head):
        # The default is one over the root of the head size *as it is*; the model was trained with what it was.
        editor.set_args(node, node.args, {**node.kwargs, "scale": 1.0 / math.sqrt(int(size_of(head)))})


_RULES: dict[Any, Any] = {
    **dict.fromkeys(_SIZED, _sizes),
    aten.unflatten.int: _unflatten,
    aten.expand.default: _expand,
    **dict.fromkeys([aten.split.Tensor, aten.split_with_sizes.default, aten.split.sizes, aten.chunk.default], _pieces),
    aten.slice.Tensor: _slice,
    aten.roll.default: _roll,
    aten.scaled_dot_product_attention.default: _attention,
}
