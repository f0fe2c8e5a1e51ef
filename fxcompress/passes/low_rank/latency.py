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
from fxcompress.passes.base import PassContext

__all__ = ["latency_of"]


def latency_of(
    graph_module: fx.GraphModule, value: torch.Tensor, layers: Sequence[nn.Module], context: PassContext, backend: str
) -> float:
    """Median milliseconds of ``layers`` one after another, on random input of the shape of ``value`` at batch 1."""
    require_shapes(graph_module, "cost='latency'")
    assert context.latency is not None
    assert info(graph_module).has_shapes
    shape = GraphSizes(graph_module).of(value)
    x = torch.zeros(shape, dtype=value.dtype) if not value.is_floating_point() else torch.randn(shape).to(value.dtype)
    chain = nn.Sequential(*(copy.copy(layer) for layer in layers)).eval()
    return context.latency(capture(chain, (x,)), backend)
