"""Operations with weights become layers under the user's names, and tied weights stay tied."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fxcompress.capture import capture
from fxcompress.graph.names import original_name
from fxcompress.graph.verify import verify
from tests.capture.helpers import Of, call, check, same, targets

T = torch.Tensor
IMAGE = (torch.randn(2, 4, 8, 8),)

pytestmark = pytest.mark.filterwarnings(
    "ignore:LSTM with projections is not supported with oneDNN:UserWarning",
    "ignore:dropout option adds dropout after all but last recurrent layer:UserWarning",
)


# --- layers and names ------------------------------------------------------------------------------------------

SEQUENCE = (torch.randn(2, 4, 8),)
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[T, ...], list[str]]] = {
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, bias=False), SEQUENCE, ["Conv1d"]),
    "conv2d": (lambda: nn.Conv2d(4, 6, (3, 1), padding=(1, 0), groups=2, dilation=2), IMAGE, ["Conv2d"]),
    "conv3d": (lambda: nn.Conv3d(4, 2, 3), (torch.randn(2, 4, 4, 4, 4),), ["Conv3d"]),
    "same": (lambda: nn.Conv2d(4, 6, 3, padding="same"), IMAGE, ["Conv2d"]),
    "valid": (lambda: nn.Conv2d(4, 6, 3, padding="valid"), IMAGE, ["Conv2d"]),
    "circular": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), IMAGE, ["aten.pad.default", "Conv2d"]),
    "transposed": (
        lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2, dilation=2),
        IMAGE,
        ["ConvTranspose2d"],
    ),
    "transposed1d": (lambda: nn.ConvTranspose1d(4, 6, 3, stride=2), SEQUENCE, ["ConvTranspose1d"]),
    "linear": (lambda: nn.Linear(8, 3), IMAGE, ["Linear"]),
    "bilinear": (
        lambda: Of(lambda m, x: m.b(x, x + 1), b=nn.Bilinear(8, 8, 3)),
        IMAGE,
        ["aten.add.Tensor", "Bilinear"],
    ),
    "batch_norm": (lambda: nn.BatchNorm2d(4, eps=1e-3, momentum=0.3), IMAGE, ["BatchNorm2d"]),
    "not_affine": (lambda: nn.BatchNorm2d(4, affine=False), IMAGE, ["BatchNorm2d"]),
    "no_statistics": (lambda: nn.BatchNorm2d(4, track_running_stats=False), IMAGE, ["BatchNorm2d"]),
    "batch_norm_1d": (lambda: nn.BatchNorm1d(4), SEQUENCE, ["BatchNorm1d"]),
    "batch_norm_flat": (lambda: nn.BatchNorm1d(4), (torch.randn(2, 4),), ["BatchNorm1d"]),
    "batch_norm_3d": (lambda: nn.BatchNorm3d(4), (torch.randn(2, 4, 2, 2, 2),), ["BatchNorm3d"]),
    "layer_norm": (lambda: nn.LayerNorm((8, 8), eps=1e-3), IMAGE, ["LayerNorm"]),
    "layer_norm_plain": (lambda: nn.LayerNorm(8, elementwise_affine=False), IMAGE, ["aten.layer_norm.default"]),
    "layer_norm_no_bias": (lambda: nn.LayerNorm(8, bias=False), IMAGE, ["LayerNorm"]),
    "rms_norm": (lambda: nn.RMSNorm(8), IMAGE, ["RMSNorm"]),
    "group_norm": (lambda: nn.GroupNorm(2, 4), IMAGE, ["GroupNorm"]),
    "instance_norm": (lambda: nn.InstanceNorm2d(4), IMAGE, ["aten.instance_norm.default"]),
    "instance_affine": (lambda: nn.InstanceNorm2d(4, affine=True), IMAGE, ["InstanceNorm2d"]),
    "instance_tracked": (
        lambda: nn.InstanceNorm2d(4, affine=True, track_running_stats=True),
        IMAGE,
        ["InstanceNorm2d"],
    ),
    "embedding": (lambda: nn.Embedding(9, 4, padding_idx=0), (torch.randint(0, 9, (2, 5)),), ["Embedding"]),
    "prelu": (lambda: nn.PReLU(4), IMAGE, ["PReLU"]),
    "dropouts": (
        lambda: nn.Sequential(nn.Dropout(0.2), nn.Dropout2d(0.3), nn.AlphaDropout(0.4), nn.FeatureAlphaDropout(0.1)),
        IMAGE,
        ["Dropout", "Dropout2d", "AlphaDropout", "FeatureAlphaDropout"],
    ),
    "rrelu": (lambda: nn.RReLU(0.1, 0.3), IMAGE, ["RReLU"]),
}


@pytest.mark.parametrize("case", LAYERS)
def test_layers_are_raised(case: str) -> None:
    make, inputs, expected = LAYERS[case]
    model = nn.Sequential(OrderedDict(inner=make()))
    torch.manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.track_running_stats:
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    other = tuple(torch.cat([x, x[:1]]) for x in inputs)
    graph = check(model, inputs, other)
    assert targets(graph) == expected
    assert list(graph.state_dict()) == list(model.state_dict())
    for path, theirs in model.named_modules():
        ours = dict(graph.named_modules()).get(path)
        if ours is not None and not list(theirs.children()) and case != "circular":
            assert repr(ours) == repr(theirs)


RECURRENT: dict[str, Callable[[], nn.Module]] = {
    "lstm": lambda: nn.LSTM(4, 5),
    "batch_first": lambda: nn.LSTM(4, 5, batch_first=True),
    "deep": lambda: nn.LSTM(4, 5, num_layers=2, bidirectional=True, dropout=0.3, batch_first=True),
    "projected": lambda: nn.LSTM(4, 5, proj_size=3, num_layers=2, batch_first=True),
    "no_bias": lambda: nn.LSTM(4, 5, bias=False, batch_first=True),
    "gru": lambda: nn.GRU(4, 5, num_layers=2, bidirectional=True, batch_first=True),
    "rnn": lambda: nn.RNN(4, 5, nonlinearity="relu", batch_first=True),
    "tanh": lambda: nn.RNN(4, 5, batch_first=True),
}


@pytest.mark.parametrize("case", RECURRENT)
def test_recurrent_layers(case: str) -> None:
    layer = RECURRENT[case]()
    model = Of(lambda m, x: m.layer(x), layer=layer)
    # Without batch_first dim 0 is time; it is dynamic all the same.
    graph = check(model, (torch.randn(3, 6, 4),), (torch.randn(5, 6, 4),))
    (node,) = graph.graph.find_nodes(op="call_module")
    assert node.target == "layer" and repr(graph.layer) == repr(layer)
    assert list(graph.state_dict()) == list(model.state_dict())


class WithState(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.layer = nn.LSTM(4, 5, batch_first=True) if kind == "lstm" else nn.GRU(4, 5, batch_first=True)

    def forward(self, x: T, h: T, c: T) -> Any:
        return self.layer(x, (h, c)) if self.kind == "lstm" else self.layer(x, h + c)


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_recurrent_layers_from_a_given_state(kind: str) -> None:
    def inputs(n: int) -> tuple[T, ...]:
        return torch.randn(n, 6, 4), torch.randn(1, n, 5), torch.randn(1, n, 5)

    graph = capture(WithState(kind).eval(), inputs(2), dynamic_shapes=({0: "batch"}, {1: "batch"}, {1: "batch"}))
    verify(graph, shapes=True)
    x = inputs(3)
    model = WithState(kind).eval()
    model.load_state_dict(graph.state_dict())
    same(call(model, x), call(graph, x))


class Functional(nn.Module):
    """Layers written as functions of parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(6, 4, 3, 3))
        self.weight = nn.Parameter(torch.randn(3, 6))
        self.bias = nn.Parameter(torch.randn(3))
        self.gain = nn.Parameter(torch.randn(6))
        self.table = nn.Parameter(torch.randn(1, 6, 1, 1))
        self.register_buffer("fixed", torch.randn(6, 6))

    def forward(self, x: T) -> T:
        x = F.conv2d(x, self.kernel, padding=1) + self.table
        x = F.group_norm(x, 2, self.gain, self.gain).mean((2, 3))
        return F.linear(F.linear(x, self.fixed), self.weight, self.bias)


