"""Rules of operations that only move elements: views, permutations, joins, slices."""

from __future__ import annotations

import operator
from typing import Any

import numpy as np
import torch
from torch import fx

from fxcompress.analysis.dependency.builder import Builder, Rule
from fxcompress.analysis.dependency.labels import PINNED
from fxcompress.analysis.dependency.layout import Block, Dim, Factor, Layout, inert, is_live, size_of
from fxcompress.capture.raising import call_arguments

__all__ = ["RULES"]

aten = torch.ops.aten


def sizes(node: fx.Node) -> list[Any]:
    """Sizes of a node's value."""
    return list(node.meta["val"].shape)


def _view(b: Builder, node: fx.Node) -> Layout:
    return b.view(node, b.layout(node.args[0]), sizes(node))


def _same(b: Builder, node: fx.Node) -> Layout:
    return b.layout(node.args[0])


def _permute(b: Builder, node: fx.Node) -> Layout:
    layout = b.layout(node.args[0])
    # Where each dimension went, by permuting their numbers as the operation would.
    probe = torch.empty(tuple(range(1, len(layout) + 1)), device="meta")
    order = [size - 1 for size in node.target(probe, *node.args[1:], **node.kwargs).shape]  # type: ignore[operator]
    return tuple(layout[index] for index in order)


def _expand(b: Builder, node: fx.Node) -> Layout:
    layout, wanted = b.layout(node.args[0]), sizes(node)
    padded = (inert(1),) * (len(wanted) - len(layout)) + tuple(layout)
    return tuple(dim if _equal(size_of(dim), size) else inert(size) for dim, size in zip(padded, wanted, strict=True))


def _equal(left: Any, right: Any) -> bool:
    return bool(size_of(inert(right)) == left)


def _slice(b: Builder, node: fx.Node) -> Layout:
    a = call_arguments(node)
    layout = list(b.layout(a["self"]))
    dim = a["dim"] % len(layout)
    size = node.meta["val"].shape[dim]
    if _equal(size_of(layout[dim]), size):
        return tuple(layout)
    if not is_live(layout[dim]):
        layout[dim] = inert(size)
        return tuple(layout)
    found = b.vector_or_pinned(layout[dim], node)
    if found is None or any(isinstance(a[name], fx.Node) for name in ("start", "end")):
        b.barrier(node, "the slice depends on a symbolic size", [layout[dim]])
        layout[dim] = inert(size)
    else:
        picked = found[slice(a["start"], a["end"], a["step"])]
        if a["step"] != 1:
            # What a step picks out is not evenly spaced any more once indices are gone.
            b.barrier(node, "a slice with a step picks single channels", [layout[dim]])
        layout[dim] = (Factor(len(picked), Block(np.ascontiguousarray(picked))),)
    return tuple(layout)


def _narrow_last(b: Builder, node: fx.Node) -> Layout:
    b.barrier(node, "this movement has no exact rule")
    return tuple(inert(size) for size in sizes(node))


def _select(b: Builder, node: fx.Node) -> Layout:
    a = call_arguments(node)
    layout = list(b.layout(a["self"]))
    dim = a["dim"] % len(layout)
    removed = layout.pop(dim)
    if is_live(removed):
        b.barrier(node, "one index is picked out of the dimension", [removed])
    return tuple(layout)


def _pieces(b: Builder, node: fx.Node) -> list[Layout]:
    a = call_arguments(node)
    layout = b.layout(a["self"])
    dim = a.get("dim", 0) % len(layout)
    pieces = node.meta["val"]
    if node.target is aten.unbind.int:
        if is_live(layout[dim]):
            b.barrier(node, "every index of the dimension becomes a tensor of its own", [layout[dim]])
        rest = tuple(d for index, d in enumerate(layout) if index != dim)
        return [rest] * len(pieces)
    if not is_live(layout[dim]):
        return [tuple(inert(p.shape[dim]) if i == dim else d for i, d in enumerate(layout)) for p in pieces]
    found = b.vector_or_pinned(layout[dim], node)
    assert found is not None
    result, start = [], 0
    for piece in pieces:
        length = int(piece.shape[dim])
        part: Dim = (Factor(length, Block(found[start : start + length])),)
        result.append(tuple(part if index == dim else d for index, d in enumerate(layout)))
        start += length
    return result


