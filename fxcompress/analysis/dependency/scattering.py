"""Rules of operations that read or write at places told by a tensor: gather, scatter, index_add, index_put.

Along the dimension that the places are in, nothing goes. All others are walked side by side: what is written at
channel ``c`` comes from channel ``c``, so that equal indices go from all operands.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from fxcompress.analysis.dependency.builder import Builder
from fxcompress.analysis.dependency.indexing import indexed
from fxcompress.analysis.dependency.layout import Dim, Factor, Layout, dirtied, inert, is_live, size_of
from fxcompress.analysis.dependency.overloads import overloads
from fxcompress.analysis.dependency.zeros import Rule as ZeroRule
from fxcompress.analysis.dependency.zeros import combine, every, name
from fxcompress.capture.raising import call_arguments

__all__ = ["RULES"]

aten = torch.ops.aten


def _whole(b: Builder, node: fx.Node, dims: Sequence[Dim]) -> None:
    live = [dim for dim in dims if is_live(dim)]
    if live:
        b.barrier(node, f"{name(node)} reads or writes this dimension at computed places", live)


def _inert(dim: Dim) -> Dim:
    return (Factor(size_of(dim)),)


def _side_by_side(b: Builder, node: fx.Node, dims: Sequence[Dim], rule: ZeroRule) -> Dim:
    """One dimension that all operands walk together; where one is walked in part only, nothing goes."""
    if any(bool(size_of(dim) != size_of(dims[-1])) for dim in dims):
        _whole(b, node, dims)
        return _inert(dims[0])
    return combine(b, node, dims, rule)


def _gather(b: Builder, node: fx.Node) -> Layout:
    """Zero where what is read is: the indices themselves may be anything there."""
    a = call_arguments(node)
    source, index = b.layout(a["self"]), b.layout(a["index"])
    place = int(a["dim"]) % len(source) if source else 0
    made: list[Dim] = []
    for number, (mine, theirs) in enumerate(zip(source, index, strict=True)):
        if number == place:
            _whole(b, node, [mine, theirs])
            made.append(_inert(theirs))
        else:
            made.append(_side_by_side(b, node, [mine, theirs], lambda dirt: dirt[0]))
    return tuple(made)


def _scatter(b: Builder, node: fx.Node) -> Layout:
    """Zero where both what is written over and what is written are."""
    a = call_arguments(node)
    target, index = b.layout(a["self"]), b.layout(a["index"])
    source = b.layout(a["src"]) if isinstance(a.get("src"), fx.Node) else None
    place = int(a["dim"]) % len(target) if target else 0
    made: list[Dim] = []
    for number, (mine, places) in enumerate(zip(target, index, strict=True)):
        others = [places] if source is None else [source[number], places]
        if number == place:
            _whole(b, node, [mine, *others])
            made.append(_inert(mine))
        elif source is None:
            dim = _side_by_side(b, node, [mine, *others], lambda dirt: dirt[0])
            made.append(dim if a["value"] == 0 else dirtied(dim))
        else:
            made.append(_side_by_side(b, node, [mine, *others], lambda dirt: dirt[0] | dirt[1]))
    return tuple(made)


def _indexed_write(b: Builder, node: fx.Node) -> Layout:
    """index_add, index_copy, index_reduce, index_fill: the index is a vector of places along one dimension."""
    a = call_arguments(node)
    target = b.layout(a["self"])
    source = b.layout(a["source"]) if "source" in a else None
    place = int(a["dim"]) % len(target) if target else 0
    _whole(b, node, b.layout(a["index"]))
    made: list[Dim] = []
    for number, mine in enumerate(target):
        if number == place:
            _whole(b, node, [mine] if source is None else [mine, source[number]])
            made.append(_inert(mine))
        elif source is None:
            made.append(mine if a["value"] == 0 else dirtied(mine))
        else:
            made.append(_side_by_side(b, node, [mine, source[number]], every))
    return tuple(made)


def _index_put(b: Builder, node: fx.Node) -> Layout:
    """``x[:, i] = v``: what is written is broadcast to what the indices pick."""
    a = call_arguments(node)
    target, values = b.layout(a["self"]), b.layout(a["values"])
    rest, place = indexed(target, a["indices"])
    kept = {id(dim) for dim in rest}
    places = [b.layout(index) for index in a["indices"] if index is not None]
    _whole(b, node, [*(dim for dim in target if id(dim) not in kept), *(dim for layout in places for dim in layout)])
    masked = any(index.meta["val"].dtype is torch.bool for index in a["indices"] if index is not None)
    fresh = 1 if masked else max(map(len, places))
    padded = (inert(1),) * (len(rest) + fresh - len(values)) + tuple(values)
    _whole(b, node, padded[place : place + fresh])
    beside = (*padded[:place], *padded[place + fresh :])
    written = {id(mine): combine(b, node, [mine, theirs], every) for mine, theirs in zip(rest, beside, strict=True)}
    return tuple(written[id(dim)] if id(dim) in kept else _inert(dim) for dim in target)


RULES: dict[Any, Any] = {
    aten.gather.default: _gather,
    **dict.fromkeys(overloads("scatter scatter_add scatter_reduce"), _scatter),
    **dict.fromkeys(overloads("index_add index_copy index_reduce index_fill"), _indexed_write),
    **dict.fromkeys(overloads("index_put"), _index_put),
}
