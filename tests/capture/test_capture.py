"""Capture keeps what the user's model is: its structure, names, ties, behaviour in training, and the model itself."""

from __future__ import annotations

import copy
from collections import OrderedDict, namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fxcompress.capture import capture
from fxcompress.errors import PreconditionError
from fxcompress.graph.info import info
from fxcompress.graph.names import original_name
from fxcompress.graph.verify import verify
from tests.capture.helpers import call, check, same, targets

T = torch.Tensor
Pair = namedtuple("Pair", ["left", "right"])

pytestmark = pytest.mark.filterwarnings(
    "ignore:LSTM with projections is not supported with oneDNN:UserWarning",
    "ignore:dropout option adds dropout after all but last recurrent layer:UserWarning",
)


@dataclass
class Batch:
    left: T
    right: T
    scale: T | None = None


class Of(nn.Module):
    """A model of parts and one function of them and the inputs."""

    def __init__(self, function: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        for name, part in parts.items():
            if isinstance(part, T) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)
        self.function = function

    def forward(self, x: T) -> Any:
        return self.function(self, x)


# --- structure -------------------------------------------------------------------------------------------------


class Keywords(nn.Module):
    def forward(self, x: T, *, minus: T, times: T, flag: bool = True, scale: float = 2.0, none: T | None = None) -> T:
        return (x - minus) * times * scale if flag and none is None else x


def test_keyword_arguments_in_any_order() -> None:
    x, minus, times = (torch.randn(2, 4) for _ in range(3))
    given = {"times": times, "x": x, "minus": minus}
    graph = check(Keywords(), given, {name: torch.randn(3, 4) for name in given})
    assert info(graph).parameter_names == ("x", "minus", "times")
    assert torch.equal(graph(x, minus=minus, times=times), graph(**given))
    assert [node.name for node in graph.graph.find_nodes(op="placeholder")] == ["x", "minus", "times"]


class Nested(nn.Module):
    def forward(self, tree: dict[str, Any], pair: tuple[T, list[T]]) -> Any:
        first = tree["a"] + pair[0]
        return OrderedDict(sum=first, rest=(pair[1][0] * 2, [tree["b"]["c"], None, 7, 0.5, "text"]))


def test_nested_inputs_and_outputs() -> None:
    def inputs(n: int) -> tuple[Any, ...]:
        return {"a": torch.randn(n, 3), "b": {"c": torch.randn(n, 2)}}, (torch.randn(n, 3), [torch.randn(n, 1)])

    graph = check(Nested(), inputs(2), inputs(3))
    assert type(call(graph, inputs(2))) is OrderedDict


class Structured(nn.Module):
    def forward(self, batch: Batch, pair: Pair) -> Batch:
        return Batch(batch.left + pair.left, batch.right * pair.right)


def test_dataclasses_and_namedtuples() -> None:
    def inputs(n: int) -> tuple[Any, ...]:
        return Batch(torch.randn(n, 3), torch.randn(n, 3)), Pair(torch.randn(n, 3), torch.randn(n, 3))

    graph = check(Structured(), inputs(2), inputs(3))
    assert isinstance(call(graph, inputs(2)), Batch)


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: x,
        lambda m, x: (x, x),
        lambda m, x: [x * 2],
        lambda m, x: {"y": x + 1, "x": x},
        lambda m, x: Pair(x, x + 1),
        lambda m, x: torch.max(x, 1),
        lambda m, x: (x.shape[0], x.shape[1], x),
        lambda m, x: ({"a": [x, (x, None)]}, 3, "text", None, True),
        lambda m, x: m.weight,
        lambda m, x: (x * m.weight, m.weight),
    ],
    ids=["input", "twice", "list", "dict", "namedtuple", "return_types", "sizes", "nested", "weight", "weight_too"],
)
def test_outputs(function: Callable[..., Any]) -> None:
    check(Of(function, weight=nn.Parameter(torch.randn(4))), (torch.randn(2, 4),), (torch.randn(3, 4),))