def _cat(b: Builder, node: fx.Node) -> Layout:
    a = call_arguments(node)
    parts = [b.layout(item) for item in a["tensors"] if len(b.layout(item)) == node.meta["val"].dim()]
    dim = a["dim"] % node.meta["val"].dim()
    first = parts[0]
    for other in parts[1:]:
        for index, (mine, theirs) in enumerate(zip(first, other, strict=True)):
            if index != dim:
                b.align(mine, theirs, node.name)
    joined = b.concatenated(node, [part[dim] for part in parts])
    return tuple(joined if index == dim else d for index, d in enumerate(first))


def _stack(b: Builder, node: fx.Node) -> Layout:
    a = call_arguments(node)
    parts = [b.layout(item) for item in a["tensors"]]
    dim = a["dim"] % node.meta["val"].dim()
    for other in parts[1:]:
        for mine, theirs in zip(parts[0], other, strict=True):
            b.align(mine, theirs, node.name)
    layout = list(parts[0])
    layout.insert(dim, inert(len(parts)))
    return tuple(layout)


def _moved_index(b: Builder, node: fx.Node) -> Layout:
    """Roll and flip: run on the labels themselves."""
    a = call_arguments(node)
    layout = list(b.layout(a["self"]))
    dims = [d % len(layout) for d in a["dims"]]
    if node.target is aten.roll.default and not dims:
        return _narrow_last(b, node)
    for position, dim in enumerate(dims):
        if not is_live(layout[dim]):
            continue
        found = b.vector_or_pinned(layout[dim], node)
        if found is None:
            continue
        moved = found[::-1] if node.target is aten.flip.default else np.roll(found, int(a["shifts"][position]))
        layout[dim] = (Factor(len(moved), Block(np.ascontiguousarray(moved))),)
    return tuple(layout)


def _repeat(b: Builder, node: fx.Node) -> Layout:
    a = call_arguments(node)
    repeats = list(a["repeats"])
    layout = (inert(1),) * (len(repeats) - len(b.layout(a["self"]))) + tuple(b.layout(a["self"]))
    result: list[Dim] = []
    for dim, count, size in zip(layout, repeats, sizes(node), strict=True):
        if not is_live(dim):
            result.append(inert(size))
        elif isinstance(count, int):
            result.append((Factor(count), *dim) if count != 1 else dim)
        else:
            result.append((Factor(size_of(inert(count.meta["val"]))), *dim))
    return tuple(result)


def _repeat_interleave(b: Builder, node: fx.Node) -> Layout:
    a = call_arguments(node)
    layout = list(b.layout(a["self"]))
    if a["dim"] is None or not isinstance(a["repeats"], int):
        return _narrow_last(b, node)
    dim = a["dim"] % len(layout)
    layout[dim] = (*layout[dim], Factor(a["repeats"]))
    return tuple(layout)


