"""Rules of reductions: exact over channels where removed ones are zero and the count of channels can be put right."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from fxcompress.analysis.dependency.builder import Builder, Rule
from fxcompress.analysis.dependency.elementwise import broadcast
from fxcompress.analysis.dependency.layout import Layout, dirtied, inert, is_live, size_of
from fxcompress.analysis.dependency.overloads import overloads
from fxcompress.analysis.dependency.zeros import combine, every, name, product, require_zero
from fxcompress.capture.raising import call_arguments

__all__ = ["RULES", "reduced_dims"]

aten = torch.ops.aten

# Zeros add nothing to these.
_SUMS = {"sum", "nansum", "any", "count_nonzero", "norm", "linalg_vector_norm", "linalg_norm", "frobenius_norm"}
# The zeros take part: a rewrite puts one of them back.
_EXTREMES = {"amax", "amin", "max", "min", "aminmax"}
# These divide by a count, which a rewrite keeps as it was.
_MEANS = {"mean", "var", "std", "var_mean", "std_mean"}
# Over what stays, these make something other than zero of zeros.
_DIRTY = {"logsumexp", "argmax", "argmin"}


def reduced_dims(node: fx.Node, rank: int) -> list[int]:
    """The dimensions that a reduction removes; all where it names none."""
    a = call_arguments(node)
    given = a.get("dim")
    if given is None or given == []:
        return list(range(rank))
    dims = given if isinstance(given, (list, tuple)) else [given]
    return sorted({int(dim) % rank for dim in dims}) if rank else []


def _reduction(b: Builder, node: fx.Node) -> Any:
    a = call_arguments(node)
    layout = b.layout(a.get("self", a.get("input")))
    reduced = set(reduced_dims(node, len(layout)))
    live = [layout[d] for d in reduced if is_live(layout[d])]
    if live:
        _over_channels(b, node, [layout[d] for d in sorted(reduced)])
    keep = bool(a.get("keepdim", False))
    rest = dirtied if name(node) in _DIRTY else lambda dim: dim
    shape = tuple(
        inert(1) if index in reduced else rest(dim) for index, dim in enumerate(layout) if keep or index not in reduced
    )
    value = node.meta["val"]
    return [shape] * len(value) if isinstance(value, (tuple, list)) else shape


def _over_channels(b: Builder, node: fx.Node, dims: list[Any]) -> None:
    live = [dim for dim in dims if is_live(dim)]
    kind = name(node)
    order = _order(node) if "norm" in kind else 2.0
    counted = kind in ("var", "std", "var_mean", "std_mean")
    symbolic = counted and any(not isinstance(size_of(dim), int) for dim in dims)
    if kind in ("max", "min") and any(user.args[1] == 1 for user in node.users if user.target is operator.getitem):
        b.barrier(node, f"the place of the {kind} over removable channels would change with their number", live)
        return
    if kind not in _SUMS | _MEANS | _EXTREMES or order is None or order <= 0 or symbolic:
        b.barrier(node, f"{kind} over removable channels would change with their number", live)
        return
    for dim in live:
        require_zero(b, node, [dim], f"{kind} runs over channels that would not be zero if they were removed")


def _order(node: fx.Node) -> float | None:
    a = call_arguments(node)
    given = a.get("ord", a.get("p"))
    if given is None or given == "fro":
        return 2.0
    return float(given) if isinstance(given, (int, float)) else None


def _cosine_similarity(b: Builder, node: fx.Node) -> Layout:
    """The products and both lengths are sums over the dimension."""
    a = call_arguments(node)
    rank = len(node.meta["val"].shape) + 1
    place = int(a["dim"]) % rank
    left, right = ((inert(1),) * (rank - len(b.layout(a[x]))) + tuple(b.layout(a[x])) for x in ("x1", "x2"))
    _sum_both(b, node, left[place], right[place])
    return broadcast(b, node, [(*dims[:place], *dims[place + 1 :]) for dims in (left, right)], rank - 1, product)


def _cdist(b: Builder, node: fx.Node) -> Layout:
    a = call_arguments(node)
    left, right = b.layout(a["x1"]), b.layout(a["x2"])
    _sum_both(b, node, left[-1], right[-1])
    lead = broadcast(b, node, [left[:-2], right[:-2]], len(node.meta["val"].shape) - 2)
    return (*lead, dirtied(left[-2]), dirtied(right[-2]))


def _sum_both(b: Builder, node: fx.Node, left: Any, right: Any) -> None:
    both = combine(b, node, [left, right], every)
    require_zero(b, node, [both], f"{name(node)} sums over channels that would not be zero if they were removed")


_REDUCTIONS = """
    sum nansum mean var std var_mean std_mean amax amin aminmax prod logsumexp any all argmax argmin norm
    linalg_vector_norm linalg_norm frobenius_norm max min median nanmedian mode count_nonzero
"""


RULES: dict[Any, Rule] = {
    **dict.fromkeys(
        [o for o in overloads(_REDUCTIONS) if not {argument.name for argument in o._schema.arguments} & {"other"}],
        _reduction,
    ),
    aten.cosine_similarity.default: _cosine_similarity,
    aten.cdist.default: _cdist,
}
