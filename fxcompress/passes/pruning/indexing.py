"""Positions that a graph carries as constants, rewritten to where the indices are now."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import fx

from fxcompress.analysis.dependency.overloads import overloads
from fxcompress.analysis.dependency.removal import Removal
from fxcompress.capture.raising import call_arguments
from fxcompress.graph.edit import GraphEditor

__all__ = ["RULES"]

aten = torch.ops.aten


def _pieces(node: fx.Node, removal: Removal, editor: GraphEditor) -> None:
    a = call_arguments(node)
    source, pieces = removal.builder.values[a["self"]], removal.builder.values[node]
    by_name = {"hsplit": 1, "vsplit": 0, "dsplit": 2}
    dim = int(a.get("dim", by_name.get(node.target._opname, 0))) % len(source)  # type: ignore[union-attr]
    if removal.touches(source[dim]):
        sizes = [int(removal.kept(piece[dim])) for piece in pieces]
        editor.retarget(node, aten.split_with_sizes.default, (a["self"], sizes, dim))


def _picked(node: fx.Node, removal: Removal, editor: GraphEditor) -> None:
    """A slice where what is picked is evenly spaced still, else a list of indices."""
    if node not in removal.builder.reindexed:
        return
    dim, positions = removal.builder.reindexed[node]
    source: Any = node.args[0]
    keep = removal.kept_mask(removal.builder.values[source][dim])
    if keep.all():
        return
    fresh = (np.cumsum(keep) - 1)[positions[keep[positions]]]
    steps = np.unique(np.diff(fresh))
    if len(fresh) == 1 or (len(steps) == 1 and steps[0] > 0):
        step = int(steps[0]) if len(steps) else 1
        editor.retarget(node, aten.slice.Tensor, (source, dim, int(fresh[0]), int(fresh[-1]) + 1, step))
        return
    value = source.meta["val"]
    index = torch.from_numpy(fresh).to(value.device)
    path = editor.add_tensor(f"{node.name}_kept", index)
    read = editor.insert_get(path, before=node, like=node)
    editor.retarget(node, aten.index_select.default, (source, dim, read))


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


def _position(keep: NDArray[np.bool_], index: int) -> int:
    return int(keep[: index % len(keep)].sum())


def _select(node: fx.Node, removal: Removal, editor: GraphEditor) -> None:
    a = call_arguments(node)
    source = removal.builder.values[a["self"]]
    dim = int(a["dim"]) % len(source)
    if not removal.touches(source[dim]):
        return
    index = _position(removal.kept_mask(source[dim]), int(a["index"]))
    extra = (a["src"],) if "src" in a else ()
    editor.set_args(node, (a["self"], *extra, dim, index), {})


def _slice_scatter(node: fx.Node, removal: Removal, editor: GraphEditor) -> None:
    a = call_arguments(node)
    source = removal.builder.values[a["self"]]
    dim = int(a["dim"]) % len(source)
    if not removal.touches(source[dim]):
        return
    keep = removal.kept_mask(source[dim])
    start, stop, step = slice(a["start"], a["end"], a["step"]).indices(len(keep))
    first = int(keep[:start].sum())
    last = first + int(keep[start : max(start, stop)].sum())
    editor.set_args(node, (a["self"], a["src"], dim, first, last, step), {})


def _pad(node: fx.Node, removal: Removal, editor: GraphEditor) -> None:
    """Padding that copies channels is a list of indices; padding that cuts them cuts fewer."""
    if node in removal.builder.reindexed:
        _picked(node, removal, editor)
        return
    a = call_arguments(node)
    source = removal.builder.values[a["self"]]
    pads = list(a["pad"])
    for place in range(0, len(pads), 2):
        dim = source[len(source) - 1 - place // 2]
        if removal.touches(dim) and min(pads[place : place + 2]) < 0:
            keep = removal.kept_mask(dim)
            before, after = pads[place], pads[place + 1]
            pads[place] = -int(keep[:-before].sum()) if before < 0 else before
            pads[place + 1] = -int(keep[after:].sum()) if after < 0 else after
    if pads != list(a["pad"]):
        editor.set_args(node, (a["self"], pads, *node.args[2:]))


RULES: dict[Any, Any] = {
    **dict.fromkeys(
        overloads(
            "split split_with_sizes chunk tensor_split unsafe_split unsafe_split_with_sizes unsafe_chunk hsplit vsplit "
            "dsplit split_copy split_with_sizes_copy"
        ),
        _pieces,
    ),
    **dict.fromkeys(
        overloads("slice narrow slice_copy index index_select channel_shuffle native_channel_shuffle"), _picked
    ),
    **dict.fromkeys(overloads("constant_pad_nd pad"), _pad),
    **dict.fromkeys(overloads("select select_copy select_scatter"), _select),
    aten.slice_scatter.default: _slice_scatter,
    aten.roll.default: _roll,
}
