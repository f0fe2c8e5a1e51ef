"""Rules of norms: which of them lose nothing when channels go.

Batch and instance norms treat channels one by one. A group norm loses nothing when whole groups go. An RMS norm
divides by the mean of squares: zeros add nothing to the sum, and ``eps`` and weight make good for the count. A layer
norm subtracts the mean from removed channels too: it stays inexact, and its channels are in ``builder.normed``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn

from fxcompress.analysis.dependency.builder import Builder, Rule
from fxcompress.analysis.dependency.elementwise import broadcast
from fxcompress.analysis.dependency.layout import Dim, Layout, blocks, cleaned, dirtied, inert, is_live, size_of
from fxcompress.analysis.dependency.zeros import every, product, require_zero
from fxcompress.capture.raising import call_arguments

__all__ = ["RULES", "group_norm", "layer_norm", "of_batch", "over", "per_channel", "rms_norm"]

aten = torch.ops.aten

_NOT_ZERO = "the norm's mean of squares runs over channels that would not be zero if they were removed"


def per_channel(b: Builder, node: fx.Node, module: Any, path: str, source: Layout) -> Layout:
    """Batch and instance norms; what they are affine with is zero where a channel is removed."""
    _vectors(b, node, module, path, source[1])
    over = source[2:] if isinstance(module, nn.modules.instancenorm._InstanceNorm) else ()
    _whole(b, node, over)
    if module.weight is not None:
        return tuple(cleaned(dim) if place == 1 else dirtied(dim) for place, dim in enumerate(source))
    # Without weights zero stays zero as long as the mean of a removed channel is zero too: it is zeroed with it.
    return tuple(dim if place == 1 else dirtied(dim) for place, dim in enumerate(source))


def _vectors(b: Builder, node: fx.Node, module: nn.Module, path: str, channels: Dim) -> None:
    for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
        if tensor.dim() == 1:
            b.weight(f"{path}.{name}", tensor, layout=(channels,), site=node.name)


def _whole(b: Builder, node: fx.Node, dims: Layout) -> None:
    live = [dim for dim in dims if is_live(dim)]
    if live:
        b.barrier(node, "the norm's statistics run over these dimensions", live)


def _normed(b: Builder, dim: Dim) -> None:
    b.normed += [block.labels.reshape(-1) for block in blocks(dim)]


def layer_norm(b: Builder, node: fx.Node, module: nn.LayerNorm, path: str, source: Layout) -> Layout:
    """Inexact over channels; its weights make removed ones zero again."""
    dims = _over(b, node, source, len(module.normalized_shape))
    for dim in dims:
        _normed(b, dim)
    for name, tensor in module.named_parameters(recurse=False):
        b.weight(f"{path}.{name}", tensor, layout=dims, site=node.name)
    rest = source[: -len(dims)]
    if module.bias is not None:
        rest = tuple(map(dirtied, rest))
    return (*rest, *map(cleaned if module.weight is not None else dirtied, dims))


def _over(b: Builder, node: fx.Node, source: Layout, count: int) -> Layout:
    dims = source[-count:]
    live = [dim for dim in dims if is_live(dim)]
    if count > 1 and live:
        b.barrier(node, "a norm over several dimensions", live)
    return dims


def rms_norm(b: Builder, node: fx.Node, module: nn.RMSNorm, path: str, source: Layout) -> Layout:
    """Exact: removed channels that would not be zero stay."""
    dims = _over(b, node, source, len(module.normalized_shape))
    require_zero(b, node, [dims[-1]], _NOT_ZERO)
    for name, tensor in module.named_parameters(recurse=False):
        b.weight(f"{path}.{name}", tensor, layout=dims, site=node.name)
    return (*source[: -len(dims)], *(map(cleaned, dims) if module.weight is not None else dims))


def group_norm(b: Builder, node: fx.Node, module: nn.GroupNorm, path: str, source: Layout) -> Layout:
    """Exact where whole groups go."""
    channels = _grouped(b, node, source, module.num_groups, module.num_channels)
    if channels[1] is not None:
        b.groups[path] = channels[1]
    _vectors(b, node, module, path, channels[0])
    made = cleaned(channels[0]) if module.weight is not None else dirtied(channels[0])
    return (dirtied(source[0]), made, *source[2:])


def _grouped(b: Builder, node: fx.Node, source: Layout, groups: int, width: int) -> tuple[Dim, Dim | None]:
    channels = source[1]
    _whole(b, node, source[2:])
    if not is_live(channels):
        return channels, None
    if groups == 1:
        _normed(b, channels)
        return channels, None
    split = b.view(node, (channels,), [groups, width // groups])
    whole = tuple(factor for dim in split for factor in dim)
    b.align(channels, whole, node.name)
    _normed(b, split[1])
    return whole, split[0]


# --- calls whose weights are missing or computed ------------------------------------------------------------------


def _affine(b: Builder, node: fx.Node, layout: Layout, place: int, names: tuple[str, str]) -> Layout:
    """Weight and bias of a functional norm, as the product and the sum that they are."""
    a = call_arguments(node)
    rank = len(layout)
    for name, rule in zip(names, (product, every), strict=True):
        given = a.get(name)
        if isinstance(given, fx.Node):
            vector = b.layout(given)
            padded = (*vector, *[inert(1)] * (rank - place - len(vector)))
            layout = broadcast(b, node, [layout, padded], rank, rule)
    return layout


def _batch_norm(b: Builder, node: fx.Node) -> Layout:
    a = call_arguments(node)
    source = b.layout(a["input"])
    if of_batch(node):
        layout = tuple(dirtied(dim) if place in over(node) else dim for place, dim in enumerate(source))
        live = [dim for place, dim in enumerate(source) if place in over(node) and is_live(dim)]
        if live and isinstance(a["running_mean"], fx.Node):
            _whole(b, node, tuple(live))  # running statistics would go on counting what is gone
        elif live and any(not isinstance(size_of(source[place]), int) for place in over(node)):
            b.barrier(node, "the norm's statistics run over removable and over symbolic dimensions at once", live)
        for dim in live:
            require_zero(b, node, [dim], "the norm's statistics run over channels that would not be zero if removed")
        return _affine(b, node, layout, 1, ("weight", "bias"))
    layout = source
    for name, rule in (("running_mean", every), ("running_var", lambda dirt: dirt[0])):
        if isinstance(a.get(name), fx.Node):
            vector = (*b.layout(a[name]), *[inert(1)] * (len(source) - 2))
            layout = broadcast(b, node, [layout, vector], len(source), rule)
    return _affine(b, node, layout, 1, ("weight", "bias"))


def of_batch(node: fx.Node) -> bool:
    """Whether a batch or instance norm without a layer takes its statistics from what it is given."""
    a = call_arguments(node)
    return bool(a.get("use_input_stats", a.get("training"))) or not isinstance(a["running_mean"], fx.Node)


def over(node: fx.Node) -> tuple[int, ...]:
    """The dimensions that such statistics run over."""
    rank = len(node.meta["val"].shape)
    return tuple(range(2, rank)) if node.target is aten.instance_norm.default else (0, *range(2, rank))


def _functional_layer_norm(b: Builder, node: fx.Node) -> Layout:
    a = call_arguments(node)
    source = b.layout(a["input"])
    count = len(a["normalized_shape"])
    dims = _over(b, node, source, count)
    for dim in dims:
        _normed(b, dim)
    layout = (*source[:-count], *map(dirtied, dims))
    return _affine(b, node, layout, len(source) - count, ("weight", "bias"))


def _functional_rms_norm(b: Builder, node: fx.Node) -> Layout:
    a = call_arguments(node)
    source = b.layout(a["input"])
    count = len(a["normalized_shape"])
    dims = _over(b, node, source, count)
    require_zero(b, node, [dims[-1]], _NOT_ZERO)
    return _affine(b, node, source, len(source) - count, ("weight", "bias"))


def _functional_group_norm(b: Builder, node: fx.Node) -> Layout:
    a = call_arguments(node)
    source = b.layout(a["input"])
    channels, groups = _grouped(b, node, source, int(a["num_groups"]), int(node.meta["val"].shape[1]))
    if groups is not None:
        b.counts[node] = groups
    # A whole group of zeros stays zero; within a group the mean is subtracted from removed channels too.
    whole = groups is not None and is_live(groups)
    layout = (source[0], channels if whole else dirtied(channels), *source[2:])
    return _affine(b, node, layout, 1, ("weight", "bias"))


def _weight_norm(b: Builder, node: fx.Node) -> Layout:
    """``g·v/‖v‖``, the length taken over all dimensions but one. A row of zeros has no direction: it stays."""
    a = call_arguments(node)
    rows, length = b.layout(a["v"]), b.layout(a["g"])
    place = int(a["dim"])
    if place == -1 or len(length) != len(rows):
        b.barrier(node, "weight norm over the whole weight")
        return tuple(inert(size) for size in node.meta["val"].shape)
    reason = "weight norm of a removed row is 0/0: fold it before, by FuseModules(rules=('fold_constants',))"
    b.pin([rows[place], length[place]], node.name, reason)
    return broadcast(b, node, [rows, length], len(rows), product)


RULES: dict[Any, Rule] = {
    aten.batch_norm.default: _batch_norm,
    aten.instance_norm.default: _batch_norm,
    aten.layer_norm.default: _functional_layer_norm,
    aten.rms_norm.default: _functional_rms_norm,
    aten.group_norm.default: _functional_group_norm,
    aten._weight_norm.default: _weight_norm,
}
