"""Without example inputs: the graph computes what the model does, in the form that an export has."""

from __future__ import annotations

import copy
from collections import Counter, namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fxcompress.capture import capture
from fxcompress.errors import CaptureError, PreconditionError
from fxcompress.graph import serialize
from fxcompress.graph.edit import GraphEditor, copy_graph
from fxcompress.graph.info import info
from fxcompress.graph.shapes import require_shapes
from fxcompress.graph.verify import verify
from tests.capture.helpers import call, same, targets

T = torch.Tensor
Pair = namedtuple("Pair", ["left", "right"])


@dataclass
class Scores:
    logits: T
    hidden: T | None = None


class Of(nn.Module):
    """A model of parts and one function of them and the input."""

    def __init__(self, function: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        for name, part in parts.items():
            if isinstance(part, T) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)
        self.function = function

    def forward(self, x: T) -> Any:
        return (
            self.function(x)
            if len(self._modules) + len(self._parameters) + len(self._buffers) == 0
            else (self.function(self, x))
        )


def traced(model: nn.Module, *inputs: Any, exact: bool = True) -> torch.fx.GraphModule:
    """Trace ``model`` and compare with it."""
    model.eval()
    before = copy.deepcopy(dict(model.state_dict()))
    graph = capture(model)
    verify(graph)
    assert not info(graph).has_shapes
    assert all("val" not in node.meta for node in graph.graph.nodes)
    same(call(model, inputs), call(graph, inputs), exact=exact)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    return graph


# --- models ----------------------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.scale = nn.Parameter(torch.randn(width, 1, 1))

    def forward(self, x: T) -> T:
        out = self.relu(self.norm1(self.conv1(x)))
        out = self.conv2(out) * self.scale
        out += x
        return self.relu(out)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU6(True), nn.MaxPool2d(2))
        self.block = Block(8)
        self.drop = nn.Dropout(0.3, inplace=True)
        self.head = nn.Linear(8, 5)

    def forward(self, x: T) -> T:
        x = self.block(self.stem(x))
        x = F.adaptive_avg_pool2d(x, (1, 1))
        x = x.view(x.size(0), -1)
        return self.head(self.drop(x))


def test_a_residual_network() -> None:
    model = Net()
    graph = traced(model, torch.randn(2, 3, 17, 17))
    exported = capture(model, (torch.randn(2, 3, 17, 17),))
    assert Counter(targets(graph)) - Counter(targets(exported)) <= Counter({"aten.sym_size.int": 1})
    assert list(graph.state_dict()) == list(model.state_dict())
    assert all(node.meta.get("stack_trace") for node in graph.graph.nodes if node.op == "call_function")
    x = torch.randn(5, 3, 33, 33)
    assert torch.equal(graph(x), model(x))


def test_it_trains_like_the_model() -> None:
    model = Net().eval()
    ours, theirs = capture(model).train(), copy.deepcopy(model).train()
    x = torch.randn(4, 3, 17, 17)
    for module in (theirs, ours):
        torch.manual_seed(0)
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        module(x).square().sum().backward()
        optimizer.step()
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor), name
    assert not torch.equal(model.block.norm1.running_mean, ours.block.norm1.running_mean)


