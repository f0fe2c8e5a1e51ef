"""Rules of operations that reorder, repeat or regroup whole dimensions."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from fxcompress.analysis.dependency.builder import Builder, Rule
from fxcompress.analysis.dependency.layout import Dim, Factor, Layout, dirtied, inert, is_live, labelled, size_of
from fxcompress.analysis.dependency.overloads import overloads
from fxcompress.analysis.dependency.zeros import combine, product
from fxcompress.capture.raising import call_arguments

__all__ = ["RULES", "refused", "same_size", "sizes"]

aten = torch.ops.aten


def sizes(node: fx.Node) -> list[Any]:
    """Sizes of a node's value."""
    return list(node.meta["val"].shape)


def same_size(left: Any, right: Any) -> bool:
    """Whether a size of a layout and one of a value are the same."""
    return bool(size_of(inert(right)) == left)


def refused(b: Builder, node: fx.Node) -> Layout:
    """A movement that cannot be followed."""
    b.barrier(node, "this movement has no exact rule")
    return tuple(inert(size) for size in sizes(node))


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


def _repeated(b: Builder, size: Any) -> Dim:
    """One number in many places: as many places as are wanted."""
    if not isinstance(size, int) or size == 1:
        return inert(size)
    return labelled(b.labels.fresh((size,)), True, soft=True)


def _expand(b: Builder, node: fx.Node) -> Layout:
    layout, wanted = b.layout(node.args[0]), sizes(node)
    padded = (inert(1),) * (len(wanted) - len(layout)) + tuple(layout)
    return tuple(
        dim if same_size(size_of(dim), size) else _repeated(b, size) for dim, size in zip(padded, wanted, strict=True)
    )


def _expand_as(b: Builder, node: fx.Node) -> Layout:
    layout, other = b.layout(node.args[0]), b.layout(node.args[1])
    padded = (inert(1),) * (len(other) - len(layout)) + tuple(layout)
    result: list[Dim] = []
    for mine, theirs in zip(padded, other, strict=True):
        if size_of(mine) == 1:
            result.append(dirtied(theirs))
        else:
            b.align(mine, theirs, node.name)
            result.append(mine)
    return tuple(result)


def _repeat(b: Builder, node: fx.Node) -> Layout:
    a = call_arguments(node)
    source = b.layout(a["self"])
    repeats = list(a["repeats"] if "repeats" in a else a["dims"])
    rank = max(len(repeats), len(source))
    repeats = [1] * (rank - len(repeats)) + repeats
    layout = (inert(1),) * (rank - len(source)) + tuple(source)
    result: list[Dim] = []
    for dim, count, size in zip(layout, repeats, sizes(node), strict=True):
        if size_of(dim) == 1 and isinstance(count, int) and count != 1:
            result.append(_repeated(b, size))
        elif not is_live(dim):
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
        return refused(b, node)
    dim = a["dim"] % len(layout)
    if size_of(layout[dim]) == 1:
        layout[dim] = _repeated(b, a["repeats"])
        return tuple(layout)
    layout[dim] = (*layout[dim], Factor(a["repeats"]))
    return tuple(layout)


def _whole(b: Builder, node: fx.Node, places: Layout) -> None:
    """The places of a kernel: their number is the operation's own."""
    live = [dim for dim in places if is_live(dim)]
    if live:
        b.barrier(node, "the places of the kernel all stay", live)