class Variadic(nn.Module):
    def forward(self, *tensors: T, **named: T) -> T:
        return tensors[0] + 2 * tensors[1] - named["a"] * named["b"]


def test_variadic_arguments() -> None:
    model = Variadic().eval()
    x, y, a, b = (torch.randn(2, 3) for _ in range(4))
    from fxcompress.capture.inputs import ExampleInputs

    graph = capture(model, ExampleInputs((x, y), {"b": b, "a": a}))
    verify(graph, shapes=True)
    assert torch.equal(graph(x, y, a=a, b=b), model(x, y, a=a, b=b))


class Switch(nn.Module):
    def forward(self, x: T, power: int = 1, mask: T | None = None, mode: str = "add") -> T:
        x = x**power if mode == "add" else -x
        return x if mask is None else x * mask


def test_values_that_are_no_tensors_become_part_of_the_graph() -> None:
    graph = check(Switch(), (torch.randn(2, 3), 2, None, "add"), (torch.randn(3, 3), 2, None, "add"))
    x = torch.randn(2, 3)
    for wrong in ((x, 3, None, "add"), (x, 2, torch.ones(2, 3), "add"), (x, 2, None, "other")):
        with pytest.raises(PreconditionError, match="captured with"):
            graph(*wrong)
    with pytest.raises(PreconditionError, match="captured with"):
        copy.deepcopy(graph)(x, 3, None, "add")


def test_a_call_of_another_structure_is_refused() -> None:
    pair = (torch.randn(2, 3), [torch.randn(2, 1)])
    graph = capture(Nested().eval(), ({"a": torch.randn(2, 3), "b": {"c": torch.randn(2, 2)}}, pair))
    with pytest.raises(PreconditionError, match="nested"):
        graph({"a": pair[0], "b": {}}, pair)
    with pytest.raises(PreconditionError, match="nested"):
        graph({"a": pair[0], "b": {"c": pair[0]}}, (*pair, pair[0]))


# --- layers and names ------------------------------------------------------------------------------------------

IMAGE = (torch.randn(2, 4, 8, 8),)
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
    graph(torch.tensor([[1, 2]])).sum().backward()
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


# --- training --------------------------------------------------------------------------------------------------


class Trained(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3)
        self.norm = nn.BatchNorm2d(4, momentum=None)
        self.drop = nn.Dropout(0.5)
        self.fc = nn.Linear(4, 3)

    def forward(self, x: T) -> T:
        return self.fc(self.drop(F.relu(self.norm(self.conv(x)))).mean((2, 3)))


def test_training_is_the_users_training() -> None:
    model = Trained().eval()
    graph = check(model, IMAGE)
    theirs = copy.deepcopy(model).train()
    ours = graph.train()
    for module in (theirs, ours):
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        for _ in range(3):
            torch.manual_seed(0)
            optimizer.zero_grad()
            module(*IMAGE).square().sum().backward()
            optimizer.step()
            # The graph shares memory with the user's model until somebody copies: see graph.ownership.
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor), name
    ours.eval()
    theirs.eval()
    assert torch.equal(ours(*IMAGE), theirs(*IMAGE))


def test_norm_statistics_of_the_users_model_never_move() -> None:
    from fxcompress.graph.ownership import own_weights

    model = Trained().eval()
    kept = copy.deepcopy(model.state_dict())
    graph = capture(model, IMAGE)
    own_weights(graph, [*model.parameters(), *model.buffers()])
    graph.train()
    graph(*IMAGE)
    assert not torch.equal(graph.norm.running_mean, model.norm.running_mean)
    assert all(torch.equal(kept[name], tensor) for name, tensor in model.state_dict().items())


def test_dropout_is_active_in_training_only() -> None:
    graph = check(nn.Sequential(nn.Dropout(0.5), nn.Linear(8, 8)), (torch.randn(2, 8),))
    x = torch.ones(4, 8)
    assert torch.equal(graph(x), graph(x))
    graph.train()
    assert not torch.equal(graph(x), graph(x))


