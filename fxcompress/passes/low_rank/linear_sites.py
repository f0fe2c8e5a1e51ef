"""Linear layers, 1×1 convolutions and embeddings as matrices, and the two layers that take their place."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx, nn

from fxcompress.graph.edit import GraphEditor
from fxcompress.graph.queries import GraphIndex
from fxcompress.passes.base import Skip
from fxcompress.passes.low_rank.ranks import Price
from fxcompress.passes.low_rank.sites import CONVS, Site, find_sites
from fxcompress.passes.low_rank.splice import conv_like, linear, splice

__all__ = ["factor_layers", "linear_sites", "matrix_of", "price_of", "put_factors", "with_bias"]


def linear_sites(
    graph_module: fx.GraphModule, *, embeddings: bool, ignore: tuple[str, ...], only: tuple[str, ...]
) -> Iterator[tuple[Site, ...] | Skip]:
    """Layers to factor: each alone, or several that are one tied matrix; and those that are not, with the reason."""
    kinds = (nn.Linear, *CONVS, *((nn.Embedding,) if embeddings else ()))
    found = list(find_sites(graph_module, kinds, _refuse, ignore=ignore, only=only, tied=embeddings))
    if not embeddings:
        yield from ((item,) if isinstance(item, Site) else item for item in found if not _is_spatial(item))
        return
    index = GraphIndex(graph_module)
    sites = {item.path: item for item in found if isinstance(item, Site)}
    done: set[str] = set()
    for item in found:
        if isinstance(item, Skip):
            if not _is_spatial(item):
                yield item
            continue
        if item.path in done:
            continue
        users = {user.path: user.tensor for user in index.users_of(f"{item.path}.weight")}
        members = [sites.get(path.removesuffix(".weight")) for path in users]
        done.update(path.removesuffix(".weight") for path in users)
        known = [site for site in members if site is not None]
        one = all(tensor.shape == item.layer.weight.shape for tensor in users.values())
        plain = all(type(site.layer) in (nn.Linear, nn.Embedding) for site in known)
        if len(users) == 1 or (one and plain and len(known) == len(users)):
            yield tuple(known)
        else:
            for site in known:
                others = ", ".join(sorted(path for path in users if path != f"{site.path}.weight"))
                reason = f"Its weight is also {others}, which is not factored with it."
                yield Skip(site.path, "tied_weight", reason, tuple(node.name for node in site.nodes))


_SPATIAL = "spatial_kernel"


def _refuse(layer: Any) -> tuple[str, str] | None:
    if type(layer) is nn.Embedding:
        if layer.max_norm is not None:
            return "max_norm", "It renormalises the rows that it looks up, which factors have not."
        return None
    if type(layer) in CONVS:
        if any(size != 1 for size in layer.kernel_size):
            return _SPATIAL, "Its kernel is not 1×1."
        if layer.groups != 1:
            return "grouped", "It is grouped: its matrix is block diagonal, and small already."
    if min(layer.weight.shape[:2]) < 2:
        return "too_small", "It has one input or one output: nothing is of lower rank."
    return None


def _is_spatial(item: Site | Skip) -> bool:
    """What is no site of a pass on matrices at all, and not worth telling."""
    return isinstance(item, Skip) and item.code == _SPATIAL


def matrix_of(layer: Any) -> torch.Tensor:
    """The weight as ``[1, rows, d]``; a view."""
    weight: torch.Tensor = layer.weight.detach()
    return weight.reshape(1, weight.shape[0], -1)


def price_of(layer: Any) -> Price:
    """Parameters of the matrix and of each component; multiply-accumulates are in the same proportion."""
    _, rows, width = matrix_of(layer).shape
    return Price(rows * width, rows + width, min(rows, width))


def with_bias(layer: Any, shift: torch.Tensor | None) -> torch.Tensor | None:
    """The layer's bias with ``shift`` added."""
    bias = getattr(layer, "bias", None)
    if bias is None or shift is None:
        return bias
    return (bias.detach().double() + shift).to(bias.dtype)


def put_factors(
    editor: GraphEditor, site: Site, outer: nn.Parameter, inner: torch.Tensor, bias: torch.Tensor | None
) -> list[fx.Node]:
    """Replace a site by two layers of ``outer @ inner``; returns the nodes of its first call.

    Args:
        editor: of the graph.
        site: a linear layer, a 1×1 convolution, or an embedding.
        outer: ``[rows, rank]``: of tied layers each gets this very parameter.
        inner: ``[rank, d]``.
        bias: of the second layer.
    """
    return splice(editor, site, factor_layers(site.layer, outer, inner, bias))


def factor_layers(
    layer: Any, outer: nn.Parameter, inner: torch.Tensor, bias: torch.Tensor | None
) -> tuple[nn.Module, nn.Module]:
    """The two layers of :func:`put_factors`."""
    if type(layer) is nn.Embedding:
        table = nn.Embedding(
            layer.num_embeddings,
            outer.shape[1],
            padding_idx=layer.padding_idx,
            scale_grad_by_freq=layer.scale_grad_by_freq,
            sparse=layer.sparse,
            device="meta",
        )
        table.weight = outer
        return table, linear(inner.T, None, layer)
    if type(layer) is nn.Linear:
        second = linear(outer.detach(), bias, layer)
        second.weight = outer
        return linear(inner, None, layer), second
    ones = (1,) * len(layer.kernel_size)
    first = conv_like(
        layer,
        inner.reshape(*inner.shape, *ones),
        stride=layer.stride,
        padding=layer.padding,
        padding_mode=layer.padding_mode,
    )
    return first, conv_like(layer, outer.detach().reshape(*outer.shape, *ones), bias)
