"""In-place operations become functional, exactly, or are refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fxcompress.capture import capture
from fxcompress.errors import CaptureError
from fxcompress.graph.info import info
from tests.capture.helpers import check, names, targets
from tests.capture.writes import WRITES, Of, chain, fresh

T = torch.Tensor


@pytest.mark.parametrize("function", WRITES, ids=lambda f: f.__name__)
def test_writes_become_values(function: Callable[[T], Any]) -> None:
    check(Of(function), (torch.randn(2, 4, 4),), (torch.randn(3, 4, 4),))


def test_nodes_are_named_for_what_they_do() -> None:
    graph = check(Of(lambda x: F.relu_(x * 2).add_(1)), (torch.randn(2, 4),))
    assert names(graph) == ["x", "mul", "relu", "add", "output"]


@pytest.mark.parametrize("write", [lambda x: x.add_(1), lambda x: x[:, 0].zero_(), lambda x: F.relu_(x[0])])
def test_a_write_into_the_input_is_noted(write: Callable[[T], T]) -> None:
    def function(x: T) -> T:
        write(x)
        return x * 2

    graph = check(Of(function), (torch.randn(2, 4),))
    assert any("writes into its input 'x'" in note for note in info(graph).notes)
    x = torch.randn(2, 4)
    kept = x.clone()
    graph(x)
    assert torch.equal(x, kept)


def test_no_note_where_nothing_writes_into_an_input() -> None:
    assert info(check(Of(chain), (torch.randn(2, 4, 4),))).notes == []


class Counts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(1))
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, x: T) -> T:
        self.count += 1
        return x * self.weight * self.count


class Clamps(Counts):
    def forward(self, x: T) -> T:
        with torch.no_grad():
            self.weight.clamp_(max=0.5)
        return x * self.weight


class ViewOfBuffer(Counts):
    def forward(self, x: T) -> T:
        self.count.view(1, 1).add_(1)
        return x * self.count


class Rebinds(Counts):
    def forward(self, x: T) -> T:
        self.count = self.count + 1
        return x * self.count


@pytest.mark.parametrize("model", [Counts, Clamps, ViewOfBuffer, Rebinds])
def test_a_write_into_a_weight_or_buffer_is_refused(model: type[nn.Module]) -> None:
    instance = model().eval()
    with pytest.raises(CaptureError, match=r"writes into .*(count|weight)") as caught:
        capture(instance, (torch.randn(2, 4),))
    assert caught.value.remedy and "forward" in str(caught.value)
    assert torch.equal(instance.count, torch.zeros(1)) and torch.equal(instance.weight, torch.ones(4))


def test_a_write_that_cannot_be_followed_is_refused_at_its_reader() -> None:
    def function(x: T) -> T:
        y = fresh(x)
        y.as_strided((2, 2), (1, 1)).add_(1)  # overlapping: written twice
        return y

    with pytest.raises(CaptureError, match="cannot be followed") as caught:
        capture(Of(function).eval(), (torch.randn(2, 4),))
    assert "writes.py" in str(caught.value)


def test_a_write_nobody_reads_is_dropped() -> None:
    def function(x: T) -> T:
        y = fresh(x)
        y.as_strided((2, 2), (1, 1)).add_(1)
        return x + 1

    assert targets(check(Of(function), (torch.randn(2, 4),))) == ["aten.add.Tensor"]


def test_a_view_is_a_reshape_so_that_a_pass_may_change_the_layout_before_it():
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.conv(x)
            return y.view(y.shape[0], -1).view_as(y).view(-1, 6, 6)

    model, x = Tokens().eval(), torch.randn(2, 3, 8, 8)
    graph_module = capture(model, (x,))
    graph_module.conv.weight = nn.Parameter(model.conv.weight.to(memory_format=torch.channels_last))
    made = graph_module.conv(x)
    assert not made.is_contiguous(), "the layout is another one, and a view of it would fail"
    torch.testing.assert_close(graph_module(x), model(x))


def _assigned(y: T) -> T:
    made = torch.zeros(y.shape[0], 8)
    made[:, 2:6] = y
    return made


@pytest.mark.parametrize(
    "write",
    [
        _assigned,
        lambda y: torch.empty_like(y).copy_(y),
        lambda y: torch.cat([y, y], 1).index_copy_(1, torch.arange(4), y * 3),
        lambda y: torch.empty(y.shape, dtype=torch.float64).copy_(y),
        lambda y: torch.empty(3, y.shape[0], 4).copy_(y),
    ],
    ids=["part", "whole", "indices", "dtype", "broadcast"],
)
def test_gradients_flow_through_what_is_copied_into_a_tensor(write: Callable[[T], T]) -> None:
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: T) -> T:
            return write(self.fc(x)) * 2

    model = Writes().eval()
    graph = check(model, (torch.randn(2, 4),), (torch.randn(3, 4),))
    x = torch.randn(2, 4)
    for module in (model, graph):
        module(x).square().sum().backward()
    assert torch.equal(model.fc.weight.grad, graph.fc.weight.grad)
