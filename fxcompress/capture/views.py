"""Which operations return a view of an argument, and how a write into the view changes what it views."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

if TYPE_CHECKING:
    from fxcompress.capture.functionalize import Functionalizer

__all__ = ["MAY_RETURN_SELF", "is_same_tensor", "same_sizes", "share_storage", "viewed", "write_back"]

aten = torch.ops.aten

# Operations that return their argument itself, or a copy, depending on layout or dtype.
MAY_RETURN_SELF = {
    aten.contiguous.default,
    aten.to.dtype,
    aten.to.dtype_layout,
    aten.to.device,
    aten.to.other,
    aten.lift_fresh.default,
    aten.alias.default,
    aten.positive.default,
    aten.resolve_conj.default,
    aten.resolve_neg.default,
}

# Views that keep every element, so that a reshape of the written view gives the whole back.
_RESHAPES = {
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.view_as.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.unsqueeze.default,
}
_PERMUTES = {aten.permute.default, aten.transpose.int, aten.t.default, aten.movedim.intlist, aten.movedim.int}


def share_storage(left: fx.Node, right: fx.Node) -> bool:
    """Whether the fake values of two nodes lie in one storage: export keeps aliasing in them."""
    a, b = left.meta.get("val"), right.meta.get("val")
    if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor):
        return False
    return a.untyped_storage()._cdata == b.untyped_storage()._cdata


def viewed(node: fx.Node) -> fx.Node | None:
    """The node that ``node`` is a view of, or None where it is a tensor of its own.

    What the fake values say counts, not the schema: ``reshape``, ``contiguous`` and ``to`` copy or not, and dropout in
    eval mode returns its argument.
    """
    if node.op != "call_function":
        return None
    if node.target is operator.getitem:
        source = node.args[0]
        return source if isinstance(source, fx.Node) and _pieces_of(source) is not None else None
    return next((source for source in node.all_input_nodes if share_storage(node, source)), None)


def _pieces_of(node: fx.Node) -> fx.Node | None:
    """What ``node`` splits into views: the argument of ``split``, ``chunk`` or ``unbind``."""
    pieces = node.meta.get("val")
    if node.op != "call_function" or not isinstance(pieces, (tuple, list)) or not pieces:
        return None
    for source in node.all_input_nodes:
        whole = source.meta.get("val")
        if isinstance(whole, torch.Tensor) and isinstance(pieces[0], torch.Tensor):
            if whole.untyped_storage()._cdata == pieces[0].untyped_storage()._cdata:
                return source
    return None


def same_sizes(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Whether two fake tensors have the same shape, compared as expressions: no guard is added."""
    return tuple(map(str, left.shape)) == tuple(map(str, right.shape))


def is_same_tensor(view: fx.Node, source: fx.Node) -> bool:
    """Whether a view is its source itself: the same elements in the same places."""
    a, b = view.meta["val"], source.meta["val"]
    places = [(tuple(map(str, tensor.stride())), str(tensor.storage_offset())) for tensor in (a, b)]
    return a.dtype == b.dtype and same_sizes(a, b) and places[0] == places[1]


def write_back(view: fx.Node, value: fx.Node, into: Functionalizer) -> tuple[fx.Node, fx.Node] | None:
    """What ``view`` views, and the value it has after ``value`` was written through the view.

    ``view`` and the first of the result are nodes of the old graph, ``value`` and the second of the new one.
    None where the view has no inverse that is known.
    """
    if view.target is operator.getitem:
        return _write_back_item(view, value, into)
    source = viewed(view)
    assert source is not None
    whole = _write_back_tensor(view, source, value, into)
    return None if whole is None else (source, whole)


def _write_back_tensor(view: fx.Node, source: fx.Node, value: fx.Node, into: Functionalizer) -> fx.Node | None:
    whole = into.read(source)
    shape_of = source.meta["val"]
    emit = into.emit
    args = tuple(into.read(a) if isinstance(a, fx.Node) else a for a in view.args[1:])
    kwargs = {k: into.read(a) if isinstance(a, fx.Node) else a for k, a in view.kwargs.items()}
    if view.target is aten.slice.Tensor:
        return emit(view, aten.slice_scatter.default, (whole, value, *args), kwargs, shape_of)
    if view.target is aten.select.int:
        return emit(view, aten.select_scatter.default, (whole, value, *args), kwargs, shape_of)
    if view.target is aten.diagonal.default:
        return emit(view, aten.diagonal_scatter.default, (whole, value, *args), kwargs, shape_of)
    if is_same_tensor(view, source):
        return value
    if view.target in _RESHAPES:
        sizes = [_size(whole, dim, size, view, into) for dim, size in enumerate(shape_of.shape)]
        return emit(view, aten.reshape.default, (value, sizes), {}, shape_of)
    if view.target in _PERMUTES:
        order = _permutation(view, shape_of.dim())
        inverse = [order.index(dim) for dim in range(len(order))]
        return emit(view, aten.permute.default, (value, inverse), {}, shape_of)
    return None


def _write_back_item(item: fx.Node, value: fx.Node, into: Functionalizer) -> tuple[fx.Node, fx.Node] | None:
    """A write into one piece of ``split``, ``chunk`` or ``unbind``: scattered straight into what was split."""
    pieces, index = item.args
    assert isinstance(pieces, fx.Node) and isinstance(index, int)
    source = _pieces_of(pieces)
    if source is None:
        return None
    named = {argument.name: argument for argument in pieces.target._schema.arguments}  # type: ignore[union-attr]
    position = list(named).index("dim") if "dim" in named else len(pieces.args)
    dim = pieces.args[position] if position < len(pieces.args) else pieces.kwargs.get("dim", 0)
    before = source.meta["val"]
    if pieces.target is aten.unbind.int:
        args = (into.read(source), value, dim, index)
        return source, into.emit(item, aten.select_scatter.default, args, {}, before)
    lengths = [piece.shape[dim] for piece in pieces.meta["val"]]
    if any(isinstance(length, torch.SymInt) for length in lengths):
        return None
    start = sum(lengths[:index])
    bounds = (into.read(source), value, dim, start, start + lengths[index])
    return source, into.emit(item, aten.slice_scatter.default, bounds, {}, before)


def _size(whole: fx.Node, dim: int, size: Any, like: fx.Node, into: Functionalizer) -> Any:
    if not isinstance(size, torch.SymInt):
        return size
    return into.emit(like, aten.sym_size.int, (whole, dim), {}, size)


def _permutation(view: fx.Node, rank: int) -> list[int]:
    dims = list(range(rank))
    if view.target is aten.permute.default:
        return [int(dim) % rank for dim in view.args[1]]  # type: ignore[union-attr,arg-type]
    if view.target is aten.t.default:
        return dims[::-1]
    if view.target is aten.transpose.int:
        a, b = int(view.args[1]) % rank, int(view.args[2]) % rank  # type: ignore[arg-type]
        dims[a], dims[b] = dims[b], dims[a]
        return dims
    # Sizes 1, 2, 3 … tell where each dimension went.
    probe = torch.empty(tuple(range(1, rank + 1)), device="meta")
    return [size - 1 for size in torch.movedim(probe, *view.args[1:]).shape]  # type: ignore[arg-type]