class Sequence(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.lstm = nn.LSTM(8, 6, bidirectional=True, batch_first=True)
        self.gru = nn.GRU(12, 5, batch_first=True)
        self.norm = nn.LayerNorm(5)
        self.head = nn.Linear(5, 20, bias=False)

    def forward(self, ids: T) -> tuple[T, T]:
        x, (h, c) = self.lstm(self.embedding(ids))
        x, last = self.gru(x)
        return self.head(self.norm(x)), h.sum() + c.sum() + last.sum()


def test_recurrent_layers_and_embeddings() -> None:
    graph = traced(Sequence(), torch.randint(0, 20, (2, 7)))
    assert {"Embedding", "LSTM", "GRU", "LayerNorm", "Linear"} <= set(targets(graph))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.head = nn.Linear(8, 20, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: T) -> T:
        return self.head(self.embedding(ids)) + F.linear(self.embedding(ids), self.embedding.weight)


def test_tied_weights_stay_tied() -> None:
    model = Tied()
    graph = traced(model, torch.randint(0, 20, (2, 7)))
    assert len(list(graph.parameters())) == 1
    assert set(graph.state_dict()) == set(model.state_dict())


class Attention(nn.Module):
    """Written out: the way to attention that needs no example inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)
        self.out = nn.Linear(8, 8)

    def forward(self, x: T) -> T:
        b, n, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
        scores = (q @ k.transpose(-2, -1)) / 4**0.5
        y = scores.softmax(dim=-1) @ v + F.scaled_dot_product_attention(q, k, v)
        return self.out(y.transpose(1, 2).reshape(b, n, 8))


def test_attention() -> None:
    traced(Attention(), torch.randn(2, 5, 8))


class Weights(nn.Module):
    """Weights computed from weights, and layers written as functions."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(6, 4, 3, 3))
        self.gain = nn.Parameter(torch.randn(6))
        self.plain = torch.arange(6.0)
        self.register_buffer("table", torch.randn(1, 6, 1, 1))

    def forward(self, x: T) -> T:
        flat = self.kernel.view(self.kernel.shape[0], -1)
        kernel = (self.kernel - flat.mean(1).view(-1, 1, 1, 1)) / flat.std(1).view(-1, 1, 1, 1)
        x = F.conv2d(x, kernel) + F.conv2d(x, self.kernel, self.gain)
        return F.group_norm(x, 3, self.gain, self.gain) + self.table * self.plain.view(6, 1, 1) + torch.ones(6, 1, 1)


def test_weights_are_not_baked_in() -> None:
    model = Weights()
    graph = traced(model, torch.randn(2, 4, 6, 6))
    assert {"Conv2d", "GroupNorm"} <= set(targets(graph))
    assert set(graph.state_dict()) == set(model.state_dict())
    changed = copy.deepcopy(model)
    with torch.no_grad():
        changed.kernel.mul_(2).add_(torch.randn(6, 4, 3, 3))
    graph.load_state_dict(changed.state_dict())
    x = torch.randn(2, 4, 6, 6)
    assert torch.equal(graph(x), changed(x))
    graph(x).sum().backward()
    assert graph.kernel.grad is not None if hasattr(graph, "kernel") else graph.conv2d.weight.grad is not None


def test_circular_padding_and_hooks_are_traced_through() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"), nn.Linear(8, 8))
    model[1].register_forward_hook(lambda module, args, output: output * 3)
    graph = traced(model, torch.randn(2, 3, 8, 8))
    assert targets(graph) == ["aten.pad.default", "Conv2d", "Linear", "aten.mul.Tensor"]


def test_norms_without_weights() -> None:
    model = nn.Sequential(nn.InstanceNorm2d(3), nn.BatchNorm2d(3, affine=False, track_running_stats=False))
    graph = traced(model, torch.randn(2, 3, 4, 4))
    assert targets(graph) == ["aten.instance_norm.default", "aten.batch_norm.default"]


# --- operations: each as an export has it ----------------------------------------------------------------------

IMAGE = torch.randn(2, 4, 6, 6)
FUNCTIONS: dict[str, Callable[[T], Any]] = {
    "relu": lambda x: F.relu(x) + torch.relu(x) + x.relu(),
    "gelu": lambda x: F.gelu(x) + F.gelu(x, approximate="tanh"),
    "relu6": F.relu6,
    "activations": lambda x: F.silu(F.elu(F.selu(F.celu(F.leaky_relu(F.mish(F.softplus(x)), 0.2))))),
    "hard": lambda x: F.hardswish(x) + F.hardsigmoid(x) + F.hardtanh(x, -2, 2) + F.hardshrink(x),
    "sigmoid": lambda x: torch.sigmoid(x) + x.sigmoid() + F.sigmoid(x) + torch.tanh(x) + F.logsigmoid(x),
    "soft": lambda x: F.softsign(x) + F.tanhshrink(x) + F.softshrink(x),
    "softmax": lambda x: F.softmax(x, dim=-1) + x.softmax(1) + torch.log_softmax(x, 2) + F.softmin(x, 1),
    "glu": lambda x: F.glu(x, 1),
    "arithmetic": lambda x: (2 + x - 1) * 3 / (x.abs() + 1) - (1 - x) + 2 / (x * x + 1) + (-x) ** 2 + x % 2 + 2**x,
    "compare": lambda x: ((x > 0) & (x < 1)).float() + (x == 0) + (~(x <= 1)).to(torch.float32),
    "matmul": lambda x: x @ x.transpose(2, 3) + torch.matmul(x, x.mT) + torch.einsum("bchw,bcwv->bchv", x, x),
    "minmax": lambda x: x.max(1)[0] + torch.min(x, dim=1).values + x.amax(1) + x.argmax(1) + torch.maximum(x, x)[:, 0],
    "returns": lambda x: torch.max(x, 1),
    "reduce": lambda x: (
        x.mean() + x.sum((2, 3)).sum() + x.mean(dim=[2, 3], keepdim=True) + torch.sum(x, 1, keepdim=True)
    ),
    "spread": lambda x: x.std(1).mean() + x.var((2, 3), unbiased=False, keepdim=True) + torch.std(x, 2, keepdim=True),
    "norm": lambda x: (
        F.normalize(x, dim=1) + x.norm(dim=1, keepdim=True) + torch.norm(x, p=2, dim=(2, 3), keepdim=True)
    ),
    "named": lambda x: torch.sum(input=x, axis=1) + x.mean(axis=(1, 2), keepdims=True)[0] + x.var(1, correction=0),
    "clamp": lambda x: x.clamp(min=0) + torch.clamp(x, -1, 1) + x.clip(max=0.5),
    "where": lambda x: torch.where(x > 0, x, 0.0) + x.masked_fill(x > 1, 5.0),
    "view": lambda x: x.view(x.size(0), -1) + x.reshape(x.shape[0], 144) + x.flatten(1) + torch.flatten(x, 1),
    "permute": lambda x: x.permute(0, 2, 3, 1).contiguous().transpose(1, 3) + x.permute((0, 1, 3, 2)).transpose(2, 3),
    "expand": lambda x: (
        x.mean(1, keepdim=True).expand(-1, 4, -1, -1) + x[:, :1].expand_as(x) + x[:, :1].repeat(1, 4, 1, 1)
    ),
    "squeeze": lambda x: x.unsqueeze(1).squeeze(1) + x[:, None].squeeze() + x.movedim(1, 2).movedim(2, 1),
    "cat": lambda x: torch.cat([x, x.flip(1)], dim=1) + torch.stack((x, x), 1).flatten(1, 2) + torch.concat([x, x], 1),
    "chunk": lambda x: (lambda a, b: a * b)(*[x.chunk(2, 1)[0], torch.chunk(x, 2, dim=1)[1]]),
    "split": lambda x: x.split(2, 1)[0] + torch.split(x, [2, 2], dim=1)[1] + x.split([1, 3], dim=1)[0],
    "unbind": lambda x: torch.unbind(x, 1)[0] + x.unbind(1)[3],
    "index": lambda x: (x[:, 0, 1:5:2, None], x[..., 2:4, 1], x[:, -1, ::3, 1:2], x[0, 0, 0, 0], x[:, None, ..., -1:]),
    "gather": lambda x: x[:, torch.tensor([0, 2])] + x.index_select(1, torch.tensor([1, 3])) + x[x > 9].sum(),
    "roll": lambda x: x.roll(1, 2) + torch.roll(x, (1, 2), (2, 3)) + torch.tril(x) + x.triu(1),
    "cast": lambda x: x.half().float() + x.to(torch.float64).type_as(x) + x.to(x.dtype) + x.double().to(x) + x.int(),
    "pools": lambda x: F.max_pool2d(x, 2) + F.avg_pool2d(x, 2) + F.max_pool2d(x, 3, stride=2, padding=1),
    "adaptive": lambda x: (
        F.adaptive_avg_pool2d(x, 1) + F.adaptive_max_pool2d(x, (3, 3)) + F.adaptive_avg_pool2d(x, (3, 1))
    ),
    "indices": lambda x: F.max_pool2d(x, 2, return_indices=True),
    "pad": lambda x: (
        F.pad(x, (1, 1))[..., 1:-1]
        + F.pad(x, (1, 0, 0, 1), value=2.0)[:, :, :-1, 1:]
        + F.pad(x, [0, 0, 0, 0], mode="reflect")
    ),
    "bilinear": lambda x: (
        F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
        + F.interpolate(x, size=(12, 12), mode="bicubic")
    ),
    "resize": lambda x: (
        F.interpolate(x, size=x.shape[2:], mode="bilinear") + F.interpolate(x, size=x.shape[-2:], mode="nearest")
    ),
    "nearest": lambda x: F.interpolate(F.max_pool2d(F.conv2d(x, torch.ones(2, 4, 1, 1)), 2), scale_factor=(2, 2)),
    "norms": lambda x: F.layer_norm(x, (6, 6)) + F.group_norm(x, 2) + F.instance_norm(x) + F.rms_norm(x, (6,)),
    "dropouts": lambda x: F.dropout(x, 0.5, False) + F.dropout(x, training=False, inplace=False),
    "shuffle": lambda x: F.pixel_unshuffle(F.pixel_shuffle(x, 2), downscale_factor=2) + F.channel_shuffle(x, 2),
    "unfold": lambda x: F.fold(F.unfold(x, 2, stride=2), (6, 6), 2, stride=2),
    "grid": lambda x: F.grid_sample(x, x[:, :3, :3, :2], align_corners=False),
    "similarity": lambda x: F.cosine_similarity(x, x + 1, dim=1),
    "factories": lambda x: x.new_zeros(x.shape[0], 4, 6, 6) + torch.ones_like(x) + torch.zeros(6, device=x.device),
    "arange": lambda x: x + torch.arange(x.shape[3]) + torch.full_like(x, 2.0),
    "meshgrid": lambda x: torch.meshgrid(x[0, 0, 0], x[0, 0, 1], indexing="ij")[1],
    "sizes": lambda x: x.view(x.shape[0] * x.shape[1], x.shape[2] // 2, -1).view(x.shape[0], -1, 2 * 3),
    "same_shape": lambda x: (
        x.flatten(1).view(x.shape) + x.mean((2, 3), keepdim=True).expand(x.shape) + x.flatten().reshape(x.size())
    ),
    "put_together": lambda x: x.view(x.shape[:2] + torch.Size([36])) + x.view(*(x.shape[0], x.shape[1]), 36),
    "containers": lambda x: {"a": [x, (x * 2, None)], "b": Pair(x, x + 1), "c": 3, "d": "text"},
    "einops": lambda x: x.unflatten(1, (2, 2)).sum(1) + x.masked_fill(x.isnan(), 0)[:, :2] + x.nan_to_num()[:, 2:],
}
# What an export folds away or spells otherwise, with the same result.
SPELLED_OTHERWISE = {"arange", "cast", "nearest", "put_together", "resize", "same_shape", "sizes"}


@pytest.mark.parametrize("case", FUNCTIONS)
def test_operations_are_those_of_an_export(case: str) -> None:
    model = Of(FUNCTIONS[case])
    graph = traced(model, IMAGE)
    x = torch.cat([IMAGE, IMAGE[:1]])
    same(call(model, (x,)), call(graph, (x,)))
    exported = capture(model, (IMAGE,))
    if case not in SPELLED_OTHERWISE:
        assert Counter(targets(graph)) == Counter(targets(exported))


# --- writes ----------------------------------------------------------------------------------------------------


def renamed(x: T) -> T:
    y = x * 2
    z = y
    y += 1
    return y * z


def chained(x: T) -> T:
    y = (x + 1).relu_().mul_(2)
    y.clamp_(max=3).add_(x)
    y /= 2
    return torch.sigmoid_(y.masked_fill_(x > 1, 0))


def of_a_view(x: T) -> T:
    return (x * 1).view(-1).add_(1)


def zeroed(x: T) -> T:
    return (x + 1).zero_() + x


def read_before(x: T) -> T:
    y = x + 1
    z = y.flatten(1).sum()
    y.mul_(2)
    return y + z


def other_dtype(x: T) -> T:
    z = (x > 0).to(torch.int32)
    y = x.half()  # may be x itself, for all that is known: x is not read again
    z.add_(y.long())
    y += z.float()
    return y * z


@pytest.mark.parametrize(
    "function", [renamed, chained, of_a_view, zeroed, read_before, other_dtype], ids=lambda f: f.__name__
)
def test_writes_become_values(function: Callable[[T], T]) -> None:
    traced(Of(function), IMAGE)


def view_read_after(x: T) -> T:
    y = x * 1
    rows = y[:, 0]
    y.add_(1)
    return rows + y[:, 1]


def source_read_after(x: T) -> T:
    y = x * 1
    y.view(-1).add_(1)
    return y


def part_written(x: T) -> T:
    y = x * 1
    y[:, 0] = 0
    return y


@pytest.mark.parametrize("function", [view_read_after, source_read_after, part_written], ids=lambda f: f.__name__)
def test_writes_that_views_may_see_are_refused(function: Callable[[T], T]) -> None:
    with pytest.raises(CaptureError, match=r"memory|part of a tensor") as caught:
        capture(Of(function).eval())
    assert "test_symbolic.py" in str(caught.value.where) and "example_inputs" in str(caught.value.remedy)


def test_a_write_into_the_input_is_noted() -> None:
    graph = traced(Of(lambda x: x.add_(1) * 2), IMAGE)
    assert info(graph).notes == ["the model writes into its input 'x'; the captured graph leaves it alone"]


def test_a_write_into_a_buffer_is_refused() -> None:
    def function(m: Any, x: T) -> T:
        m.count.add_(1)
        return x + m.count

    with pytest.raises(CaptureError, match="a write into 'count'"):
        capture(Of(function, count=torch.zeros(1)).eval())


# --- gradients -------------------------------------------------------------------------------------------------


class NoGrad(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.a, self.b, self.how = nn.Linear(4, 4), nn.Linear(4, 4), how

    def forward(self, x: T) -> T:
        if self.how == "block":
            with torch.no_grad():
                y = self.a(x) * 2
        else:
            y = self.a(x).detach() if self.how == "detach" else self.a(x).data
        return self.b(y + x)


@pytest.mark.parametrize("how", ["block", "detach", "data"])
def test_no_gradient_flows_where_the_user_stopped_it(how: str) -> None:
    graph = traced(NoGrad(how), torch.randn(2, 4))
    graph(torch.randn(2, 4)).sum().backward()
    assert graph.a.weight.grad is None and graph.b.weight.grad is not None


# --- structure -------------------------------------------------------------------------------------------------


class Defaults(nn.Module):
    def forward(self, x: T, y: T, scale: float = 2.0, mask: T | None = None, **options: Any) -> Scores:
        x = x + y * scale
        return Scores(x if mask is None else x * mask)


def test_defaults_become_part_of_the_graph() -> None:
    model = Defaults().eval()
    graph = capture(model)
    assert info(graph).parameter_names == ("x", "y")
    x, y = torch.randn(2, 3), torch.randn(2, 3)
    result = graph(x, y=y)
    assert isinstance(result, Scores) and result.hidden is None
    assert torch.equal(result.logits, model(x, y).logits)


# --- refusals --------------------------------------------------------------------------------------------------


class Takes(nn.Module):
    def forward(self, pair: tuple[T, T]) -> T:
        return pair[0] + pair[1]


class Variadic(nn.Module):
    def forward(self, *tensors: T) -> T:
        return tensors[0]


@pytest.mark.parametrize(
    ("model", "match"),
    [
        (Of(lambda x: x * 2 if x.sum() > 0 else x), "control flow"),
        (Of(lambda x: x if x.dim() == 4 else x[None]), "control flow|dims"),
        (Of(lambda x: x * len(x)), "len"),
        (Of(lambda x: x.new_zeros(x.shape)), "number of dims"),
        (Of(lambda x: torch.zeros(x.shape[0], 3)), "zeros"),
        (Of(lambda x: x.reshape(x.shape[2:])), "number of dims"),
        (Of(lambda x: x + x.sum().item()), "value of a tensor"),
        (Of(lambda x: torch.zeros(3, dtype=x.dtype) + x), "dtype"),
        (Of(lambda x: F.interpolate(x, scale_factor=2)), "number of dims"),
        (Of(lambda x: F.gumbel_softmax(x)), "gumbel_softmax.*cannot be brought"),
        (Of(lambda x: x.cuda()), "between devices"),
        (Of(lambda x: F.relu(x, nonsense=3)), "nonsense"),
        (Of(lambda x: x.split(2, 3, 4, 5)), "split.*cannot be brought"),
        (Of(lambda x: x + torch.randn(4)), "random numbers"),
        (Of(lambda m, x: m.a(x, x, x)[0], a=nn.MultiheadAttention(4, 2)), "cannot be traced"),
        (Takes(), "whose parts only example inputs tell"),
        (Variadic(), "whose parts only example inputs tell"),
    ],
)
def test_what_only_example_inputs_tell(model: nn.Module, match: str) -> None:
    with pytest.raises(CaptureError, match=match) as caught:
        capture(model.eval())
    assert "example_inputs" in str(caught.value.remedy) and caught.value.where


def test_autocast_is_refused() -> None:
    def function(m: Any, x: T) -> T:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return m.fc(x)

    with pytest.raises(CaptureError, match="autocast"):
        capture(Of(function, fc=nn.Linear(4, 4)).eval())


def test_training_mode_is_refused() -> None:
    with pytest.raises(PreconditionError, match="training mode"):
        capture(Net().train())


# --- what can be done with a graph without shapes --------------------------------------------------------------


def test_shapes_are_asked_for_by_those_who_need_them() -> None:
    graph = capture(Net().eval())
    with pytest.raises(PreconditionError, match="prune_channels needs shapes") as caught:
        require_shapes(graph, "prune_channels")
    assert "example_inputs" in str(caught.value.remedy)
    require_shapes(capture(Net().eval(), (torch.randn(2, 3, 17, 17),)), "prune_channels")


def test_it_can_be_edited_copied_and_saved() -> None:
    x = torch.randn(2, 3, 17, 17)
    graph = copy_graph(capture(Net().eval()))
    expected = graph(x) * 2
    with GraphEditor(graph) as editor:
        (head,) = graph.graph.find_nodes(op="call_module", target="head")
        editor.replace(head, editor.insert_call(torch.ops.aten.mul.Tensor, (head, 2), after=head))
    verify(graph)
    assert torch.equal(graph(x), expected)
    loaded = serialize.load_graph(serialize.graph_to_json(graph), serialize.weights(graph))
    assert torch.equal(loaded(x), expected) and not info(loaded).has_shapes


def test_example_inputs_give_it_shapes() -> None:
    model = Net().eval()
    graph = capture(capture(model), (torch.randn(2, 3, 17, 17),))
    verify(graph, shapes=True)
    assert info(graph).has_shapes and list(info(graph).dim_names.values()) == ["batch"]
    x = torch.randn(3, 3, 17, 17)
    assert torch.equal(graph(x), model(x)) and list(graph.state_dict()) == list(model.state_dict())
