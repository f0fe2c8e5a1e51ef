"""What every capture test checks."""

from __future__ import annotations

import copy
from collections import OrderedDict, namedtuple
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from fxcompress.capture import capture
from fxcompress.graph.verify import verify

T = torch.Tensor
Pair = namedtuple("Pair", ["left", "right"])


def check(
    model: nn.Module, inputs: Any, other: Any = None, *, exact: bool = True, dynamic_shapes: Any = "batch"
) -> fx.GraphModule:
    """Capture ``model``; compare with it on the inputs and on ``other``; verify the graph; the model is as before."""
    model.eval()
    before = copy.deepcopy(dict(_tensors(model)))
    graph = capture(model, inputs, dynamic_shapes=dynamic_shapes)
    verify(graph, shapes=True)
    for given in (inputs, other) if other is not None else (inputs,):
        same(call(model, given), call(graph, given), exact=exact)
    for name, tensor in _tensors(model):
        assert torch.equal(tensor, before[name]), f"capture changed {name}"
    return graph


def call(model: nn.Module, inputs: Any) -> Any:
    """The model's outputs on copies of the inputs, which it may write into."""
    inputs = pytree.tree_map_only(torch.Tensor, torch.clone, inputs)
    with torch.no_grad():
        if isinstance(inputs, dict):
            return model(**inputs)
        return model(*inputs) if isinstance(inputs, (tuple, list)) else model(inputs)


def same(expected: Any, actual: Any, *, exact: bool = True) -> None:
    """Equal structure, types and values."""
    left, spec = pytree.tree_flatten(expected)
    right, other = pytree.tree_flatten(actual)
    assert spec == other
    for a, b in zip(left, right, strict=True):
        if isinstance(a, torch.Tensor):
            assert a.dtype == b.dtype and a.shape == b.shape
            if exact:
                assert torch.equal(torch.nan_to_num(a), torch.nan_to_num(b))
            else:
                torch.testing.assert_close(a, b)
        else:
            assert a == b and type(a) is type(b)


def targets(graph: fx.GraphModule) -> list[str]:
    """Targets of all calls, in order; layers by their class."""
    return [
        type(graph.get_submodule(str(node.target))).__name__ if node.op == "call_module" else str(node.target)
        for node in graph.graph.nodes
        if node.op in ("call_function", "call_module")
    ]


def names(graph: fx.GraphModule) -> list[str]:
    """Names of all nodes, in order."""
    return [node.name for node in graph.graph.nodes]


def _tensors(model: nn.Module) -> Sequence[tuple[str, torch.Tensor]]:
    return [*model.named_parameters(), *model.named_buffers()]


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


@dataclass
class Batch:
    left: T
    right: T
    scale: T | None = None


class Keywords(nn.Module):
    def forward(self, x: T, *, minus: T, times: T, flag: bool = True, scale: float = 2.0, none: T | None = None) -> T:
        return (x - minus) * times * scale if flag and none is None else x


class Nested(nn.Module):
    def forward(self, tree: dict[str, Any], pair: tuple[T, list[T]]) -> Any:
        first = tree["a"] + pair[0]
        return OrderedDict(sum=first, rest=(pair[1][0] * 2, [tree["b"]["c"], None, 7, 0.5, "text"]))


class Structured(nn.Module):
    def forward(self, batch: Batch, pair: Pair) -> Batch:
        return Batch(batch.left + pair.left, batch.right * pair.right)
