"""Rules of sampling and unpooling, which treat each channel of an image alone, and of bags of embeddings."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fxcompress.analysis.dependency.builder import Builder
from fxcompress.analysis.dependency.convolution import made_by
from fxcompress.analysis.dependency.layout import Layout, inert, is_live
from fxcompress.analysis.dependency.overloads import overloads
from fxcompress.analysis.dependency.zeros import combine, name
from fxcompress.capture.raising import call_arguments

__all__ = ["RULES"]

aten = torch.ops.aten


def _grid_sample(b: Builder, node: fx.Node) -> Layout:
    """Interpolation of zeros is zero, beyond the border too; the coordinates are no channels."""
    a = call_arguments(node)
    source, grid = b.layout(a["input"]), b.layout(a["grid"])
    live = [dim for dim in (*source[2:], *grid[1:]) if is_live(dim)]
    if live:
        b.barrier(node, f"{name(node)} works across these dimensions", live)
    batch = combine(b, node, [source[0], grid[0]], lambda dirt: dirt[0])
    return (batch, source[1], *(inert(size) for size in node.meta["val"].shape[2:]))


def _affine_grid(b: Builder, node: fx.Node) -> Layout:
    source = b.layout(call_arguments(node)["theta"])
    live = [dim for dim in source if is_live(dim)]
    if live:
        b.barrier(node, "each number of an affine map has its own meaning", live)
    return tuple(inert(size) for size in node.meta["val"].shape)


def _unpool(count: int) -> Any:
    def rule(b: Builder, node: fx.Node) -> Layout:
        a = call_arguments(node)
        source, places = b.layout(a["self"]), b.layout(a["indices"])
        live = [dim for dim in (*source[-count:], *places[-count:]) if is_live(dim)]
        if live:
            b.barrier(node, f"{name(node)} works across these dimensions", live)
        lead = [
            combine(b, node, list(dims), lambda dirt: dirt[0])
            for dims in zip(source[:-count], places[:-count], strict=True)
        ]
        return (*lead, *(inert(size) for size in node.meta["val"].shape[-count:]))

    return rule


def _pool_at_random(b: Builder, node: fx.Node) -> list[Layout]:
    b.barrier(node, "every channel is pooled at random places of its own, drawn for all channels at once")
    return [tuple(inert(size) for size in value.shape) for value in node.meta["val"]]


def _embedding_bag(b: Builder, node: fx.Node) -> list[Layout]:
    """Sum, mean or maximum over the rows of a bag, feature by feature."""
    a = call_arguments(node)
    features = made_by(b, a["weight"], b.layout(a["weight"])[1])
    first, *rest = node.meta["val"]
    made: list[Layout] = [(inert(first.shape[0]), features)]
    return made + [tuple(inert(size) for size in value.shape) for value in rest]


RULES: dict[Any, Any] = {
    **dict.fromkeys(overloads("grid_sampler grid_sampler_2d grid_sampler_3d"), _grid_sample),
    aten.affine_grid_generator.default: _affine_grid,
    **dict.fromkeys(overloads("fractional_max_pool2d fractional_max_pool3d"), _pool_at_random),
    aten.max_unpool2d.default: _unpool(2),
    aten.max_unpool3d.default: _unpool(3),
    **dict.fromkeys(overloads("embedding_bag _embedding_bag"), _embedding_bag),
}
