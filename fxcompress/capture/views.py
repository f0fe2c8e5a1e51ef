"""Which operations return a view of an argument, and how a write into the view changes what it views."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

if TYPE_CHECKING:
    from fxcompress.capture.functionalize import Functionalizer

__all__ = ["MAY_RETURN_SELF", "share_storage", "viewed", "write_back"]

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
    aten.detach.default,
    aten.positive.default,
    aten.resolve_conj.default,
    aten.resolve_neg.default,
}

# In eval mode these return their argument, though their schema does not say so.
_DROPOUTS = {
    aten.dropout.default,
    aten.feature_dropout.default,
    aten.alpha_dropout.default,
    aten.feature_alpha_dropout.default,
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
    """The node that ``node`` is a view of, or None where it is a tensor of its own."""
    if node.target is operator.getitem:
        source = node.args[0]
        if isinstance(source, fx.Node) and source.op == "call_function" and _aliased_argument(source) is not None:
            return source
        return None
    if node.op != "call_function":
        return None
    return _aliased_argument(node) or _same_tensor(node)


def _same_tensor(node: fx.Node) -> fx.Node | None:
    """An argument that the operation returned as it is, though its schema does not say so."""
    if node.target in _DROPOUTS and not node.args[2]:
        return node.all_input_nodes[0]
    value = node.meta.get("val")
    for source in node.all_input_nodes:
        if share_storage(node, source) and source.meta["val"].stride() == value.stride():
            return source
    return None


def _aliased_argument(node: fx.Node) -> fx.Node | None:
    schema = getattr(node.target, "_schema", None)
    if schema is None or not schema.returns or schema.returns[0].alias_info is None:
        return None
    wanted = schema.returns[0].alias_info.before_set
    for index, argument in enumerate(schema.arguments):
        if argument.alias_info is not None and argument.alias_info.before_set & wanted:
            source = node.args[index] if index < len(node.args) else node.kwargs.get(argument.name)
            if not isinstance(source, fx.Node):
                return None
            # reshape, contiguous and to may copy: then what they return is a tensor of its own.
            if isinstance(node.meta.get("val"), torch.Tensor) and not share_storage(node, source):
                return None
            return source
    return None


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
    emit = into._emit
    args = tuple(into.read(a) if isinstance(a, fx.Node) else a for a in view.args[1:])
    kwargs = {k: into.read(a) if isinstance(a, fx.Node) else a for k, a in view.kwargs.items()}
    if view.target is aten.slice.Tensor:
        return emit(view, aten.slice_scatter.default, (whole, value, *args), kwargs, shape_of)
    if view.target is aten.select.int:
        return emit(view, aten.select_scatter.default, (whole, value, *args), kwargs, shape_of)
    if view.target is aten.diagonal.default:
        return emit(view, aten.diagonal_scatter.default, (whole, value, *args), kwargs, shape_of)
    if view.target in MAY_RETURN_SELF or view.target in _DROPOUTS:
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
    source = _aliased_argument(pieces)
    if source is None:
        return None
    named = {argument.name: argument for argument in pieces.target._schema.arguments}  # type: ignore[union-attr]
    position = list(named).index("dim") if "dim" in named else len(pieces.args)
    dim = pieces.args[position] if position < len(pieces.args) else pieces.kwargs.get("dim", 0)
    before = source.meta["val"]
    if pieces.target is aten.unbind.int:
        args = (into.read(source), value, dim, index)
        return source, into._emit(item, aten.select_scatter.default, args, {}, before)
    lengths = [piece.shape[dim] for piece in pieces.meta["val"]]
    if any(isinstance(length, torch.SymInt) for length in lengths):
        return None
    start = sum(lengths[:index])
    bounds = (into.read(source), value, dim, start, start + lengths[index])
    return source, into._emit(item, aten.slice_scatter.default, bounds, {}, before)


def _size(whole: fx.Node, dim: int, size: Any, like: fx.Node, into: Functionalizer) -> Any:
    if not isinstance(size, torch.SymInt):
        return size
    return into._emit(like, aten.sym_size.int, (whole, dim), {}, size)


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