def test_functions_of_parameters_are_layers_too() -> None:
    model = Functional()
    graph = check(model, (torch.randn(2, 4, 8, 8),), (torch.randn(3, 4, 8, 8),))
    assert [name for name in targets(graph) if "aten" not in name] == ["Conv2d", "GroupNorm", "Linear"]
    assert set(graph.state_dict()) == set(model.state_dict())
    assert [n.target for n in graph.graph.find_nodes(op="get_attr")] == ["table", "fixed"]


class Attends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.cross = nn.MultiheadAttention(8, 2, kdim=6, vdim=5, batch_first=True, add_bias_kv=True)

    def forward(self, x: T, key: T, value: T) -> tuple[T, T]:
        y, _ = self.attention(x, x, x, need_weights=False)
        return self.cross(y, key, value)


def test_attention_keeps_its_names() -> None:
    def inputs(n: int) -> tuple[T, ...]:
        return torch.randn(n, 5, 8), torch.randn(n, 4, 6), torch.randn(n, 4, 5)

    model = Attends()
    # Without gradients nn.MultiheadAttention takes one fused kernel, which rounds otherwise.
    graph = check(model, inputs(2), inputs(3), exact=False)
    assert set(graph.state_dict()) == set(model.state_dict())
    assert original_name(graph, "attention.in_proj.weight") == "attention.in_proj_weight"
    _loads_both_ways(model, graph, inputs(2), exact=False)


