"""Bags of embeddings on their way to ONNX, which has no such operation.

PyTorch's own form is a loop over a sequence, one bag at a time. Bags of one size, what a matrix of indices gives, are
a lookup and a reduction; others a product with a matrix that says which index is in which bag.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from fxcompress.graph.lowering import Lowering

__all__ = ["BAG_RULES"]

aten = torch.ops.aten

_SUM, _MEAN = 0, 1  # PyTorch's numbers of the modes; 2 is the largest


def _numel(lowering: Lowering, a: dict[str, Any]) -> Any:
    """The number of values: the product of the sizes, of which the known ones are one factor."""
    known, total = 1, None
    for dim, size in enumerate(a["self"].meta["val"].shape):
        if not isinstance(size, torch.SymInt):
            known *= int(size)
            continue
        factor = lowering.emit(aten.sym_size.int, (a["self"], dim))
        total = factor if total is None else lowering.emit(operator.mul, (total, factor))
    if total is None or known == 1:
        return known if total is None else total
    return lowering.emit(operator.mul, (total, known))


def _embedding_bag(lowering: Lowering, a: dict[str, Any]) -> Any:
    size, padding, mode = _bag_size(a), _padding(a), a["mode"]
    if mode in (_SUM, _MEAN) and (size is None or padding is not None):
        return _weighed(lowering, a, padding), None, None, None
    if size is None or padding is not None:
        return NotImplemented
    rows = _rows(lowering, a)
    rows = lowering.emit(aten.reshape.default, (rows, [-1, size, int(rows.meta["val"].shape[1])]))
    reduce = {_SUM: aten.sum.dim_IntList, _MEAN: aten.mean.dim}.get(mode, aten.amax.default)
    return lowering.emit(reduce, (rows, [1])), None, None, None


def _rows(lowering: Lowering, a: dict[str, Any]) -> fx.Node:
    """What is looked up, (indices, features)."""
    rows = lowering.emit(aten.embedding.default, (a["weight"], a["indices"]))
    if a["per_sample_weights"] is None:  # PyTorch takes them for sums only
        return rows
    return lowering.emit(aten.mul.Tensor, (rows, lowering.emit(aten.unsqueeze.default, (a["per_sample_weights"], 1))))


def _weighed(lowering: Lowering, a: dict[str, Any], padding: int | None) -> fx.Node:
    """Sums and means as a product with the matrix of zeros and ones (bags, indices) that says what is in which bag."""
    rows = _rows(lowering, a)
    begun = _begun(lowering, a)
    if a["include_last_offset"]:
        later, begun = _cut(lowering, begun, 1, None), _cut(lowering, begun, 0, -1)
    else:
        later = lowering.emit(aten.constant_pad_nd.default, (_cut(lowering, begun, 1, None), [0, 0, 0, 1], 0.0))
    inside = lowering.emit(aten.sub.Tensor, (begun, later))
    if padding is not None:
        counts = lowering.emit(aten.ne.Scalar, (a["indices"], padding))
        counts = lowering.emit(aten._to_copy.default, (counts,), {"dtype": rows.meta["val"].dtype})
        inside = lowering.emit(aten.mul.Tensor, (inside, counts))
    total = lowering.emit(aten.mm.default, (inside, rows))
    if a["mode"] == _SUM:
        return total
    count = lowering.emit(aten.sum.dim_IntList, (inside, [1], True))
    return lowering.emit(aten.div.Tensor, (total, lowering.emit(aten.clamp.default, (count, 1))))


def _begun(lowering: Lowering, a: dict[str, Any]) -> fx.Node:
    """1 where a bag has begun before or at an index, else 0: (offsets, indices), in the dtype of the weight."""
    count = a["indices"].meta["val"].shape[0]
    end = lowering.emit(aten.sym_size.int, (a["indices"], 0)) if isinstance(count, torch.SymInt) else count
    places = lowering.emit(aten.arange.default, (end,), {"dtype": torch.int64})
    starts = lowering.emit(aten.unsqueeze.default, (a["offsets"], 1))
    reached = lowering.emit(aten.ge.Tensor, (places, starts))
    return lowering.emit(aten._to_copy.default, (reached,), {"dtype": a["weight"].meta["val"].dtype})


def _cut(lowering: Lowering, value: fx.Node, start: int, end: int | None) -> fx.Node:
    return lowering.emit(aten.slice.Tensor, (value, 0, start, (1 << 63) - 1 if end is None else end))


def _padding(a: dict[str, Any]) -> int | None:
    padding = a.get("padding_idx")
    return None if padding is None or padding < 0 else int(padding)


def _bag_size(a: dict[str, Any]) -> int | None:
    """Of bags that are all of one size: their offsets count from 0 to the number of indices in steps of it."""
    offsets = a["offsets"]
    if a["include_last_offset"] or not isinstance(offsets, fx.Node) or offsets.target is not aten.arange.start_step:
        return None
    start, end, step = offsets.args[:3]
    count = a["indices"].meta["val"].shape[0]
    end = end.meta["val"] if isinstance(end, fx.Node) else end
    if start != 0 or not isinstance(step, int) or step < 1 or _expression(end) != _expression(count):
        return None
    return step


def _expression(size: Any) -> Any:
    return size.node.expr if isinstance(size, torch.SymInt) else size


BAG_RULES = {
    aten.sym_numel.default: _numel,
    aten.embedding_bag.default: _embedding_bag,
    aten.embedding_bag.padding_idx: _embedding_bag,
}