def _pixel_shuffle(b: Builder, node: fx.Node) -> Layout:
    *batch, channels, height, width = b.layout(node.args[0])
    r = int(node.args[1])  # type: ignore[arg-type]
    total = size_of(channels)
    split = b.view(node, (channels,), [total // (r * r), r, r])
    return (*batch, split[0], (*height, *split[1]), (*width, *split[2]))


def _pixel_unshuffle(b: Builder, node: fx.Node) -> Layout:
    *batch, channels, height, width = b.layout(node.args[0])
    r = int(node.args[1])  # type: ignore[arg-type]
    if is_live(height) or is_live(width):
        return _narrow_last(b, node)
    out = sizes(node)
    return (*batch, (*channels, Factor(r), Factor(r)), inert(out[-2]), inert(out[-1]))


def _pad(b: Builder, node: fx.Node) -> Layout:
    a = call_arguments(node)
    layout = list(b.layout(a["self"]))
    pads = a["pad"]
    for index in range(len(pads) // 2):
        dim = len(layout) - 1 - index
        before, after = pads[2 * index], pads[2 * index + 1]
        if before == 0 and after == 0:
            continue
        size = sizes(node)[dim]
        if not is_live(layout[dim]):
            layout[dim] = inert(size)
            continue
        found = b.vector_or_pinned(layout[dim], node)
        constant = node.target in (aten.constant_pad_nd.default,) or a.get("mode", "constant") == "constant"
        if found is None or not constant or before < 0 or after < 0:
            b.barrier(node, "padding that copies or cuts channels", [layout[dim]])
            layout[dim] = inert(size)
            continue
        pinned = lambda count: np.full(count, PINNED, dtype=np.int64)  # noqa: E731
        layout[dim] = (Factor(int(size), Block(np.concatenate([pinned(before), found, pinned(after)]))),)
    return tuple(layout)


def _getitem(b: Builder, node: fx.Node) -> Any:
    return b.values[node.args[0]][node.args[1]]  # type: ignore[index]


def _index(b: Builder, node: fx.Node) -> Layout:
    """Gathering by index tensors: the dimensions indexed must stay whole, the others pass."""
    a = call_arguments(node)
    layout, indices = b.layout(a["self"]), list(a["indices"])
    taken = [number for number, index in enumerate(indices) if index is not None]
    live = [layout[number] for number in taken if is_live(layout[number])]
    if live:
        b.barrier(node, "the dimension is gathered from by computed indices", live)
    rest = [dim for number, dim in enumerate(layout) if number not in taken]
    made = len(sizes(node)) - len(rest)
    adjacent = taken == list(range(taken[0], taken[-1] + 1))
    place = taken[0] if adjacent else 0
    fresh = [inert(size) for size in sizes(node)[place : place + made]]
    return (*rest[:place], *fresh, *rest[place:])


def _index_select(b: Builder, node: fx.Node) -> Layout:
    a = call_arguments(node)
    layout = list(b.layout(a["self"]))
    dim = int(a["dim"]) % len(layout)
    if is_live(layout[dim]):
        b.barrier(node, "the dimension is gathered from by computed indices", [layout[dim]])
    layout[dim] = inert(sizes(node)[dim])
    return tuple(layout)


def _scatter(b: Builder, node: fx.Node) -> Layout:
    """slice_scatter and select_scatter: the written dimension must stay whole; the others are equal."""
    a = call_arguments(node)
    layout, source = list(b.layout(a["self"])), list(b.layout(a["src"]))
    dim = a["dim"] % len(layout)
    if is_live(layout[dim]):
        b.barrier(node, "a part of the dimension is overwritten", [layout[dim]])
    if node.target is aten.select_scatter.default:
        source.insert(dim, inert(1))
    elif is_live(source[dim]):
        b.barrier(node, "it overwrites a part of a dimension", [source[dim]])
    for index, (mine, theirs) in enumerate(zip(layout, source, strict=True)):
        if index != dim:
            b.align(mine, theirs, node.name)
    return tuple(layout)


RULES: dict[Any, Rule] = {
    operator.getitem: _getitem,
    **dict.fromkeys(
        [
            aten.view.default,
            aten.reshape.default,
            aten._unsafe_view.default,
            aten.flatten.using_ints,
            aten.unflatten.int,
            aten.squeeze.default,
            aten.squeeze.dim,
            aten.squeeze.dims,
            aten.unsqueeze.default,
            aten.view_as.default,
        ],
        _view,
    ),
    **dict.fromkeys(
        [aten.permute.default, aten.transpose.int, aten.t.default, aten.movedim.int, aten.movedim.intlist], _permute
    ),
    aten.expand.default: _expand,
    aten.expand_as.default: _expand,
    aten.slice.Tensor: _slice,
    aten.select.int: _select,
    **dict.fromkeys(
        [aten.split.Tensor, aten.split_with_sizes.default, aten.split.sizes, aten.chunk.default, aten.unbind.int],
        _pieces,
    ),
    aten.cat.default: _cat,
    aten.concat.default: _cat,
    aten.stack.default: _stack,
    aten.roll.default: _moved_index,
    aten.flip.default: _moved_index,
    aten.repeat.default: _repeat,
    aten.repeat_interleave.self_int: _repeat_interleave,
    aten.pixel_shuffle.default: _pixel_shuffle,
    aten.pixel_unshuffle.default: _pixel_unshuffle,
    aten.constant_pad_nd.default: _pad,
    aten.pad.default: _pad,
    aten.index.Tensor: _index,
    aten.index_select.default: _index_select,
    aten.lift_fresh_copy.default: _same,
    aten.slice_scatter.default: _scatter,
    aten.select_scatter.default: _scatter,
}
