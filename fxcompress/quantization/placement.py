"""Where stubs go: which layers run in integers, which values are quantized, and which of them share a scale."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from fxcompress.capture.raising import call_arguments
from fxcompress.quantization.gates import GATES
from fxcompress.quantization.layers import QUANTIZED
from fxcompress.quantization.schemes import Scheme

__all__ = ["Placement", "place"]

aten = torch.ops.aten

# Layers of products that no integer form is made of here: transposed convolutions, recurrent and bilinear layers.
_WITHOUT_KERNEL = (nn.modules.conv._ConvNd, nn.RNNBase, nn.Bilinear)

_MOVEMENT = {
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.permute.default,
    aten.transpose.int,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.unsqueeze.default,
    aten.contiguous.default,
    aten.clone.default,
    aten.slice.Tensor,
}
_SAME_SCALE = _MOVEMENT | {aten.max_pool2d.default, aten.max_pool1d.default, aten.cat.default, aten.concat.default}
_POOLS = {aten.avg_pool2d.default, aten.adaptive_avg_pool2d.default}
_BINARY = {aten.add.Tensor, aten.mul.Tensor}
_UNARY = {aten.sigmoid.default, aten.leaky_relu.default}
_LIMITS = aten.clamp.Tensor  # with limits for each channel, which are constants
_CLIPS = {
    aten.relu.default,
    aten.relu6.default,
    aten.hardtanh.default,
    aten.clamp.default,
    aten.clamp_min.default,
    _LIMITS,
}
# Elementwise, and in floating point between a quantized input and a quantized output, unless the scheme splits them.
_FLOAT_ACTIVATIONS = {
    aten.hardswish.default,
    aten.hardsigmoid.default,
    aten.silu.default,
    aten.gelu.default,
    aten.elu.default,
    aten.tanh.default,
    aten.mish.default,
    aten.softplus.default,
}


@dataclass
class Placement:
    """What a scheme asks for in one graph.

    Attributes:
        layers: paths of layers whose weight is quantized, in the order of the graph.
        values: nodes whose value gets a stub → number of the scale that it uses; equal numbers share one.
        readers: nodes whose value gets a stub → who reads the stub; None for everybody.
        operations: nodes that are to run in integers.
        gates: of these the activations that first have to be split, for the engine has no kernel for the whole.
        left: layers that stay in floating point → code and reason.
    """

    layers: list[str] = field(default_factory=list)
    values: dict[fx.Node, int] = field(default_factory=dict)
    readers: dict[fx.Node, set[fx.Node] | None] = field(default_factory=dict)
    operations: set[fx.Node] = field(default_factory=set)
    gates: list[fx.Node] = field(default_factory=list)
    left: dict[str, tuple[str, str]] = field(default_factory=dict)


def place(graph_module: fx.GraphModule, scheme: Scheme, ignored: Callable[[str], str | None]) -> Placement:
    """Decide for a whole graph, in two walks.

    Args:
        graph_module: a captured graph with shapes.
        scheme: of the engine.
        ignored: why the layer at a path shall stay in floating point, or None.
    """
    placement = Placement()
    found = _active_layers(graph_module, placement, ignored)
    if scheme.placement == "inputs":
        _inputs(graph_module, found, placement)
    else:
        _values(graph_module, found, placement, scheme)
    return placement


def _active_layers(
    graph_module: fx.GraphModule, placement: Placement, ignored: Callable[[str], str | None]
) -> set[fx.Node]:
    calls: dict[str, list[fx.Node]] = {}
    for node in graph_module.graph.find_nodes(op="call_module"):
        calls.setdefault(str(node.target), []).append(node)
    shared = _shared_weights(graph_module, calls)
    active: set[fx.Node] = set()
    for path, nodes in calls.items():
        layer = graph_module.get_submodule(path)
        if type(layer) not in QUANTIZED:
            if (
                isinstance(layer, (nn.modules.conv._ConvNd, nn.RNNBase, nn.Bilinear))
                and type(layer) not in QUANTIZED.values()
            ):
                placement.left[path] = ("kind", f"{type(layer).__name__} has no integer kernel in the engine")
            continue
        reason = ignored(path)
        if reason is not None:
            placement.left[path] = ("ignored", reason)
        elif path in shared:
            placement.left[path] = ("tied_weight", "its weight is tied to another layer's")
        elif any(_norm_follows(graph_module, node) for node in nodes):
            placement.left[path] = ("norm_follows", "a batch norm follows it: run FuseModules first")
        elif getattr(layer, "padding_mode", "zeros") != "zeros":
            placement.left[path] = ("padding", "its padding is not zeros")
        elif not all(_is_float32(node) for node in nodes):
            placement.left[path] = ("dtype", "it does not compute in float32")
        else:
            placement.layers.append(path)
            active.update(nodes)
    return active


def _shared_weights(graph_module: fx.GraphModule, calls: dict[str, list[fx.Node]]) -> set[str]:
    """Layers whose weight something else holds too."""
    holders: dict[int, list[str]] = {}
    for path in calls:
        weight = getattr(graph_module.get_submodule(path), "weight", None)
        if isinstance(weight, torch.Tensor):
            holders.setdefault(id(weight), []).append(path)
    return {path for paths in holders.values() if len(paths) > 1 for path in paths}


def _norm_follows(graph_module: fx.GraphModule, node: fx.Node) -> bool:
    return any(
        user.op == "call_module"
        and isinstance(graph_module.get_submodule(str(user.target)), nn.modules.batchnorm._BatchNorm)
        for user in node.users
    )


# --- every value around an integer operation --------------------------------------------------------------------


def _values(graph_module: fx.GraphModule, layers: set[fx.Node], placement: Placement, scheme: Scheme) -> None:
    active = set(layers)
    gates = GATES.keys() | set(GATES.values()) if scheme.split_gates else set()
    in_integers = _SAME_SCALE | _POOLS | _UNARY | _CLIPS | gates
    in_floats = _FLOAT_ACTIVATIONS - gates
    integer: set[fx.Node] = set(layers)  # values that an integer operation, or an activation behind one, makes
    for node in graph_module.graph.nodes:
        if node.op != "call_function" or not _is_float32(node):
            continue
        inputs = _tensors(node)
        if not inputs or not integer.issuperset(inputs):
            continue
        if node.target in in_integers or _is_binary(node) or _is_image_mean(node):
            active.add(node)
            integer.add(node)
        elif node.target in in_floats:
            integer.add(node)
    _keep_gates(active, in_floats)
    _drop_useless(active, layers)
    placement.operations = set(active)
    placement.gates = [node for node in graph_module.graph.nodes if node in active and node.target in GATES]
    scales = _Scales()
    for node in (n for n in graph_module.graph.nodes if n in active):
        inputs = _tensors(node)
        for value in (*inputs, node):
            if value is not node or not _gives_floats(graph_module, node, active):
                scales.add(value)
        if node.target in _SAME_SCALE:
            for value in inputs:
                scales.join(value, node)
    numbers = scales.numbers()
    for value, number in numbers.items():
        if not _is_clipped(value, active) and (scheme.results or not active.isdisjoint(value.users)):
            placement.values[value] = number
            placement.readers[value] = None


def _gives_floats(graph_module: fx.GraphModule, node: fx.Node, active: set[fx.Node]) -> bool:
    """Whether a linear layer's result is only read in floating point; the integer kernel gives that as it is."""
    is_linear = node.op == "call_module" and isinstance(_layer(graph_module, node), nn.Linear)
    return is_linear and not any(user in active for user in node.users)


