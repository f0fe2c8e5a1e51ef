"""Rules of products of values: matmul, einsum, attention.

``Σ_c a_c·b_c`` loses nothing when channel ``c`` goes, where ``a_c`` or ``b_c`` is zero; where neither is, ``c`` stays.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn

from fxcompress.analysis.dependency.builder import Builder, Rule
from fxcompress.analysis.dependency.convolution import made_by
from fxcompress.analysis.dependency.elementwise import broadcast
from fxcompress.analysis.dependency.layout import Dim, Layout, inert, is_live, size_of
from fxcompress.analysis.dependency.overloads import overloads
from fxcompress.analysis.dependency.zeros import combine, contract, every, product
from fxcompress.capture.raising import call_arguments

__all__ = ["RULES"]

aten = torch.ops.aten


_STEPS = 8  # from a parameter to a product: transposed, viewed, expanded


def multiplied(b: Builder, node: fx.Node, left: Layout, right: Layout) -> Layout:
    """``…ij, …jk → …ik``: batch dimensions broadcast, the contracted one loses equal indices on both sides."""
    row: tuple[Dim, ...] = () if len(left) == 1 else (left[-2],)
    column: tuple[Dim, ...] = () if len(right) == 1 else (right[-1],)
    contract(b, node, [left[-1], right[-2] if len(right) > 1 else right[0]])
    lead = [left[:-2], right[:-2]]
    return (*broadcast(b, node, lead, max(map(len, lead)), product), *row, *column)


def _matmul(b: Builder, node: fx.Node) -> Layout:
    left, right = node.all_input_nodes[0], node.all_input_nodes[-1]
    layouts = b.layout(left), b.layout(right)
    # A product with a parameter is a layer without a module: the parameter's free side counts what it makes.
    if _is_parameter(b, left) != _is_parameter(b, right):
        if _is_parameter(b, right) and len(layouts[1]) > 1:
            made_by(b, right, layouts[1][-1])
        elif _is_parameter(b, left) and len(layouts[0]) > 1:
            made_by(b, left, layouts[0][-2])
    return multiplied(b, node, *layouts)


def _is_parameter(b: Builder, node: fx.Node) -> bool:
    """Whether a value is a parameter, perhaps moved."""
    for _ in range(_STEPS):
        if node.op != "call_function" or len(node.all_input_nodes) != 1:
            break
        node = node.all_input_nodes[0]
    if node.op != "get_attr":
        return False
    owner, _, name = str(node.target).rpartition(".")
    return isinstance(getattr(b.graph_module.get_submodule(owner), name), nn.Parameter)


def _addmm(b: Builder, node: fx.Node) -> Layout:
    """``self + a·b`` of addmm, addmv, baddbmm and addbmm, which also sums over the batch."""
    a = call_arguments(node)
    names = next(pair for pair in (("batch1", "batch2"), ("mat1", "mat2"), ("mat", "vec")) if pair[0] in a)
    made = multiplied(b, node, b.layout(a[names[0]]), b.layout(a[names[1]]))
    if node.target is aten.addbmm.default:
        contract(b, node, [b.layout(a["batch1"])[0], b.layout(a["batch2"])[0]])
        made = made[1:]
    return broadcast(b, node, [b.layout(a["self"]), made], len(made))


def _outer(b: Builder, node: fx.Node) -> Layout:
    return (b.layout(node.args[0])[0], b.layout(node.args[1])[0])


def _inner(b: Builder, node: fx.Node) -> Layout:
    left, right = b.layout(node.args[0]), b.layout(node.args[1])
    contract(b, node, [left[-1], right[-1]])
    return (*left[:-1], *right[:-1])


def _tensordot(b: Builder, node: fx.Node) -> Layout:
    a = call_arguments(node)
    left, right = b.layout(a["self"]), b.layout(a["other"])
    first = [int(dim) % len(left) for dim in a["dims_self"]]
    second = [int(dim) % len(right) for dim in a["dims_other"]]
    for mine, theirs in zip(first, second, strict=True):
        contract(b, node, [left[mine], right[theirs]])
    rest = [dim for place, dim in enumerate(left) if place not in first]
    return (*rest, *(dim for place, dim in enumerate(right) if place not in second))


def _einsum(b: Builder, node: fx.Node) -> Layout:
    """A letter in the result broadcasts, any other is summed over; an ellipsis is letters of its own."""
    given: Any = node.args[1]
    layouts = [b.layout(operand) for operand in given]
    terms, result = _letters(str(node.args[0]), [len(layout) for layout in layouts])
    parameters = [_is_parameter(b, operand) for operand in given]
    dims: dict[Any, list[Dim]] = {}
    for term, layout in zip(terms, layouts, strict=True):
        for letter, dim in zip(term, layout, strict=True):
            if term.count(letter) > 1 and is_live(dim):
                b.barrier(node, "einsum takes a diagonal of channels", [dim])
            dims.setdefault(letter, []).append(dim)
    for letter, found in dims.items():
        if letter not in result:
            contract(b, node, found)
    if not all(parameters):  # what a parameter alone brings to the result, it makes
        for operand, term, is_parameter in zip(given, terms, parameters, strict=True):
            if is_parameter:
                for letter in (letter for letter in term if letter in result and len(dims[letter]) == 1):
                    made_by(b, operand, dims[letter][0])
    return tuple(combine(b, node, dims[letter], product) for letter in result)


def _letters(equation: str, ranks: list[int]) -> tuple[list[list[Any]], list[Any]]:
    """The dimensions of each operand and of the result by name; those of an ellipsis are counted from the last."""
    equation = equation.replace(" ", "")
    left, arrow, right = equation.partition("->")
    widest = 0
    terms: list[list[Any]] = []
    for text, rank in zip(left.split(","), ranks, strict=True):
        before, dots, after = text.partition("...")
        count = rank - len(before) - len(after) if dots else 0
        widest = max(widest, count)
        terms.append([*before, *range(-count, 0), *after])
    if arrow:
        before, dots, after = right.partition("...")
        return terms, [*before, *(range(-widest, 0) if dots else ()), *after]
    flat = [letter for term in terms for letter in term if isinstance(letter, str)]
    return terms, [*range(-widest, 0), *sorted(letter for letter in set(flat) if flat.count(letter) == 1)]


def _attention(b: Builder, node: fx.Node) -> Layout:
    """Heads and batch broadcast; query and key lose equal parts of the head size, the value passes its own on."""
    a = call_arguments(node)
    query, key, value = (b.layout(a[name]) for name in ("query", "key", "value"))
    contract(b, node, [query[-1], key[-1]])
    for name, tokens in (("query", query[-2]), ("key", key[-2]), ("value", value[-2])):
        if is_live(tokens):
            b.barrier(node, f"the {name}'s tokens are attended over", [tokens])
    if a["enable_gqa"]:
        query, key, value = _repeated_keys(b, node, query, key, value)
    lead = broadcast(b, node, [query[:-2], key[:-2], value[:-2]], len(query) - 2, lambda dirt: dirt[2])
    mask = a["attn_mask"]
    if isinstance(mask, fx.Node):
        scores = (*lead, query[-2], key[-2])
        broadcast(b, node, [scores, b.layout(mask)], len(scores))
    return (*lead, query[-2], value[-1])


def _repeated_keys(b: Builder, node: fx.Node, query: Layout, key: Layout, value: Layout) -> tuple[Layout, ...]:
    """Grouped-query attention: each key head stands for several query heads, which go with it."""
    heads, keys, values = (size_of(layout[-3]) for layout in (query, key, value))
    split = b.view(node, (query[-3],), [keys, heads // keys], live=0)
    whole: Dim = tuple(factor for dim in split for factor in dim)
    b.align(query[-3], whole, node.name)
    shared = combine(b, node, [split[0], key[-3]], every)
    if values == keys:
        shared = combine(b, node, [shared, value[-3]], every)
    elif is_live(value[-3]):
        b.barrier(node, "key and value have different numbers of heads", [value[-3], shared])
    rest = (*shared, *inert(heads // keys))
    dirt = value[-3] if values == keys else shared
    return (
        (*query[:-3], rest, *query[-2:]),
        (*key[:-3], rest, *key[-2:]),
        (*value[:-3], (*dirt, *inert(heads // keys)), *value[-2:]),
    )


RULES: dict[Any, Rule] = {
    **dict.fromkeys(overloads("matmul mm bmm mv dot vdot linalg_matmul"), _matmul),
    **dict.fromkeys(overloads("addmm baddbmm addmv addbmm"), _addmm),
    **dict.fromkeys(overloads("outer ger"), _outer),
    aten.inner.default: _inner,
    aten.tensordot.default: _tensordot,
    aten.einsum.default: _einsum,
    aten.scaled_dot_product_attention.default: _attention,
}
