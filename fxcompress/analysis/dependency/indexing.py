"""Rules of operations that pick, join or overwrite indices of a dimension."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import fx

from fxcompress.analysis.dependency.builder import Builder, Rule
from fxcompress.analysis.dependency.constants import constant_value
from fxcompress.analysis.dependency.labels import PINNED
from fxcompress.analysis.dependency.layout import Array, Dim, Layout, dirtied, inert, is_live, labelled, size_of
from fxcompress.analysis.dependency.movement import refused, same_size, sizes
from fxcompress.analysis.dependency.overloads import overloads
from fxcompress.analysis.dependency.zeros import combine, every
from fxcompress.capture.raising import call_arguments

__all__ = ["RULES", "indexed"]

aten = torch.ops.aten


def _picked(b: Builder, node: fx.Node, layout: Layout, dim: int, positions: Array) -> Layout:
    """The indices at ``positions`` of one dimension; whoever shrinks the graph finds them in ``b.reindexed``."""
    found = b.spread_or_pinned(layout[dim], node)
    assert found is not None
    b.reindexed[node] = (dim, positions)
    labels, dirt = found
    return (*layout[:dim], labelled(labels[positions], dirt[positions]), *layout[dim + 1 :])


def _static(dim: Dim) -> bool:
    return isinstance(size_of(dim), int)


def _slice(b: Builder, node: fx.Node) -> Layout:
    a = call_arguments(node)
    layout = b.layout(a["self"])
    dim = int(a["dim"]) % len(layout)
    size = sizes(node)[dim]
    if same_size(size_of(layout[dim]), size) and a.get("step", 1) == 1:
        return layout
    start, stop = a["start"], a["start"] + a["length"] if "length" in a and _plain(a) else a.get("end")
    if is_live(layout[dim]) and _static(layout[dim]) and _plain(a):
        return _picked(b, node, layout, dim, np.arange(int(size_of(layout[dim])))[slice(start, stop, a.get("step"))])
    if is_live(layout[dim]):
        b.barrier(node, "the slice depends on a symbolic size", [layout[dim]])
    return (*layout[:dim], inert(size), *layout[dim + 1 :])


def _plain(arguments: dict[str, Any]) -> bool:
    return not any(isinstance(arguments.get(key), fx.Node) for key in ("start", "end", "length", "step"))


def _select(b: Builder, node: fx.Node) -> Layout:
    """One index is picked out: it stays, the others may go."""
    a = call_arguments(node)
    layout = list(b.layout(a["self"]))
    removed = layout.pop(int(a["dim"]) % len(layout))
    if is_live(removed):
        found = b.vector_or_pinned(removed, node) if isinstance(a["index"], int) else None
        if found is None:
            b.barrier(node, "one index is picked out of the dimension", [removed])
        else:
            b.labels.pin(found[[int(a["index"])]], node.name, "this index is picked out by its number")
    return tuple(layout)


def _unbind(b: Builder, node: fx.Node) -> list[Layout]:
    a = call_arguments(node)
    layout = list(b.layout(a["self"]))
    removed = layout.pop(int(a["dim"]) % len(layout))
    if is_live(removed):
        b.barrier(node, "every index of the dimension becomes a tensor of its own", [removed])
    return [tuple(layout)] * len(node.meta["val"])


_BY_NAME = {"hsplit": 1, "vsplit": 0, "dsplit": 2}


def _pieces(b: Builder, node: fx.Node) -> list[Layout]:
    a = call_arguments(node)
    layout = b.layout(a["self"])
    dim = int(a.get("dim", _BY_NAME.get(node.target._opname, 0))) % len(layout)  # type: ignore[union-attr]
    pieces = node.meta["val"]
    found = b.spread_or_pinned(layout[dim], node) if is_live(layout[dim]) else None
    if found is None:
        if is_live(layout[dim]):
            b.barrier(node, "the split depends on a symbolic size", [layout[dim]])
        return [(*layout[:dim], inert(piece.shape[dim]), *layout[dim + 1 :]) for piece in pieces]
    result, start = [], 0
    for piece in pieces:
        part = slice(start, start + int(piece.shape[dim]))
        result.append((*layout[:dim], labelled(found[0][part], found[1][part]), *layout[dim + 1 :]))
        start = part.stop
    return result


_JOINED = {"hstack": 1, "vstack": 0, "row_stack": 0, "column_stack": 1, "dstack": 2}


def _cat(b: Builder, node: fx.Node) -> Layout:
    a = call_arguments(node)
    rank = node.meta["val"].dim()
    parts = [b.layout(item) for item in a["tensors"] if len(b.layout(item)) == rank]
    name = node.target._opname  # type: ignore[union-attr]
    if name in _JOINED and (len(parts) != len(a["tensors"]) or rank <= _JOINED[name]):
        return refused(b, node)
    dim = int(a["dim"] if "dim" in a else _JOINED[name]) % rank
    joined = b.concatenated(node, [part[dim] for part in parts])
    return tuple(
        joined if index == dim else combine(b, node, [part[index] for part in parts], every) for index in range(rank)
    )


def _stack(b: Builder, node: fx.Node) -> Layout:
    a = call_arguments(node)
    parts = [b.layout(item) for item in a["tensors"]]
    dim = int(a["dim"]) % node.meta["val"].dim()
    layout = [combine(b, node, list(dims), every) for dims in zip(*parts, strict=True)]
    layout.insert(dim, inert(len(parts)))
    return tuple(layout)


def _moved_index(b: Builder, node: fx.Node) -> Layout:
    """Roll and flip: run on the labels themselves."""
    a = call_arguments(node)
    layout = list(b.layout(a["self"]))
    given = a["dims"] if isinstance(a["dims"], (list, tuple)) else [a["dims"]]
    dims = [int(d) % len(layout) for d in given]
    shifted = "shifts" in a
    if shifted and (not dims or len(set(dims)) != len(dims)):
        return refused(b, node)
    for position, dim in enumerate(dims):
        if not is_live(layout[dim]):
            continue
        found = b.spread_or_pinned(layout[dim], node)
        if found is None or (shifted and not isinstance(a["shifts"][position], int)):
            b.barrier(node, "it moves channels by a symbolic number of places", [layout[dim]])
            continue
        labels, dirt = found
        if shifted:
            shift = a["shifts"][position]
            layout[dim] = labelled(np.roll(labels, shift), np.roll(dirt, shift))
        else:
            layout[dim] = labelled(labels[::-1], dirt[::-1])
    return tuple(layout)


def _shuffle(b: Builder, node: fx.Node) -> Layout:
    """channel_shuffle: run on the numbers of the channels."""
    a = call_arguments(node)
    layout = b.layout(a["self"])
    if not is_live(layout[1]) or not _static(layout[1]):
        return layout
    numbers = torch.arange(int(size_of(layout[1]))).view(1, -1, 1, 1)
    return _picked(b, node, layout, 1, torch.channel_shuffle(numbers, int(a["groups"])).flatten().numpy())


def _pad(b: Builder, node: fx.Node) -> Layout:
    a = call_arguments(node)
    layout = list(b.layout(a["self"]))
    pads, mode = list(a["pad"]), a.get("mode", "constant")
    around = {len(layout) - 1 - index // 2: (pads[index], pads[index + 1]) for index in range(0, len(pads), 2)}
    around = {dim: amount for dim, amount in around.items() if amount != (0, 0)}
    made = sizes(node)
    for dim, amount in around.items():
        size = made[dim]
        found = b.spread_or_pinned(layout[dim], node) if is_live(layout[dim]) else None
        if found is None or not all(isinstance(item, int) for item in amount):
            if is_live(layout[dim]):
                b.barrier(node, "channels are padded by a symbolic size", [layout[dim]])
            layout[dim] = inert(size)
        elif mode == "constant":
            front, back = (np.full(max(item, 0), PINNED, dtype=np.int64) for item in amount)
            inner = slice(max(-amount[0], 0), len(found[0]) - max(-amount[1], 0))
            clean = [np.zeros(len(item), dtype=bool) for item in (front, back)]
            layout[dim] = labelled(
                np.concatenate([front, found[0][inner], back]), np.concatenate([clean[0], found[1][inner], clean[1]])
            )
        elif len(around) == 1:
            numbers = torch.arange(len(found[0]), dtype=torch.float64).view(1, 1, -1)
            positions = torch.nn.functional.pad(numbers, amount, mode=mode).long().flatten().numpy()
            return _picked(b, node, tuple(layout), dim, positions)
        else:
            b.barrier(node, "padding that copies channels and another dimension at once", [layout[dim]])
            layout[dim] = inert(size)
    filled = a.get("value") not in (None, 0) and any(max(amount) > 0 for amount in around.values())
    if mode == "constant" and filled:
        layout = [dim if index in around else dirtied(dim) for index, dim in enumerate(layout)]
    return tuple(layout)


def _index(b: Builder, node: fx.Node) -> Layout:
    """Gathering by index tensors: by constant ones along one dimension exactly, else that dimension stays whole."""
    a = call_arguments(node)
    layout = b.layout(a["self"])
    given = a["indices"] if "indices" in a else [*[None] * (int(a["dim"]) % len(layout)), a["index"]]
    taken = [number for number, index in enumerate(given) if index is not None]
    live = [layout[number] for number in taken if is_live(layout[number])]
    if live and len(taken) == 1 and a["self"].op != "get_attr" and _static(live[0]):
        positions = _positions(b, given[taken[0]], int(size_of(live[0])))
        if positions is not None:
            return _picked(b, node, layout, taken[0], positions)
    if live:
        b.barrier(node, "the dimension is gathered from by computed indices", live)
    made = sizes(node)
    if "indices" not in a:
        return tuple(inert(made[i]) if i == taken[0] else dim for i, dim in enumerate(layout))
    rest, place = indexed(layout, given)
    fresh = len(made) - len(rest)
    return (*rest[:place], *(inert(size) for size in made[place : place + fresh]), *rest[place:])


def indexed(layout: Layout, indices: Sequence[Any]) -> tuple[list[Dim], int]:
    """The dimensions that index tensors leave, and the place among them of what the indices make."""
    taken = [number for number, index in enumerate(indices) if index is not None]
    consumed = _consumed(indices)
    rest = [dim for number, dim in enumerate(layout) if number not in consumed]
    adjacent = taken == list(range(taken[0], taken[-1] + 1))
    return rest, taken[0] if adjacent else 0


def _consumed(indices: Sequence[Any]) -> set[int]:
    """Dimensions that index tensors replace; a mask replaces as many as it has."""
    found: set[int] = set()
    dim = 0
    for index in indices:
        value = index.meta["val"] if index is not None else None
        span = value.dim() if value is not None and value.dtype in (torch.bool, torch.uint8) else 1
        if value is not None:
            found.update(range(dim, dim + span))
        dim += span
    return found


def _positions(b: Builder, index: fx.Node, size: int) -> Array | None:
    value = constant_value(b.graph_module, index)
    if value is None or value.dim() != 1:
        return None
    if value.dtype == torch.bool:
        return np.asarray(np.flatnonzero(value.numpy()))
    return np.asarray(value.numpy().astype(np.int64) % size)


def _scatter(b: Builder, node: fx.Node) -> Layout:
    """slice_scatter and select_scatter: what is written lies as what it replaces."""
    a = call_arguments(node)
    layout, source = list(b.layout(a["self"])), list(b.layout(a["src"]))
    dim = int(a["dim"]) % len(layout)
    single = node.target is aten.select_scatter.default
    if single:
        source.insert(dim, inert(1))
    for index, (mine, theirs) in enumerate(zip(layout, source, strict=True)):
        if index != dim:
            layout[index] = combine(b, node, [mine, theirs], every)
    if not is_live(layout[dim]) and not is_live(source[dim]):
        return tuple(layout)
    found = b.spread_or_pinned(layout[dim], node)
    written = b.spread_or_pinned(source[dim], node)
    if found is None or written is None or not _plain(a) or not isinstance(a.get("index", 0), int):
        b.barrier(node, "a part of the dimension is overwritten", [layout[dim], source[dim]])
        return tuple(layout)
    labels, dirt = found[0].copy(), found[1].copy()
    if single:
        b.labels.pin(labels[[a["index"]]], node.name, "this index is overwritten by its number")
    else:
        span = slice(a["start"], a["end"], a["step"])
        b.labels.unify(labels[span], written[0])
        dirt[span] = written[1]
        if a["step"] != 1:
            b.barrier(node, "every n-th channel is overwritten", [layout[dim], source[dim]])
    layout[dim] = labelled(labels, dirt)
    return tuple(layout)


RULES: dict[Any, Rule] = {
    **dict.fromkeys(overloads("slice narrow slice_copy"), _slice),
    **dict.fromkeys(overloads("select select_copy"), _select),
    **dict.fromkeys(overloads("unbind unbind_copy"), _unbind),
    **dict.fromkeys(
        overloads(
            "split split_with_sizes chunk tensor_split unsafe_split unsafe_split_with_sizes unsafe_chunk hsplit vsplit "
            "dsplit split_copy split_with_sizes_copy"
        ),
        _pieces,
    ),
    **dict.fromkeys(overloads("cat concat concatenate hstack vstack row_stack column_stack dstack"), _cat),
    aten.stack.default: _stack,
    aten.roll.default: _moved_index,
    **dict.fromkeys(overloads("flip"), _moved_index),
    **dict.fromkeys(overloads("channel_shuffle native_channel_shuffle"), _shuffle),
    **dict.fromkeys(overloads("constant_pad_nd pad"), _pad),
    aten.index.Tensor: _index,
    aten.index_select.default: _index,
    aten.slice_scatter.default: _scatter,
    aten.select_scatter.default: _scatter,
}