def _keep_gates(active: set[fx.Node], in_floats: set[Any]) -> None:
    """A product right behind an activation in floating point is computed there too, and rounded once instead of twice.

    Such is squeeze-and-excitation behind a SiLU: the activation's other readers are the poolings of the gate, small
    in what they give, which read floating point as well.
    """
    for node in [node for node in active if node.target is aten.mul.Tensor]:
        for value in _tensors(node):
            others = [user for user in value.users if user is not node]
            whole = list(value.meta["val"].shape) == list(node.meta["val"].shape)
            if value.target in in_floats and whole and all(_is_global_pool(user) for user in others):
                active.difference_update((node, *others))


def _is_global_pool(node: fx.Node) -> bool:
    if node.target is aten.adaptive_avg_pool2d.default:
        return all(size == 1 for size in call_arguments(node)["output_size"])
    return _is_image_mean(node)


def _drop_useless(active: set[fx.Node], layers: set[fx.Node]) -> None:
    """Operations after the last layer gain nothing from integers, and cost accuracy."""
    for node in sorted(active - layers, reverse=True):
        if not any(user in active for user in node.users) and node.target not in _CLIPS:
            active.discard(node)


def _is_clipped(value: fx.Node, active: set[fx.Node]) -> bool:
    """Whether the only reader is a clip, which becomes part of the quantization behind it."""
    (user, *others) = value.users or (None,)
    return not others and user in active and user is not None and user.target in _CLIPS