def gradients(module: nn.Module, x: T) -> dict[str, bool]:
    module.zero_grad()
    module(x).sum().backward()
    return {name: p.grad is not None and bool(p.grad.abs().sum() > 0) for name, p in module.named_parameters()}


class NoGrad(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.how = how

    def forward(self, x: T) -> T:
        if self.how == "block":
            with torch.no_grad():
                y = self.a(x) * 2
        elif self.how == "detach":
            y = self.a(x).detach()
        elif self.how == "detach_":
            y = (self.a(x) + 1).detach_()
        elif self.how == "data":
            y = self.a(x).data
        else:
            with torch.no_grad():
                y = self.a(x)
                with torch.enable_grad():
                    y = self.b(y)
            return y + x
        return self.b(y + x)


@pytest.mark.parametrize("how", ["block", "detach", "detach_", "data", "enabled_again"])
def test_no_gradient_flows_where_the_user_stopped_it(how: str) -> None:
    model = NoGrad(how)
    graph = check(model, (torch.randn(2, 4),), (torch.randn(3, 4),))
    x = torch.randn(2, 4)
    expected = gradients(model, x) if how != "enabled_again" else None
    if expected is not None:
        assert gradients(graph, x) == expected == {"a.weight": False, "a.bias": False, "b.weight": True, "b.bias": True}


def test_detaching_an_input_leaves_no_node() -> None:
    graph = check(Of(lambda m, x: m.fc(x.detach() + 1), fc=nn.Linear(4, 4)), (torch.randn(2, 4),))
    assert targets(graph) == ["aten.add.Tensor", "Linear"]


def test_disabled_autocast_is_dropped() -> None:
    def function(m: Any, x: T) -> T:
        with torch.autocast("cpu", enabled=False):
            y = m.fc(x.float())
        return y * 2

    graph = check(Of(function, fc=nn.Linear(4, 4)), (torch.randn(2, 4),))
    assert targets(graph) == ["Linear", "aten.mul.Tensor"]


# --- sizes -----------------------------------------------------------------------------------------------------


def test_an_example_of_batch_one_still_gives_a_dynamic_batch() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(144, 3))
    graph = check(model, (torch.randn(1, 4, 8, 8),), (torch.randn(5, 4, 8, 8),))
    assert list(info(graph).dim_names.values()) == ["batch"]
    check(model, (torch.randn(2, 4, 8, 8),), (torch.randn(1, 4, 8, 8),))


def test_dims_on_request() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    shapes = {"input": {0: "batch", 2: "height", 3: "width"}}
    graph = check(model, (torch.randn(2, 4, 16, 24),), (torch.randn(3, 4, 32, 8),), dynamic_shapes=shapes)
    assert list(info(graph).dim_names.values()) == ["batch", "height", "width"]
    (x,) = graph.graph.find_nodes(op="placeholder")
    assert [type(size) for size in x.meta["val"].shape] == [torch.SymInt, int, torch.SymInt, torch.SymInt]


class Add(nn.Module):
    def forward(self, x: T, y: T) -> T:
        return x + y


def test_dims_of_one_name_are_one_symbol() -> None:
    shapes = {"x": {0: "batch", 1: "time"}, "y": {0: "batch", 1: "time"}}
    inputs, other = (torch.randn(2, 5), torch.randn(2, 5)), (torch.randn(4, 7), torch.randn(4, 7))
    graph = check(Add(), inputs, other, dynamic_shapes=shapes)
    assert list(info(graph).dim_names.values()) == ["batch", "time"]


def test_dims_of_parts() -> None:
    inputs = ({"a": torch.randn(2, 3), "b": {"c": torch.randn(4, 2)}}, (torch.randn(2, 3), [torch.randn(2, 1)]))
    shapes = {"tree": {"a": {0: "n"}, "b": None}, "pair": ({0: "n"}, [{0: "rows"}])}
    graph = capture(Nested().eval(), inputs, dynamic_shapes=shapes)
    assert list(info(graph).dim_names.values()) == ["n", "rows"]
    batch = (Batch(torch.randn(2, 3), torch.randn(4, 3)), Pair(torch.randn(2, 3), torch.randn(4, 3)))
    graph = capture(Structured().eval(), batch, dynamic_shapes=([{0: "n"}, {0: "m"}], ({0: "n"}, {0: "m"})))
    assert list(info(graph).dim_names.values()) == ["n", "m"]