def _pixel_shuffle(b: Builder, node: fx.Node) -> Layout:
    *batch, channels, height, width = b.layout(node.args[0])
    r = int(node.args[1])  # type: ignore[arg-type]
    total = size_of(channels)
    split = b.view(node, (channels,), [total // (r * r), r, r], live=0)
    _whole(b, node, split[1:])
    return (*batch, split[0], (*height, *split[1]), (*width, *split[2]))


def _pixel_unshuffle(b: Builder, node: fx.Node) -> Layout:
    *batch, channels, height, width = b.layout(node.args[0])
    r = int(node.args[1])  # type: ignore[arg-type]
    if is_live(height) or is_live(width):
        return refused(b, node)
    out = sizes(node)
    return (*batch, (*channels, Factor(r), Factor(r)), inert(out[-2]), inert(out[-1]))


def _im2col(b: Builder, node: fx.Node) -> Layout:
    """``(C, H, W) → (C·k, L)``: the places of the kernel become factors of the channels."""
    a = call_arguments(node)
    *batch, channels, height, width = b.layout(a["self"])
    live = [dim for dim in (height, width) if is_live(dim)]
    if live:
        b.barrier(node, "the window slides over these dimensions", live)
    kernel = a["kernel_size"]
    return (*batch, (*channels, Factor(int(kernel[0]) * int(kernel[1]))), inert(sizes(node)[-1]))


def _col2im(b: Builder, node: fx.Node) -> Layout:
    a = call_arguments(node)
    *batch, columns, places = b.layout(a["self"])
    if is_live(places):
        b.barrier(node, "the window slides over these dimensions", [places])
    kernel = int(a["kernel_size"][0]) * int(a["kernel_size"][1])
    split = b.view(node, (columns,), [sizes(node)[-3], kernel], live=0)
    _whole(b, node, split[1:])
    return (*batch, split[0], *(inert(size) for size in sizes(node)[-2:]))


def _windows(b: Builder, node: fx.Node) -> Layout:
    """Tensor.unfold: windows along one dimension, each at the end as a dimension of its own."""
    a = call_arguments(node)
    layout = list(b.layout(a["self"]))
    dim = int(a["dimension"]) % len(layout)
    if is_live(layout[dim]):
        b.barrier(node, "the window slides over channels", [layout[dim]])
    layout[dim] = inert(sizes(node)[dim])
    return (*layout, inert(int(a["size"])))


def _along(b: Builder, node: fx.Node) -> Layout:
    """diff, diagonal, rot90: the dimensions that they name stay whole, of the others each index is its own."""
    a = call_arguments(node)
    layout = b.layout(a["self"])
    named = a["dims"] if "dims" in a else [a[key] for key in ("dim", "dim1", "dim2") if key in a]
    dims = {int(dim) % len(layout) for dim in named}
    if a.get("prepend") is not None or a.get("append") is not None:
        return refused(b, node)
    live = [layout[dim] for dim in sorted(dims) if is_live(layout[dim])]
    if "offset" in a and a["offset"] == 0 and len(live) == 2 and same_size(size_of(live[0]), size_of(live[1])):
        rest = [dim for number, dim in enumerate(layout) if number not in dims]
        return (*rest, combine(b, node, live, product))  # of a square: an index goes from both sides
    if live:
        b.barrier(node, f"{node.target._opname} tells these indices by their place", live)  # type: ignore[union-attr]
    made = sizes(node)
    if len(made) == len(layout):
        return tuple(inert(size) if number in dims else layout[number] for number, size in enumerate(made))
    rest = [dim for number, dim in enumerate(layout) if number not in dims]
    return (*rest, inert(made[-1]))  # the diagonal stands last


def _getitem(b: Builder, node: fx.Node) -> Any:
    return b.values[node.args[0]][node.args[1]]  # type: ignore[index]


RULES: dict[Any, Rule] = {
    operator.getitem: _getitem,
    **dict.fromkeys(
        overloads("view reshape _unsafe_view flatten unflatten squeeze unsqueeze view_as reshape_as ravel view_copy"),
        _view,
    ),
    **dict.fromkeys(
        overloads(
            "permute transpose t movedim moveaxis swapaxes swapdims mT mH numpy_T matrix_H adjoint permute_copy "
            "transpose_copy"
        ),
        _permute,
    ),
    **dict.fromkeys(overloads("expand broadcast_to expand_copy"), _expand),
    aten.expand_as.default: _expand_as,
    **dict.fromkeys(overloads("repeat tile"), _repeat),
    aten.repeat_interleave.self_int: _repeat_interleave,
    aten.pixel_shuffle.default: _pixel_shuffle,
    aten.pixel_unshuffle.default: _pixel_unshuffle,
    aten.im2col.default: _im2col,
    aten.col2im.default: _col2im,
    aten.unfold.default: _windows,
    aten.lift_fresh_copy.default: _same,
    **dict.fromkeys(overloads("diff diagonal diagonal_copy rot90"), _along),
}
for _typed in (aten.view.dtype, aten.view_copy.dtype):
    RULES.pop(_typed, None)
