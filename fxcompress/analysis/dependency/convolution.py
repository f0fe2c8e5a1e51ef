"""Convolutions and linear maps, by a layer or by a weight that the graph computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from fxcompress.analysis.dependency.builder import Builder, Rule
from fxcompress.analysis.dependency.layout import (
    Dim,
    Factor,
    Layout,
    blocks,
    cleaned,
    dirtied,
    inert,
    is_live,
)
from fxcompress.analysis.dependency.overloads import overloads
from fxcompress.analysis.dependency.zeros import combine, contract, every
from fxcompress.capture.raising import call_arguments

__all__ = ["RULES", "convolution", "linear", "made_by"]

aten = torch.ops.aten


def linear(b: Builder, node: fx.Node, module: nn.Linear, path: str, source: Layout) -> Layout:
    """``(…, in) → (…, out)``; a bias fills whatever else could be removed."""
    out = b.fresh(module.out_features, made=True)
    weight = b.weight(f"{path}.weight", module.weight, layout=(out, source[-1]), site=node.name, makes=(0,))
    rest = source[:-1]
    if module.bias is not None:
        b.weight(f"{path}.bias", module.bias, layout=(weight[0],), site=node.name)
        rest = tuple(map(dirtied, rest))
    return (*rest, weight[0])


def convolution(b: Builder, node: fx.Node, module: Any, path: str, source: Layout) -> Layout:
    """The layout of what a convolution layer makes."""

    def weigh(layout: tuple[Dim, ...], makes: int) -> Layout:
        return b.weight(f"{path}.weight", module.weight, layout=layout, site=node.name, makes=(makes,))

    def count(lead: Dim) -> None:
        b.groups[path] = lead

    made = module.in_channels, module.out_channels, module.groups, module.transposed
    window = tuple(module.kernel_size)
    still = _still(window, module.stride, module.padding, getattr(module, "output_padding", 0))
    result = _convolved(b, node, source, window, still, made, weigh, count)
    if module.bias is not None:
        place = len(result) - len(window) - 1
        b.weight(f"{path}.bias", module.bias, layout=(result[place],), site=node.name)
        return _filled(result, place)
    return result


def _still(window: tuple[int, ...], stride: Any, padding: Any, beyond: Any) -> tuple[bool, ...]:
    """Along which dimensions each place is made from the same place alone: a kernel of one that does not move."""
    count = len(window)
    steps, pads, more = (_each(item, count) for item in (stride, 0 if isinstance(padding, str) else padding, beyond))
    return tuple(
        size == 1 and step == 1 and pad == 0 and extra == 0
        for size, step, pad, extra in zip(window, steps, pads, more, strict=True)
    )


def _each(item: Any, count: int) -> tuple[Any, ...]:
    given = tuple(item) if isinstance(item, (list, tuple)) else (item,)
    return given * count if len(given) == 1 else given


def _filled(layout: Layout, place: int) -> Layout:
    """A bias fills whatever else than its own channels could be removed."""
    return tuple(dim if index == place else dirtied(dim) for index, dim in enumerate(layout))


def _convolved(
    b: Builder,
    node: fx.Node,
    source: Layout,
    window: tuple[int, ...],
    still: tuple[bool, ...],
    facts: tuple[int, int, int, bool],
    weigh: Callable[[tuple[Dim, ...], int], Layout],
    count: Callable[[Dim], None],
) -> Layout:
    rank = len(window)
    read, made, groups, transposed = facts
    channels, places = source[-rank - 1], source[-rank:]
    live = [dim for dim, fixed in zip(places, still, strict=True) if is_live(dim) and not fixed]
    if live:
        b.barrier(node, "the convolution slides over these dimensions", live)
    kernel = tuple(inert(size) for size in window)
    if groups == 1:
        out = b.fresh(made, made=True)
        lead: tuple[Dim, ...] = (channels, out) if transposed else (out, channels)
        result = weigh((*lead, *kernel), int(transposed))[int(transposed)]
    else:
        result, group, inner = _grouped(b, node, channels, groups, read // groups, made // groups)
        if transposed:  # the leading dimension counts the channels that come in
            weigh(((*group, *inner), result[len(group) :] or inert(1), *kernel), 1)
        else:
            weigh((result, inner, *kernel), 0)
        count(group)
    sizes = node.meta["val"].shape[-rank:]
    kept = (
        dim if fixed and is_live(dim) else inert(size) for dim, fixed, size in zip(places, still, sizes, strict=True)
    )
    return (*source[: -rank - 1], result, *kept)


def _grouped(b: Builder, node: fx.Node, channels: Dim, groups: int, per_in: int, per_out: int) -> tuple[Dim, Dim, Dim]:
    """What a grouped convolution makes, the groups, and the channels within a group that it reads.

    Either whole groups go (always so in a depthwise convolution), or the same places within every group: the number
    of channels must stay equal over the groups. The choice is the one of a view that splits groups from places.
    """
    if is_live(channels):
        lead, inner = b.view(node, (channels,), [groups, per_in])
        # What it reads may only lose what the split allows.
        b.align(channels, (*lead, *inner), node.name)
    else:
        lead, inner = inert(groups), inert(per_in)
    if is_live(lead):
        clean = cleaned(lead)
        return (*clean, Factor(per_out)), clean, inner
    within = b.fresh(per_out, made=True) if per_out > 1 else inert(1)
    return (*lead, *within), lead, inner


# --- weights that the graph computes -------------------------------------------------------------------------------


def _computed_linear(b: Builder, node: fx.Node) -> Layout:
    a = call_arguments(node)
    source, weight = b.layout(a["input"]), b.layout(a["weight"])
    contract(b, node, [source[-1], weight[-1]])
    if len(weight) == 1:
        return source[:-1]
    out = made_by(b, a["weight"], weight[0])
    rest = source[:-1]
    if isinstance(a["bias"], fx.Node):
        out = combine(b, node, [out, b.layout(a["bias"])[0]], every)
        rest = tuple(map(dirtied, rest))
    return (*rest, out)


def _computed_convolution(rank: int, transposed: bool) -> Rule:
    def rule(b: Builder, node: fx.Node) -> Layout:
        a = call_arguments(node)
        source, weight = b.layout(a["input"]), b.layout(a["weight"])
        shape = a["weight"].meta["val"].shape
        groups = a["groups"]
        if not isinstance(groups, int) or any(not isinstance(size, int) for size in shape):
            b.barrier(node, "the weight's sizes or the groups depend on the input")
            return tuple(inert(size) for size in node.meta["val"].shape)
        read, made = int(shape[0 if transposed else 1]), int(shape[1 if transposed else 0])
        facts = (read, made * groups, groups, True) if transposed else (read * groups, made, groups, False)

        def weigh(layout: tuple[Dim, ...], makes: int) -> Layout:
            out = made_by(b, a["weight"], weight[makes])
            if groups == 1:
                contract(b, node, [layout[1 - makes], weight[1 - makes]])
                return (layout[0], out) if makes else (out, layout[1])
            for place, (mine, theirs) in enumerate(zip(layout, weight, strict=True)):
                if place == 1 - makes:
                    contract(b, node, [mine, theirs])
                elif place == makes:
                    b.align(mine, theirs, node.name)
            return layout

        def count(lead: Dim) -> None:
            b.counts[node] = lead

        window = tuple(map(int, shape[2:]))
        still = _still(window, a["stride"], a["padding"], a.get("output_padding", 0))
        result = list(_convolved(b, node, source, window, still, facts, weigh, count))
        place = len(result) - rank - 1
        # The dimensions of the weight that count groups: where they are not zero, neither is what is made.
        counting = weight[:2] if transposed else weight[:1]
        if groups > 1 and any(block.dirt.any() for dim in counting for block in blocks(dim)):
            result[place] = dirtied(result[place])
        if isinstance(a["bias"], fx.Node):
            result[place] = combine(b, node, [result[place], b.layout(a["bias"])[0]], every)
            return _filled(tuple(result), place)
        return tuple(result)

    return rule


def made_by(b: Builder, weight: fx.Node, out: Dim) -> Dim:
    """Say that ``out``, a dimension of a computed weight, is made here, by the parameters that it comes from."""
    labels = np.unique(np.concatenate([np.zeros(0, dtype=np.int64), *(x.labels.reshape(-1) for x in blocks(out))]))
    if not labels.size:
        return out
    open_, seen = [weight], {weight}
    while open_:
        node = open_.pop()
        path = str(node.target)
        if node.op == "get_attr" and path in b.weights:
            for number, dim in enumerate(b.weights[path]):
                if any(np.isin(block.labels, labels).any() for block in blocks(dim)):
                    b.makes[path] = tuple({*b.makes.get(path, ()), number})
                    b.labels.made(labels)
        fresh = [source for source in node.all_input_nodes if source not in seen]
        seen.update(fresh)
        open_ += fresh
    return out


RULES: dict[Any, Rule] = {
    aten.linear.default: _computed_linear,
    **{o: _computed_convolution(n, False) for n in (1, 2, 3) for o in overloads(f"conv{n}d")},
    **{o: _computed_convolution(n, True) for n in (1, 2, 3) for o in overloads(f"conv_transpose{n}d")},
}
