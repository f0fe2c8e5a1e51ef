"""What each operation does to the scale of channels. What has no rule keeps the scale of all that it reads."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn

from fxcompress.analysis.dependency.overloads import overloads
from fxcompress.capture.raising import call_arguments

if TYPE_CHECKING:
    from fxcompress.analysis.scaling.flow import Flow

__all__ = ["CONVS", "NORMS", "RULES", "TRANSPOSED", "layer_rule", "limits"]

Labels = torch.Tensor | None
Rule = Callable[["Flow", fx.Node], Any]

aten = torch.ops.aten

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED)
NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


# --- layers -----------------------------------------------------------------------------------------------------


def layer_rule(flow: Flow, node: fx.Node, layer: Any) -> Labels:
    """A layer with weights reads channels, makes channels, or both; dropout passes them on."""
    if isinstance(layer, (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.Identity)):
        return flow.of(node.args[0])
    if type(layer) is nn.PReLU and not flow.index.is_tied(layer.weight):
        labels = flow.of(node.args[0])
        return labels if labels is None or layer.num_parameters == 1 or _only_dim(labels, 1) else _pinned(flow, node)
    if type(layer) in (*CONVS, nn.Linear):
        return _product(flow, node, layer)
    if type(layer) in NORMS and layer.weight is not None and not _tied(flow, layer):
        return _norm(flow, node, layer)
    return _pinned(flow, node)


def _product(flow: Flow, node: fx.Node, layer: Any) -> Labels:
    path, value = str(node.target), node.meta["val"]
    if _tied(flow, layer) or not layer.weight.is_floating_point():
        return _pinned(flow, node)
    conv = type(layer) in CONVS
    inputs, outputs = _widths(layer)
    rank = len(layer.kernel_size) if conv else 0
    dim = value.dim() - 1 - rank
    read = flow.of(node.args[0])
    if path not in flow.makers:
        flow.readers[path], flow.makers[path] = flow.fresh(inputs), flow.fresh(outputs)
    if read is not None and _only_dim(read, dim) and read.numel() in (1, inputs):
        flow.union(flow.readers[path], read.reshape(-1).expand(inputs))
    else:
        flow.pin(read, node, "a layer reads it along another dimension")
        flow.pin(flow.readers[path], node, "what it reads keeps its scale")
    return _along(flow.makers[path], dim, value.dim())


def _norm(flow: Flow, node: fx.Node, layer: Any) -> Labels:
    """The affine part makes channels; the norm before it takes their scale away."""
    path, value = str(node.target), node.meta["val"]
    flow.pin_inputs(node)
    if layer.weight.dim() != 1:
        return None
    if path not in flow.makers:
        flow.makers[path] = flow.fresh(len(layer.weight))
    last = isinstance(layer, (nn.LayerNorm, nn.RMSNorm))
    return _along(flow.makers[path], value.dim() - 1 if last else 1, value.dim())


def _widths(layer: Any) -> tuple[int, int]:
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    return layer.in_channels, layer.out_channels


def _tied(flow: Flow, layer: Any) -> bool:
    return any(
        flow.index.is_tied(tensor) for tensor in (layer.weight, getattr(layer, "bias", None)) if tensor is not None
    )


def _along(labels: torch.Tensor, dim: int, rank: int) -> torch.Tensor:
    shape = [1] * rank
    shape[dim] = -1
    return labels.reshape(shape)


def _only_dim(labels: torch.Tensor, dim: int) -> bool:
    """Whether the labels change along this dimension alone."""
    return all(size == 1 for place, size in enumerate(labels.shape) if place != dim)


def _pinned(flow: Flow, node: fx.Node) -> Labels:
    """All keep their scale."""
    flow.pin_inputs(node)
    return None


# --- elementwise ------------------------------------------------------------------------------------------------


def _same(flow: Flow, node: fx.Node) -> Labels:
    return flow.of(node.args[0])


def _clamp(flow: Flow, node: fx.Node) -> Labels:
    """Limits of 0 and infinity scale with anything; others only if they are made to."""
    labels = flow.of(node.args[0])
    if labels is None:
        return None
    low, high = limits(node)
    if all(end is None or end == 0 for end in (low, high)):
        return labels
    numbers = all(end is None or isinstance(end, (int, float)) for end in (low, high))
    if not flow.through_clips or not numbers:
        flow.pin(labels, node, "a clip with a limit other than 0 is not scale-equivariant")
        return None
    flow.clips[node] = labels
    return labels


def limits(node: fx.Node) -> tuple[Any, Any]:
    """Lower and upper limit of a clip."""
    if node.target is aten.relu6.default:
        return 0, 6
    a = call_arguments(node)
    if node.target is aten.hardtanh.default:
        return a["min_val"], a["max_val"]
    return a.get("min"), a.get("max")


def _add(flow: Flow, node: fx.Node) -> Labels:
    left, right = (flow.of(item) for item in node.args[:2])
    if left is None or right is None or len(node.args) < 2:
        return _pinned(flow, node)
    try:
        left, right = torch.broadcast_tensors(left, right)
    except RuntimeError:
        return _pinned(flow, node)
    flow.union(left, right)
    return left.clone()


def _mul(flow: Flow, node: fx.Node) -> Labels:
    """One factor may be scaled; a parameter beside another scaled value is not."""
    left, right = (flow.of(item) for item in node.args[:2])
    if left is not None and right is not None:
        if _is_parameter(node.args[1]):
            flow.pin(right, node, "another factor of its product is scaled")
            right = None
        elif _is_parameter(node.args[0]):
            flow.pin(left, node, "another factor of its product is scaled")
            left = None
        else:
            return _pinned(flow, node)
    return _broadcast(flow, node, left if left is not None else right)


def _div(flow: Flow, node: fx.Node) -> Labels:
    flow.pin(flow.of(node.args[1]), node)
    return _broadcast(flow, node, flow.of(node.args[0]))


def _broadcast(flow: Flow, node: fx.Node, labels: Labels) -> Labels:
    if labels is None:
        return None
    rank = node.meta["val"].dim()
    return labels.reshape([1] * (rank - labels.dim()) + list(labels.shape))


def _is_parameter(item: Any) -> bool:
    return isinstance(item, fx.Node) and item.op == "get_attr"


# --- reductions and movement ------------------------------------------------------------------------------------


def _reduced(flow: Flow, node: fx.Node) -> Labels:
    """Sums, means and extremes over dimensions along which the scale is one."""
    labels = flow.of(node.args[0])
    if labels is None:
        return None
    a = call_arguments(node)
    dims = a.get("dim")
    dims = [dims] if isinstance(dims, int) else list(dims or [])
    dims = [dim % labels.dim() for dim in dims] or list(range(labels.dim()))
    if any(labels.shape[dim] > 1 for dim in dims):
        return _pinned(flow, node)
    if not a.get("keepdim", False):
        for dim in sorted(dims, reverse=True):
            labels = labels.squeeze(dim)
    return labels


def _spatial(dims: int) -> Rule:
    """Operations on the last ``dims`` dimensions: pooling, interpolation."""

    def rule(flow: Flow, node: fx.Node) -> Labels:
        labels = flow.of(node.args[0])
        if labels is not None and any(size > 1 for size in labels.shape[-dims:]):
            return _pinned(flow, node)
        return labels

    return rule


def _padded(flow: Flow, node: fx.Node) -> Labels:
    labels = flow.of(node.args[0])
    if labels is None:
        return None
    a = call_arguments(node)
    touched = (len(a["pad"]) + 1) // 2
    value = a.get("value")
    if value not in (None, 0) or any(size > 1 for size in labels.shape[-touched:]):
        return _pinned(flow, node)
    return labels


def _moved(flow: Flow, node: fx.Node) -> Any:
    run: Any = node.target
    return flow.moved(node, run)


def _item(flow: Flow, node: fx.Node) -> Labels:
    source, place = node.args
    found = flow.labels.get(source) if isinstance(source, fx.Node) else None
    return found[place] if isinstance(found, (list, tuple)) and isinstance(place, int) else None


# --- products ---------------------------------------------------------------------------------------------------


def _matmul(flow: Flow, node: fx.Node) -> Labels:
    """The right side keeps the scale of its columns, where its rows share one: attention times values."""
    flow.pin(flow.of(node.args[0]), node)
    return _columns(flow, node, flow.of(node.args[1]))


def _attention(flow: Flow, node: fx.Node) -> Labels:
    a = call_arguments(node)
    for name in ("query", "key", "attn_mask"):
        flow.pin(flow.of(a[name]), node)
    return _columns(flow, node, flow.of(a["value"]))


def _columns(flow: Flow, node: fx.Node, labels: Labels) -> Labels:
    rank = node.meta["val"].dim()
    if labels is None:
        return None
    if labels.dim() < 2 or labels.dim() > rank or labels.shape[-2] > 1:
        return _pinned(flow, node)
    return labels.reshape([1] * (rank - labels.dim()) + list(labels.shape))


def _table() -> dict[Any, Rule]:
    rules: dict[Any, Rule] = {operator.getitem: _item}
    names: dict[Rule, str] = {
        _same: "relu leaky_relu prelu rrelu abs neg contiguous clone detach alias dropout lift_fresh_copy",
        _clamp: "clamp clamp_min clamp_max hardtanh relu6",
        _add: "add sub",
        _mul: "mul",
        _div: "div",
        _reduced: "mean sum amax amin",
        _spatial(1): "max_pool1d avg_pool1d adaptive_avg_pool1d upsample_nearest1d upsample_linear1d",
        _spatial(2): "max_pool2d avg_pool2d adaptive_avg_pool2d upsample_nearest2d upsample_bilinear2d "
        "upsample_bicubic2d _upsample_nearest_exact2d",
        _spatial(3): "max_pool3d avg_pool3d adaptive_avg_pool3d upsample_nearest3d upsample_trilinear3d",
        _padded: "constant_pad_nd pad reflection_pad1d reflection_pad2d replication_pad1d replication_pad2d",
        _moved: "view reshape _unsafe_view flatten unflatten permute transpose t numpy_T squeeze unsqueeze expand "
        "expand_as slice select narrow split split_with_sizes chunk unbind cat concat stack repeat repeat_interleave "
        "roll flip movedim swapaxes pixel_shuffle pixel_unshuffle channel_shuffle index_select",
        _matmul: "matmul bmm",
        _attention: "scaled_dot_product_attention",
    }
    for rule, listed in names.items():
        rules.update(dict.fromkeys(overloads(listed), rule))
    return rules


RULES = _table()
"""The rule of each operation that has one."""