def test_fixed_sizes() -> None:
    graph = check(nn.Linear(4, 3), (torch.randn(2, 4),), dynamic_shapes=None)
    assert info(graph).dim_names == {}
    assert all(
        isinstance(size, int) for node in graph.graph.nodes if node.op != "output" for size in node.meta["val"].shape
    )


def test_a_second_input_may_be_fixed_although_it_is_as_long_as_the_batch() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(2, 4)

        def forward(self, x: T, table: T) -> T:
            return x @ self.fc(table.t()).t().reshape(4, 2, 2).sum(1)

    graph = capture(Fixed().eval(), (torch.randn(2, 4), torch.randn(2, 4)))
    x, table = (node.meta["val"] for node in graph.graph.find_nodes(op="placeholder"))
    assert isinstance(x.shape[0], torch.SymInt) and isinstance(table.shape[0], int)


# --- other forms of model --------------------------------------------------------------------------------------


def small() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU(True), nn.Dropout(0.1), nn.Flatten(), nn.Linear(144, 3)
    ).eval()


def test_an_exported_program() -> None:
    model = small()
    program = torch.export.export(model, IMAGE, dynamic_shapes=({0: torch.export.Dim.DYNAMIC},), strict=False)
    graph = capture(program)
    verify(graph, shapes=True)
    assert targets(graph) == [
        "Conv2d",
        "BatchNorm2d",
        "aten.relu.default",
        "Dropout",
        "aten.flatten.using_ints",
        "Linear",
    ]
    x = torch.randn(3, 4, 8, 8)
    assert torch.equal(graph(x), model(x))
    assert set(graph.state_dict()) == set(model.state_dict())


def test_an_exported_program_with_keywords() -> None:
    model = Keywords().eval()
    given = {name: torch.randn(2, 4) for name in ("x", "minus", "times")}
    graph = capture(
        torch.export.export(model, (given["x"],), {"times": given["times"], "minus": given["minus"]}, strict=False)
    )
    assert torch.equal(graph(**given), model(**given))


def test_the_module_of_an_exported_program() -> None:
    model = small()
    module = torch.export.export(model, IMAGE, strict=False).module(check_guards=False)
    graph = capture(module, IMAGE, dynamic_shapes=None)
    verify(graph, shapes=True)
    assert torch.equal(graph(*IMAGE), model(*IMAGE))


def test_a_decomposed_program() -> None:
    model = small()
    program = torch.export.export(model, IMAGE, strict=False).run_decompositions({})
    graph = capture(program)
    verify(graph, shapes=True)
    torch.testing.assert_close(graph(*IMAGE), model(*IMAGE))


def test_a_traced_graph_module() -> None:
    model = small()
    graph = capture(torch.fx.symbolic_trace(model), IMAGE)
    verify(graph, shapes=True)
    assert torch.equal(graph(*IMAGE), model(*IMAGE))
    assert set(graph.state_dict()) == set(model.state_dict())


def test_a_compiled_module() -> None:
    model = small()
    graph = capture(torch.compile(model), IMAGE)
    assert set(graph.state_dict()) == set(model.state_dict())
    assert torch.equal(graph(*IMAGE), model(*IMAGE))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_callers_gradient_mode_does_not_matter(mode: Callable[[], Any]) -> None:
    model = NoGrad("block").eval()
    with mode():
        graph = capture(model, (torch.randn(2, 4),))
        traced = capture(model)
    for made in (graph, traced):
        assert gradients(made, torch.randn(2, 4)) == gradients(model, torch.randn(2, 4))


def test_a_captured_graph_is_copied() -> None:
    graph = capture(small(), IMAGE)
    again = capture(graph)
    assert again is not graph and torch.equal(again(*IMAGE), graph(*IMAGE))


