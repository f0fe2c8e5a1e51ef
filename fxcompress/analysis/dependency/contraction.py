"""Rules of products: matmul, bmm, einsum, and scaled dot-product attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fxcompress.analysis.dependency.builder import Builder, Rule
from fxcompress.analysis.dependency.elementwise import broadcast
from fxcompress.analysis.dependency.layout import Dim, Layout, is_live
from fxcompress.capture.raising import call_arguments

__all__ = ["RULES"]

aten = torch.ops.aten


def _matmul(b: Builder, node: fx.Node) -> Layout:
    """``…ij, …jk → …ik``: batch dimensions broadcast, the contracted one loses equal indices on both sides."""
    left, right = b.layout(node.args[0]), b.layout(node.args[1])
    row: tuple[Dim, ...] = () if len(left) == 1 else (left[-2],)
    column: tuple[Dim, ...] = () if len(right) == 1 else (right[-1],)
    b.align(left[-1], right[-2] if len(right) > 1 else right[0], node.name)
    lead_left, lead_right = left[:-2], right[:-2]
    lead = broadcast(b, node, [lead_left, lead_right], max(len(lead_left), len(lead_right)))
    return (*lead, *row, *column)


def _addmm(b: Builder, node: fx.Node) -> Layout:
    a = call_arguments(node)
    first, second = ("batch1", "batch2") if "batch1" in a else ("mat1", "mat2")
    left, right = b.layout(a[first]), b.layout(a[second])
    b.align(left[-1], right[-2], node.name)
    product = (*left[:-1], right[-1])
    return broadcast(b, node, [b.layout(a["self"]), product], len(product))


def _einsum(b: Builder, node: fx.Node) -> Layout:
    equation, operands = node.args[0], node.args[1]
    terms, arrow, result = str(equation).replace(" ", "").partition("->")
    inputs = terms.split(",")
    if not arrow or "." in str(equation) or any(len(set(term)) != len(term) for term in inputs):
        b.barrier(node, "einsum with an ellipsis, a diagonal or no explicit result")
        from fxcompress.analysis.dependency.layout import inert

        return tuple(inert(size) for size in node.meta["val"].shape)
    dims: dict[str, Dim] = {}
    for term, operand in zip(inputs, operands, strict=True):  # type: ignore[arg-type]
        for letter, dim in zip(term, b.layout(operand), strict=True):
            if letter in dims:
                b.align(dims[letter], dim, node.name)
                if not is_live(dims[letter]):
                    dims[letter] = dim
            else:
                dims[letter] = dim
    return tuple(dims[letter] for letter in result)


def _attention(b: Builder, node: fx.Node) -> Layout:
    """Heads and batch broadcast; query and key lose equal parts of the head size, the value passes its own on."""
    a = call_arguments(node)
    query, key, value = (b.layout(a[name]) for name in ("query", "key", "value"))
    b.align(query[-1], key[-1], node.name)
    for name, tokens in (("query", query[-2]), ("key", key[-2]), ("value", value[-2])):
        if is_live(tokens):
            b.barrier(node, f"the {name}'s tokens are attended over", [tokens])
    if a["enable_gqa"]:
        grouped = [dim for layout in (query, key, value) for dim in layout[-3:-2] if is_live(dim)]
        if grouped:
            b.barrier(node, "grouped-query attention repeats key heads: their number is fixed", grouped)
        lead = (*broadcast(b, node, [query[:-3], key[:-3], value[:-3]], len(query) - 3), query[-3])
    else:
        lead = broadcast(b, node, [query[:-2], key[:-2], value[:-2]], len(query) - 2)
    mask = a["attn_mask"]
    if isinstance(mask, fx.Node):
        scores = (*lead, query[-2], key[-2])
        broadcast(b, node, [scores, b.layout(mask)], len(scores))
    return (*lead, query[-2], value[-1])


RULES: dict[Any, Rule] = {
    aten.matmul.default: _matmul,
    aten.mm.default: _matmul,
    aten.bmm.default: _matmul,
    aten.addmm.default: _addmm,
    aten.baddbmm.default: _addmm,
    aten.einsum.default: _einsum,
    aten.scaled_dot_product_attention.default: _attention,
}
