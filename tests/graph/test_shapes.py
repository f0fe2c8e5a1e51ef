"""What a node produces, inferred without running it."""

import pytest
import torch
from torch import nn

from fxcompress.capture import capture
from fxcompress.errors import GraphError
from fxcompress.graph import shapes


@pytest.mark.parametrize("shape", [(2, 6), (2, 5, 6), (2, 3, 4, 6)])
def test_of_linear_layers_as_torch_would_say(shape, monkeypatch):
    graph_module = capture(nn.Sequential(nn.Linear(6, 4), nn.ReLU()).eval(), (torch.randn(shape),))
    (layer,) = graph_module.graph.find_nodes(op="call_module", target="0")
    quick = shapes.infer(graph_module, layer)
    monkeypatch.setattr(shapes, "_of_linear", lambda module, args: None)
    slow = shapes.infer(graph_module, layer)
    assert shapes.same_value(quick, slow)
    assert quick.stride() == slow.stride()
    assert quick.fake_mode is slow.fake_mode


def test_inputs_that_a_linear_layer_does_not_take_are_refused():
    graph_module = capture(nn.Sequential(nn.Linear(6, 4)).eval(), (torch.randn(2, 6),))
    graph_module.set_submodule("0", nn.Linear(5, 4))
    (node,) = graph_module.graph.find_nodes(op="call_module", target="0")
    with pytest.raises(GraphError, match="does not accept its inputs"):
        shapes.infer(graph_module, node)
