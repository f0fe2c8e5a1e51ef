"""Without example inputs: whole models, their structure, and what can be done with a graph without shapes."""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fxcompress.capture import capture
from fxcompress.errors import PreconditionError
from fxcompress.graph import serialize
from fxcompress.graph.edit import GraphEditor, copy_graph
from fxcompress.graph.info import info
from fxcompress.graph.shapes import require_shapes
from fxcompress.graph.verify import verify
from tests.capture.helpers import targets
from tests.capture.tracing import traced

T = torch.Tensor


@dataclass
class Scores:
    logits: T
    hidden: T | None = None


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