def test_the_graph_can_be_exported_again() -> None:
    model = small()
    graph = capture(model, IMAGE)
    program = torch.export.export(graph, IMAGE, dynamic_shapes=({0: torch.export.Dim.DYNAMIC},), strict=False)
    again = capture(program)
    x = torch.randn(3, 4, 8, 8)
    assert torch.equal(again(x), model(x))


# --- the user's model ------------------------------------------------------------------------------------------


class Remembers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.noise = nn.Dropout(0.5)
        self.cache: dict[str, Any] = {}
        self.last: T | None = None

    def forward(self, x: T) -> T:
        self.last = x
        self.cache["x"] = x
        self.calls = getattr(self, "calls", 0) + 1
        return self.noise(self.fc(x))


def test_the_users_model_is_left_as_it_was() -> None:
    model = Remembers().eval()
    seen: list[str] = []
    handle = model.fc.register_forward_hook(lambda *_: seen.append("hook"))
    model.fc.bias.requires_grad_(False)
    model.fc.weight.grad = torch.ones_like(model.fc.weight)
    before = {name: (id(p), p._version, p.requires_grad) for name, p in model.named_parameters()}
    attributes = set(vars(model))
    torch.manual_seed(11)
    state = torch.get_rng_state()
    graph = capture(model, (torch.randn(2, 4),))
    torch.manual_seed(11)
    assert torch.equal(torch.get_rng_state(), state)
    capture(model, (torch.ones(2, 4),))
    assert torch.equal(torch.get_rng_state(), state)
    assert {name: (id(p), p._version, p.requires_grad) for name, p in model.named_parameters()} == before
    assert set(vars(model)) == attributes and model.last is None and model.cache == {}
    assert list(model.fc._forward_hooks) == [handle.id] and not model._forward_hooks
    assert not model.training and torch.equal(model.fc.weight.grad, torch.ones(4, 4))
    assert graph.fc.weight.grad is None and not graph.fc.bias.requires_grad and graph.fc.weight.requires_grad
    assert graph.fc.weight.data_ptr() == model.fc.weight.data_ptr() and graph.fc.weight is not model.fc.weight


def test_example_inputs_that_require_gradients() -> None:
    x = torch.randn(2, 4, requires_grad=True)
    graph = check(nn.Linear(4, 4), (x,))
    graph(x).sum().backward()
    assert x.grad is not None


def test_sizes_that_depend_on_data() -> None:
    check(Of(lambda m, x: x[x > 0].sum() + torch.nonzero(x).sum()), (torch.randn(2, 4),), (torch.randn(3, 4),))


def test_hooks_take_part() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    model[0].register_forward_hook(lambda module, args, output: output * 3)
    assert targets(check(model, (torch.randn(2, 4),))) == ["Linear", "aten.mul.Tensor", "aten.relu.default"]


def test_parametrizations_take_part() -> None:
    model = nn.Sequential(torch.nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)))
    check(model, (torch.randn(2, 4),), (torch.randn(3, 4),))


def test_constants_and_plain_tensors() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.plain = torch.randn(4)
            self.register_buffer("hidden", torch.randn(4), persistent=False)

        def forward(self, x: T) -> T:
            return x * self.plain + torch.tensor([1.0, 2, 3, 4]) + self.hidden

    model = Plain()
    graph = check(model, (torch.randn(2, 4),), (torch.randn(3, 4),))
    assert not graph.state_dict() and "hidden" in dict(graph.named_buffers())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)).to(dtype)
    check(model, (IMAGE[0].to(dtype),), (torch.randn(3, 4, 8, 8).to(dtype),))


def test_the_meta_device() -> None:
    with torch.device("meta"):
        model = small()
    graph = capture(model.eval(), (torch.randn(2, 4, 8, 8, device="meta"),))
    verify(graph, shapes=True)
    assert graph(torch.randn(3, 4, 8, 8, device="meta")).shape == (3, 3)
