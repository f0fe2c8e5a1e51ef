"""Where a layer may become several: one whose weight is its own, finite, and not a factor already."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from fxcompress.graph.queries import GraphIndex, matching_layers, module_of
from fxcompress.passes.base import Skip
from fxcompress.quantization.integer_layers import BlockLinear, DynamicLinear

__all__ = ["CONVS", "TRANSPOSED", "Site", "find_sites"]

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True)
class Site:
    """A layer that may be replaced.

    Attributes:
        path: of the layer.
        layer: itself.
        nodes: all calls of it.
    """

    path: str
    layer: Any
    nodes: tuple[fx.Node, ...]


def find_sites(
    graph_module: fx.GraphModule,
    kinds: tuple[type[nn.Module], ...],
    refuse: Callable[[Any], tuple[str, str] | None],
    *,
    ignore: tuple[str, ...] = (),
    only: tuple[str, ...] = (),
    tied: bool = False,
) -> Iterator[Site | Skip]:
    """Layers of exactly these kinds, in graph order, each as a site or with the reason why it is none.

    Args:
        graph_module: a captured graph.
        kinds: types of layers; subclasses do more than their weights say.
        refuse: code and sentence for a layer that the pass cannot take, or None.
        ignore: patterns of layers to leave alone.
        only: patterns of the layers to look at; empty means all.
        tied: whether tied weights are for the caller to judge.

    Raises:
        OptionError: a pattern matches no layer.
    """
    index = GraphIndex(graph_module)
    ignored = set(matching_layers(graph_module, ignore)) if ignore else set()
    chosen = set(matching_layers(graph_module, only)) if only else set(index.calls)
    for path, nodes in index.calls.items():
        layer: Any = module_of(graph_module, nodes[0])
        if path not in chosen or not _counts_as(layer, kinds):
            continue
        names = tuple(node.name for node in nodes)
        if type(layer) not in kinds:
            what = f"It is a {type(layer).__name__}, which does more than its weights say: factor before quantizing."
            yield Skip(path, "quantized", what, names)
            continue
        if path in ignored:
            yield Skip(path, "ignored", "It matches a pattern of ignore.")
            continue
        reason = refuse(layer)
        if reason is not None:
            yield Skip(path, *reason, names)
            continue
        weight: Any = layer.weight
        if weight.device.type == "meta":
            yield Skip(path, "no_values", "Its weight has a shape but no values.", names)
        elif not weight.is_floating_point():
            yield Skip(path, "dtype", f"Its weight is {weight.dtype}.", names)
        elif not all(bool(p.detach().sum().isfinite() or torch.isfinite(p).all()) for p in layer.parameters()):
            yield Skip(path, "not_finite", "Its weights hold NaN or infinities.", names)
        elif any(len(node.args) != 1 or node.kwargs for node in nodes):
            yield Skip(path, "unsupported_call", "It is called with more than its input.", names)
        elif not tied and (shared := _sharers(index, path, layer)):
            reason_ = f"Its weights are also {', '.join(shared)}: factors would take them apart."
            yield Skip(path, "tied_weight", reason_, names)
        elif (other := _partner(graph_module, path, nodes)) is not None:
            what = f"With {other!r} it is one linear map already, of lower rank or in fewer weights than that map has."
            yield Skip(path, "already_factorized", what, names)
        else:
            yield Site(path, layer, nodes)


def _counts_as(layer: Any, kinds: tuple[type[nn.Module], ...]) -> bool:
    return isinstance(layer, kinds) or (nn.Linear in kinds and isinstance(layer, (BlockLinear, DynamicLinear)))


def _sharers(index: GraphIndex, path: str, layer: Any) -> list[str]:
    """Other names of the memory of the layer's weights."""
    own = [f"{path}.{name}" for name, p in layer.named_parameters(recurse=False) if p is not None]
    return sorted({user.path for name in own for user in index.users_of(name) if user.path not in own})


def _partner(graph_module: fx.GraphModule, path: str, nodes: tuple[fx.Node, ...]) -> str | None:
    """A layer directly before or after this one with which it is one map of lower rank, or in fewer weights.

    Two linear layers with nothing between them, not even a bias, are what these passes make. To factor one of them
    again would lose more where nothing was asked for.
    """
    node = nodes[0]
    before, after = node.args[0], next(iter(node.users), None)
    if isinstance(before, fx.Node) and len(before.users) == 1 and _is_pair(graph_module, before, node):
        return str(before.target)
    if len(node.users) == 1 and after is not None and _is_pair(graph_module, node, after):
        return str(after.target)
    return None


def _is_pair(graph_module: fx.GraphModule, first: fx.Node, second: fx.Node) -> bool:
    a: Any = module_of(graph_module, first)
    b: Any = module_of(graph_module, second)
    if type(a) is nn.Embedding and type(b) is nn.Linear:
        return a.weight.numel() + b.weight.numel() < a.num_embeddings * b.out_features
    kinds = (nn.Linear, *CONVS, *TRANSPOSED)
    if type(a) not in kinds or type(b) not in kinds or a.bias is not None:
        return False
    groups, others = (int(getattr(layer, "groups", 1)) for layer in (a, b))
    if groups != others:
        return False
    size = math.prod(
        max(left, right) if min(left, right) == 1 else left + right - 1
        for left, right in zip(_kernel(a), _kernel(b), strict=False)
    )
    inputs = a.in_features if type(a) is nn.Linear else a.in_channels
    outputs = b.out_features if type(b) is nn.Linear else b.out_channels
    between = a.out_features if type(a) is nn.Linear else a.out_channels
    narrow = between < min(inputs * math.prod(_kernel(a)), outputs * math.prod(_kernel(b)))
    return bool(narrow or a.weight.numel() + b.weight.numel() < inputs * outputs * size // groups)


def _kernel(layer: Any) -> tuple[int, ...]:
    return (1,) if type(layer) is nn.Linear else layer.kernel_size
