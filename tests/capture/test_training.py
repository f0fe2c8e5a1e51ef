"""In training the graph does what the user's model does, and never to the user's model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fxcompress.capture import capture
from tests.capture.helpers import Of, check, targets

T = torch.Tensor
IMAGE = (torch.randn(2, 4, 8, 8),)


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


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_callers_gradient_mode_does_not_matter(mode: Callable[[], Any]) -> None:
    model = NoGrad("block").eval()
    with mode():
        graph = capture(model, (torch.randn(2, 4),))
        traced = capture(model)
    for made in (graph, traced):
        assert gradients(made, torch.randn(2, 4)) == gradients(model, torch.randn(2, 4))


class WritesWhatItComputes(nn.Module):
    """``copy_`` through a view, of a smaller tensor and of one of another dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)

    def forward(self, x: T) -> T:
        y = torch.zeros_like(x)
        y[:, :, 0:1] = self.conv(x)[:, :, :1]
        y[:, :, 1] = self.conv(x).mean((2, 3), keepdim=True)[..., 0]
        y[:, :, 2] = self.conv(x)[:, :, 2].double()
        return y


def test_gradients_flow_through_what_is_written() -> None:
    model = WritesWhatItComputes().eval()
    graph = check(model, IMAGE)
    assert torch.ops.aten.copy.default not in targets(graph)
    gradients = []
    for module in (copy.deepcopy(model), graph):
        module.zero_grad()
        module(*IMAGE).square().sum().backward()
        gradients.append(module.get_parameter("conv.weight").grad)
    assert torch.equal(*gradients)
