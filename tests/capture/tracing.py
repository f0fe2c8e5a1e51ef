"""What every test of the symbolic front end checks."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fxcompress.capture import capture
from fxcompress.graph.info import info
from fxcompress.graph.verify import verify
from tests.capture.helpers import call, same

T = torch.Tensor


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