def _loads_both_ways(model: nn.Module, graph: nn.Module, inputs: Any, *, exact: bool = True) -> None:
    torch.manual_seed(3)
    other = copy.deepcopy(model)
    for tensor in [*other.parameters(), *other.buffers()]:
        if tensor.is_floating_point():
            tensor.data = torch.rand_like(tensor) + 0.5
    copied = copy.deepcopy(graph)
    from fxcompress.graph.names import keep_original_names

    keep_original_names(copied)
    assert not copied.load_state_dict(other.state_dict()).missing_keys
    same(call(other, inputs), call(copied, inputs), exact=exact)
    again = copy.deepcopy(model)
    again.load_state_dict(copied.state_dict())
    same(call(again, inputs), call(copied, inputs), exact=exact)


def test_state_dicts_load_both_ways() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 3)).eval()
    graph = check(model, IMAGE)
    _loads_both_ways(model, graph, IMAGE)


# --- ties ------------------------------------------------------------------------------------------------------


class TiedHead(nn.Module):
    def __init__(self, transposed: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 6)
        self.transposed = transposed
        if not transposed:
            self.head = nn.Linear(6, 10, bias=False)
            self.head.weight = self.embedding.weight

    def forward(self, ids: T) -> T:
        x = self.embedding(ids)
        return x @ self.embedding.weight.t() if self.transposed else self.head(x)


@pytest.mark.parametrize("transposed", [False, True])
def test_tied_weights_stay_one_parameter(transposed: bool) -> None:
    model = TiedHead(transposed)
    graph = check(model, (torch.randint(0, 10, (2, 5)),), (torch.randint(0, 10, (3, 5)),))
    assert len(list(graph.parameters())) == 1
    assert list(graph.state_dict()) == list(model.state_dict())
    # One step moves both uses.
    graph(torch.tensor([[1, 2, 3, 4, 5]])).sum().backward()
    (parameter,) = graph.parameters()
    torch.optim.SGD([parameter], lr=1.0).step()
    assert torch.equal(graph.embedding.weight, parameter)
    assert transposed or graph.head.weight is parameter


def test_a_module_called_twice_is_one_layer() -> None:
    model = Of(lambda m, x: m.fc(F.relu(m.fc(x))), fc=nn.Linear(4, 4))
    graph = check(model, (torch.randn(2, 4),))
    assert [node.target for node in graph.graph.find_nodes(op="call_module")] == ["fc", "fc"]


def test_one_weight_with_two_strides_is_two_layers_of_one_weight() -> None:
    weight = nn.Parameter(torch.randn(4, 4, 3, 3))
    model = Of(lambda m, x: F.conv2d(x, m.w, padding=1) + F.conv2d(x, m.w, stride=1, padding=2, dilation=2), w=weight)
    graph = check(model, IMAGE)
    layers = [graph.get_submodule(str(n.target)) for n in graph.graph.find_nodes(op="call_module")]
    assert len(layers) == 2 and layers[0] is not layers[1] and layers[0].weight is layers[1].weight
    assert list(graph.state_dict()) == ["w"]


def test_one_module_under_two_names() -> None:
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    graph = check(model, (torch.randn(2, 4),))
    assert len(list(graph.parameters())) == 2
    assert set(graph.state_dict()) <= set(model.state_dict())
