"""Which ATen call is which ``torch.nn`` layer, and back to its arguments.

One rule per operation: given the call's arguments by their schema names, it builds the layer on the meta device (no
memory, no initialisation) and says which tensor goes where. The caller puts the tensors in.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

__all__ = ["RULES", "Layer"]

aten = torch.ops.aten


@dataclass
class Layer:
    """A layer to put in the place of a call: ``module(*inputs)``.

    Attributes:
        tensors: name of a parameter or buffer of ``module`` → the ``get_attr`` node that holds it.
        kind: a short name used where the user's model has none for the layer.
        key: with equal key and tensors, two calls are one layer called twice.
        nested_state: results after the first are one nested tuple, as ``nn.LSTM`` returns them.
    """

    module: nn.Module
    inputs: tuple[Any, ...]
    tensors: dict[str, fx.Node]
    kind: str
    nested_state: bool = False

    @property
    def key(self) -> str:
        return repr(self.module)


Arguments = dict[str, Any]
Rule = Callable[[Arguments], Layer | None]


def shape(node: fx.Node) -> tuple[int, ...]:
    """Sizes of a weight."""
    return tuple(int(size) for size in node.meta["val"].shape)


def rank(node: fx.Node) -> int | None:
    """Number of dims of a value; None in a graph without shapes."""
    value = node.meta.get("val")
    return value.dim() if isinstance(value, torch.Tensor) else None


def _tensors(arguments: Arguments, **names: str) -> dict[str, fx.Node]:
    return {own: arguments[given] for own, given in names.items() if isinstance(arguments[given], fx.Node)}


def _dtype(node: fx.Node) -> torch.dtype:
    dtype = node.meta["val"].dtype
    assert isinstance(dtype, torch.dtype)
    return dtype


def _linear(a: Arguments) -> Layer | None:
    if len(shape(a["weight"])) != 2:
        return None
    rows, columns = shape(a["weight"])
    module = nn.Linear(columns, rows, bias=a["bias"] is not None, device="meta")
    return Layer(module, (a["input"],), _tensors(a, weight="weight", bias="bias"), "linear")


def _convolution(rank: int, transposed: bool = False) -> Rule:
    plain = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[rank - 1]
    back = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[rank - 1]

    def full(value: Any) -> Any:
        if isinstance(value, str):
            return value
        value = list(value) if isinstance(value, (list, tuple)) else [value]
        return tuple(value * rank if len(value) == 1 else value)

    def rule(a: Arguments) -> Layer | None:
        first, second, *kernel = shape(a["weight"])
        groups = a["groups"]
        common = {
            "kernel_size": tuple(kernel),
            "stride": full(a["stride"]),
            "padding": full(a["padding"]),
            "dilation": full(a["dilation"]),
            "groups": groups,
            "bias": a["bias"] is not None,
            "device": "meta",
        }
        module: nn.Module
        if transposed:
            module = back(first, second * groups, output_padding=full(a["output_padding"]), **common)
        else:
            module = plain(second * groups, first, **common)
        kind = f"conv_transpose{rank}d" if transposed else f"conv{rank}d"
        return Layer(module, (a["input"],), _tensors(a, weight="weight", bias="bias"), kind)

    return rule


def _batch_norm(a: Arguments) -> Layer | None:
    if a["training"] and a["running_mean"] is not None:
        return None
    if (a["running_mean"] is None) != (a["running_var"] is None):
        return None
    tensors = _tensors(a, weight="weight", bias="bias", running_mean="running_mean", running_var="running_var")
    if not tensors or ("weight" in tensors) != ("bias" in tensors):
        return None
    dims = rank(a["input"])
    classes: dict[int | None, Any] = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
    if dims not in classes:
        return None
    width = shape(next(iter(tensors.values())))[0]
    module = classes[dims](
        width,
        eps=a["eps"],
        momentum=a["momentum"],
        affine="weight" in tensors,
        track_running_stats="running_mean" in tensors,
        device="meta",
    )
    return Layer(module, (a["input"],), tensors, "batch_norm")


def _layer_norm(a: Arguments) -> Layer | None:
    if a["weight"] is None:
        return None
    module = nn.LayerNorm(list(a["normalized_shape"]), eps=a["eps"], bias=a["bias"] is not None, device="meta")
    return Layer(module, (a["input"],), _tensors(a, weight="weight", bias="bias"), "layer_norm")


def _rms_norm(a: Arguments) -> Layer | None:
    if a["weight"] is None:
        return None
    module = nn.RMSNorm(list(a["normalized_shape"]), eps=a["eps"], device="meta")
    return Layer(module, (a["input"],), _tensors(a, weight="weight"), "rms_norm")


def _group_norm(a: Arguments) -> Layer | None:
    tensors = _tensors(a, weight="weight", bias="bias")
    if set(tensors) != {"weight", "bias"}:
        return None
    module = nn.GroupNorm(a["num_groups"], shape(a["weight"])[0], eps=a["eps"], device="meta")
    return Layer(module, (a["input"],), tensors, "group_norm")


def _instance_norm(a: Arguments) -> Layer | None:
    tensors = _tensors(a, weight="weight", bias="bias", running_mean="running_mean", running_var="running_var")
    dims = rank(a["input"])
    classes: dict[int | None, Any] = {3: nn.InstanceNorm1d, 4: nn.InstanceNorm2d, 5: nn.InstanceNorm3d}
    tracked = "running_mean" in tensors
    if dims not in classes or set(tensors) not in (
        {"weight", "bias"},
        {"running_mean", "running_var"},
        {"weight", "bias", "running_mean", "running_var"},
    ):
        return None
    if a["use_input_stats"] == tracked:  # the layer normalises by its running statistics in eval mode, if it has any
        return None
    module = classes[dims](
        shape(next(iter(tensors.values())))[0],
        eps=a["eps"],
        momentum=a["momentum"],
        affine="weight" in tensors,
        track_running_stats=tracked,
        device="meta",
    )
    return Layer(module, (a["input"],), tensors, "instance_norm")


def _embedding(a: Arguments) -> Layer | None:
    if a["scale_grad_by_freq"] or a["sparse"]:
        return None
    count, width = shape(a["weight"])
    padding = a["padding_idx"]
    module = nn.Embedding(count, width, padding_idx=padding if padding >= 0 else None, device="meta")
    return Layer(module, (a["indices"],), _tensors(a, weight="weight"), "embedding")


def _prelu(a: Arguments) -> Layer | None:
    if len(shape(a["weight"])) != 1:
        return None
    return Layer(nn.PReLU(shape(a["weight"])[0], device="meta"), (a["self"],), _tensors(a, weight="weight"), "prelu")


def _bilinear(a: Arguments) -> Layer | None:
    out, left, right = shape(a["weight"])
    module = nn.Bilinear(left, right, out, bias=a["bias"] is not None, device="meta")
    return Layer(module, (a["input1"], a["input2"]), _tensors(a, weight="weight", bias="bias"), "bilinear")


def _recurrent(kind: str) -> Rule:
    gates = {"lstm": 4, "gru": 3}.get(kind, 1)

    def rule(a: Arguments) -> Layer | None:
        weights = list(a["params"])
        directions = 2 if a["bidirectional"] else 1
        per_cell = len(weights) // (a["num_layers"] * directions)
        projected = per_cell % 2 == 1
        if len(weights) != per_cell * a["num_layers"] * directions:
            return None
        options: dict[str, Any] = {
            "num_layers": a["num_layers"],
            "bias": a["has_biases"],
            "batch_first": a["batch_first"],
            "dropout": a["dropout"],
            "bidirectional": a["bidirectional"],
            "device": "meta",
        }
        if projected:
            options["proj_size"] = shape(weights[per_cell - 1])[0]
        hidden = shape(weights[0])[0] // gates
        module: nn.RNNBase
        if kind == "lstm":
            module = nn.LSTM(shape(weights[0])[1], hidden, **options)
        elif kind == "gru":
            module = nn.GRU(shape(weights[0])[1], hidden, **options)
        else:
            module = nn.RNN(shape(weights[0])[1], hidden, nonlinearity=kind.removeprefix("rnn_"), **options)
        names = [name for layer in module._all_weights for name in layer]
        state = a["hx"]
        states = list(state) if isinstance(state, (list, tuple)) else [state]
        if all(_is_zeros(item) for item in states):  # what the layer starts from by itself
            inputs: tuple[Any, ...] = (a["input"],)
        else:
            inputs = (a["input"], tuple(states) if kind == "lstm" else states[0])
        tensors = dict(zip(names, weights, strict=True))
        return Layer(module, inputs, tensors, kind.partition("_")[0], nested_state=kind == "lstm")

    return rule


def _is_zeros(node: object) -> bool:
    return isinstance(node, fx.Node) and node.target is aten.zeros.default


def _dropout(make: Callable[[float, int | None], nn.Module | None]) -> Rule:
    def rule(a: Arguments) -> Layer | None:
        if a["train"]:  # dropout that the user switched on in eval mode stays what it is
            return None
        module = make(a["p"], rank(a["input"]))
        return None if module is None else Layer(module, (a["input"],), {}, "dropout")

    return rule


def _feature_dropout(p: float, rank: int | None) -> nn.Module | None:
    made = {3: nn.Dropout1d, 4: nn.Dropout2d, 5: nn.Dropout3d}.get(rank or 0)
    return None if made is None else made(p)


def _rrelu(a: Arguments) -> Layer | None:
    if a["training"]:
        return None
    return Layer(nn.RReLU(a["lower"], a["upper"]), (a["self"],), {}, "rrelu")


RULES: dict[Any, Rule] = {
    aten.linear.default: _linear,
    aten.conv1d.default: _convolution(1),
    aten.conv2d.default: _convolution(2),
    aten.conv3d.default: _convolution(3),
    aten.conv1d.padding: _convolution(1),
    aten.conv2d.padding: _convolution(2),
    aten.conv3d.padding: _convolution(3),
    aten.conv_transpose1d.default: _convolution(1, transposed=True),
    aten.conv_transpose2d.input: _convolution(2, transposed=True),
    aten.conv_transpose3d.input: _convolution(3, transposed=True),
    aten.batch_norm.default: _batch_norm,
    aten.layer_norm.default: _layer_norm,
    aten.rms_norm.default: _rms_norm,
    aten.group_norm.default: _group_norm,
    aten.instance_norm.default: _instance_norm,
    aten.embedding.default: _embedding,
    aten.prelu.default: _prelu,
    aten.bilinear.default: _bilinear,
    aten.lstm.input: _recurrent("lstm"),
    aten.gru.input: _recurrent("gru"),
    aten.rnn_tanh.input: _recurrent("rnn_tanh"),
    aten.rnn_relu.input: _recurrent("rnn_relu"),
    aten.dropout.default: _dropout(lambda p, rank: nn.Dropout(p)),
    aten.feature_dropout.default: _dropout(_feature_dropout),
    aten.alpha_dropout.default: _dropout(lambda p, rank: nn.AlphaDropout(p)),
    aten.feature_alpha_dropout.default: _dropout(lambda p, rank: nn.FeatureAlphaDropout(p)),
    aten.rrelu.default: _rrelu,
}
