"""Exported programs, graph modules and compiled modules are captured as the model they came from."""

from __future__ import annotations

import torch
from torch import nn

from fxcompress.capture import capture
from fxcompress.graph.verify import verify
from tests.capture.helpers import Keywords, targets

T = torch.Tensor
IMAGE = (torch.randn(2, 4, 8, 8),)


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
