"""Sizes that a graph carries as constants, rewritten to what remains: views, splits, slices, attention scale."""

from __future__ import annotations

import math
import operator
from typing import Any

import numpy as np
import torch
from torch import fx

from fxcompress.analysis.dependency.layout import Dim, Layout, blocks, size_of
from fxcompress.analysis.dependency.overloads import overloads
from fxcompress.analysis.dependency.removal import Removal
from fxcompress.capture.raising import call_arguments
from fxcompress.graph.edit import GraphEditor
from fxcompress.passes.pruning import indexing, statistics

__all__ = ["resize_constants"]

aten = torch.ops.aten


def resize_constants(graph_module: fx.GraphModule, removal: Removal, editor: GraphEditor) -> None:
    """Rewrite every baked size that no longer holds. One walk over the graph."""
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
    fresh = [resized(size, dim, removal, editor, node) for size, dim in zip(given, layout, strict=True)]
    editor.set_args(node, (node.args[0], fresh, *node.args[2:]))


def resized(size: Any, dim: Dim, removal: Removal, editor: GraphEditor, node: fx.Node) -> Any:
    """What a size argument becomes; a symbolic one times a share of channels is computed again."""
    if not removal.touches(dim) or (isinstance(size, int) and size == -1):
        return size
    if isinstance(size, int):
        return int(removal.kept(dim))
    kept, total = _share(dim, removal)
    scaled = editor.insert_call(operator.mul, (size, kept), before=node, like=node)
    return editor.insert_call(operator.floordiv, (scaled, total), before=node, like=node)


def _share(dim: Dim, removal: Removal) -> tuple[int, int]:
    found = blocks(dim)
    gone = [removal.removed[block.labels] for block in found]
    return int(np.prod([int((~item).sum()) for item in gone])), int(np.prod([item.size for item in gone]))


def _unflatten(node: fx.Node, removal: Removal, editor: GraphEditor) -> None:
    source: Any
    source, dim, sizes = node.args
    rank = len(removal.builder.values[source])
    first = int(dim) % rank  # type: ignore[arg-type]
    layout = removal.builder.values[node][first : first + len(sizes)]  # type: ignore[arg-type]
    fresh = [
        resized(size, part, removal, editor, node)
        for size, part in zip(sizes, layout, strict=True)  # type: ignore[arg-type]
    ]
    editor.set_args(node, (source, dim, fresh))


def _expand(node: fx.Node, removal: Removal, editor: GraphEditor) -> None:
    layout = removal.builder.values[node]
    given = list(node.args[1])  # type: ignore[arg-type]
    fresh = [resized(size, dim, removal, editor, node) for size, dim in zip(given, layout, strict=True)]
    editor.set_args(node, (node.args[0], fresh, *node.args[2:]))


def _repeat(node: fx.Node, removal: Removal, editor: GraphEditor) -> None:
    """What repeats one index makes as many as are left."""
    a = call_arguments(node)
    source, layout = removal.builder.values[a["self"]], removal.builder.values[node]
    given = list(a["repeats"] if "repeats" in a else a["dims"])
    given = [1] * (len(layout) - len(given)) + given
    padded = [None] * (len(layout) - len(source)) + list(source)
    fresh = [
        int(removal.kept(dim)) if removal.touches(dim) and (old is None or size_of(old) == 1) else count
        for count, dim, old in zip(given, layout, padded, strict=True)
    ]
    editor.set_args(node, (a["self"], fresh), {})


def _repeat_interleave(node: fx.Node, removal: Removal, editor: GraphEditor) -> None:
    a = call_arguments(node)
    source, layout = removal.builder.values[a["self"]], removal.builder.values[node]
    dim = int(a["dim"]) % len(source)
    if size_of(source[dim]) == 1 and removal.touches(layout[dim]):
        editor.set_args(node, (a["self"], int(removal.kept(layout[dim])), dim), {})


def _uniform(node: fx.Node, removal: Removal, editor: GraphEditor) -> None:
    """zeros, ones, full: the size is an argument."""
    place = [argument.name for argument in node.target._schema.arguments].index("size")  # type: ignore[union-attr]
    args = list(node.args)
    layout = removal.builder.values[node]
    given: Any = args[place]
    args[place] = [resized(size, dim, removal, editor, node) for size, dim in zip(given, layout, strict=True)]
    editor.set_args(node, args)


def _count(node: fx.Node, removal: Removal, editor: GraphEditor) -> None:
    """The number of groups of a convolution or a norm that is a call."""
    lead = removal.builder.counts.get(node)
    if lead is None or not removal.touches(lead):
        return
    named = call_arguments(node)
    name = "groups" if "groups" in named else "num_groups"
    named[name] = int(removal.kept(lead))
    editor.set_args(node, list(named.values()), {})


def _attention(node: fx.Node, removal: Removal, editor: GraphEditor) -> None:
    a = call_arguments(node)
    head = removal.builder.values[a["query"]][-1]
    if a["scale"] is None and removal.touches(head):
        # The default is one over the root of the head size *as it is*; the model was trained with what it was.
        editor.set_args(node, node.args, {**node.kwargs, "scale": 1.0 / math.sqrt(int(size_of(head)))})


_RULES: dict[Any, Any] = {
    **dict.fromkeys(overloads("view reshape _unsafe_view view_copy"), _sizes),
    aten.unflatten.int: _unflatten,
    **dict.fromkeys(overloads("expand broadcast_to expand_copy"), _expand),
    **dict.fromkeys(overloads("repeat tile"), _repeat),
    aten.repeat_interleave.self_int: _repeat_interleave,
    **dict.fromkeys(overloads("zeros ones full new_zeros new_ones new_full"), _uniform),
    **dict.fromkeys(
        overloads("conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d group_norm"), _count
    ),
    aten.scaled_dot_product_attention.default: _attention,
    **indexing.RULES,
    **statistics.RULES,
}
