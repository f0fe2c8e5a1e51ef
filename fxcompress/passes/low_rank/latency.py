"""Whether layers that take a layer's place are faster, measured on an engine of nothing else."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import fx, nn

from fxcompress.analysis.sizes import GraphSizes
from fxcompress.capture import capture
from fxcompress.graph.info import info
from fxcompress.graph.shapes import require_shapes
from fxcompress.passes.base import PassContext, Skip
from fxcompress.passes.low_rank.sites import Site

__all__ = ["slower"]


def slower(
    graph_module: fx.GraphModule, site: Site, layers: Sequence[nn.Module], context: PassContext, backend: str
) -> Skip | None:
    """The reason why ``layers`` do not pay in the place of the site's layer, or None: measured each on its own.

    Args:
        graph_module: the graph that the site is of, with shapes.
        site: its first call is measured.
        layers: one after another.
        context: with the means to measure.
        backend: to measure on.
    """
    source = site.nodes[0].args[0]
    assert isinstance(source, fx.Node)
    before = latency_of(graph_module, source.meta["val"], (site.layer,), context, backend)
    after = latency_of(graph_module, source.meta["val"], layers, context, backend)
    if after < before:
        return None
    told = f"On {backend} {len(layers)} layers take {after:.3g} ms, this one {before:.3g} ms."
    return Skip(site.path, "does_not_pay", told, tuple(node.name for node in site.nodes))


def latency_of(
    graph_module: fx.GraphModule, value: torch.Tensor, layers: Sequence[nn.Module], context: PassContext, backend: str
) -> float:
    """Median milliseconds of ``layers`` one after another, on random input of the shape of ``value`` at batch 1.

    Layers of the same kind, sizes and options, on input of the same shape, are measured once for all passes.
    """
    require_shapes(graph_module, "cost='latency'")
    assert context.latency is not None
    assert info(graph_module).has_shapes
    shape = GraphSizes(graph_module).of(value)
    kinds = tuple((repr(layer), next(iter(layer.parameters())).dtype) for layer in layers)
    key = (backend, tuple(shape), value.dtype, kinds)
    if key in context.measured:
        return context.measured[key]
    x = torch.zeros(shape, dtype=value.dtype) if not value.is_floating_point() else torch.randn(shape).to(value.dtype)
    chain = nn.Sequential(*(copy.copy(layer) for layer in layers)).eval()
    context.measured[key] = float(context.latency(capture(chain, (x,)), backend, [x]))
    return context.measured[key]