class _Scales:
    """Which values share a scale: union-find over nodes."""

    def __init__(self) -> None:
        self._parent: dict[fx.Node, fx.Node] = {}

    def add(self, node: fx.Node) -> None:
        self._parent.setdefault(node, node)

    def _root(self, node: fx.Node) -> fx.Node:
        while self._parent[node] is not node:
            self._parent[node] = self._parent[self._parent[node]]
            node = self._parent[node]
        return node

    def join(self, left: fx.Node, right: fx.Node) -> None:
        self._parent[self._root(right)] = self._root(left)

    def numbers(self) -> dict[fx.Node, int]:
        roots: dict[fx.Node, int] = {}
        return {node: roots.setdefault(self._root(node), len(roots)) for node in self._parent}


# --- what layers read -------------------------------------------------------------------------------------------


def _inputs(graph_module: fx.GraphModule, layers: set[fx.Node], placement: Placement) -> None:
    placement.operations = set(layers)
    convolutions = {node for node in layers if isinstance(_layer(graph_module, node), nn.modules.conv._ConvNd)}
    readers: dict[fx.Node, set[fx.Node]] = {}
    for node in graph_module.graph.nodes:
        if node in layers:
            readers.setdefault(_tensors(node)[0], set()).add(node)
        elif node.op == "call_function" and node.target is aten.add.Tensor and _is_float32(node):
            skip = _skip_branch(node, convolutions)
            if skip is not None:
                readers.setdefault(skip, set()).add(node)
    for number, (value, own) in enumerate(readers.items()):
        placement.values[value] = number
        placement.readers[value] = own


def _skip_branch(node: fx.Node, convolutions: set[fx.Node]) -> fx.Node | None:
    """Of a residual addition the side that is not a convolution's own output: the convolution takes the addition up.

    Linear layers do not: what a transformer adds up keeps its range, which outliers make wide.
    """
    sides = _tensors(node)
    if len(sides) != 2 or sides[0] is sides[1]:
        return None
    own = [side for side in sides if side in convolutions and len(side.users) == 1]
    if not own:
        return None
    (skip,) = (side for side in sides if side is not own[-1])
    return skip if skip.op != "get_attr" else None


# --- nodes ------------------------------------------------------------------------------------------------------


def _tensors(node: fx.Node) -> Sequence[fx.Node]:
    if node.target is _LIMITS and all(item.op == "get_attr" for item in node.all_input_nodes[1:]):
        return node.all_input_nodes[:1]
    return [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), torch.Tensor)]


def _layer(graph_module: fx.GraphModule, node: fx.Node) -> nn.Module:
    return graph_module.get_submodule(str(node.target))


def _is_float32(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.dtype == torch.float32


def _is_binary(node: fx.Node) -> bool:
    if node.target not in _BINARY:
        return False
    a: dict[str, Any] = call_arguments(node)
    return isinstance(a["self"], fx.Node) and isinstance(a["other"], fx.Node) and a.get("alpha", 1) == 1


def _is_image_mean(node: fx.Node) -> bool:
    """A mean over height and width: a global average pooling."""
    if node.target is not aten.mean.dim:
        return False
    a: dict[str, Any] = call_arguments(node)
    value = a["self"].meta["val"]
    return value.dim() == 4 and a["dim"] is not None and sorted(d % 4 for d in a["dim"]) == [2, 3]
