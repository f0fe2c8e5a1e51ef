"""Layers, operators and tensors that have no serial form are refused, or registered."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import fx, nn

from fxcompress.capture import capture
from fxcompress.errors import BundleError
from fxcompress.graph import serialize
from fxcompress.graph.edit import GraphEditor
from tests.graph.saving import equal, reloaded, saved

# --- layers and operators of others ----------------------------------------------------------------------------


class Scale(nn.Module):
    def __init__(self, width: int, power: float) -> None:
        super().__init__()
        self.power = power
        self.factor = nn.Parameter(torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.factor**self.power


def with_scale() -> fx.GraphModule:
    graph = capture(nn.Sequential(nn.Linear(4, 4)).eval(), (torch.randn(2, 4),))
    with GraphEditor(graph) as editor:
        node = next(iter(graph.graph.find_nodes(op="call_module")))
        path = editor.add_module("scale", Scale(4, float("inf")))
        editor.replace(node, editor.insert_module(path, (node,), after=node))
    return graph


def test_an_unknown_layer_is_refused_until_it_is_registered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fxcompress.graph import serialize_layers

    monkeypatch.setattr(serialize_layers, "_KINDS", dict(serialize_layers._KINDS))
    graph = with_scale()
    with pytest.raises(BundleError, match="register_layer") as caught:
        serialize.graph_to_json(graph)
    assert caught.value.where == "scale"
    serialize.register_layer(
        Scale, lambda layer: {"width": len(layer.factor), "power": layer.power}, lambda config: Scale(**config)
    )
    loaded = reloaded(graph, tmp_path)
    assert loaded.scale.power == float("inf")
    document, weights = saved(graph, tmp_path)
    serialize_layers._KINDS.popitem()
    with pytest.raises(BundleError, match="not registered here"):
        serialize.load_graph(document, weights)


def test_operators_of_other_libraries_are_refused_until_allowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fxcompress.graph import serialize_values

    monkeypatch.setattr(serialize_values, "_NAMESPACES", set(serialize_values._NAMESPACES))
    library = torch.library.Library("fxc_serialize_test", "DEF")
    library.define("twice(Tensor x) -> Tensor")
    library.impl("twice", lambda x: x * 2, "CompositeImplicitAutograd")
    graph = capture(nn.Sequential(nn.Linear(4, 4)).eval(), (torch.randn(2, 4),))
    with GraphEditor(graph) as editor:
        node = next(iter(graph.graph.find_nodes(op="call_module")))
        twice = editor.insert_call(torch.ops.fxc_serialize_test.twice.default, (node,), after=node)
        editor.replace(node, twice)
    with pytest.raises(BundleError, match="allow_operators"):
        serialize.graph_to_json(graph)
    serialize.allow_operators("fxc_serialize_test")
    assert equal(reloaded(graph, tmp_path)(torch.ones(2, 4)), graph(torch.ones(2, 4)))


def test_a_layer_whose_attributes_contradict_its_weights_is_refused() -> None:
    graph = capture(nn.Sequential(nn.Linear(4, 4)).eval(), (torch.randn(2, 4),))
    graph.get_submodule("0").weight = nn.Parameter(torch.randn(3, 4))
    with pytest.raises(BundleError, match=r"ask for 'weight' of shape \(4, 4\), it holds \(3, 4\)"):
        serialize.graph_to_json(graph)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: torch.empty(4, 4, device="meta"), "meta device"),
        (lambda: torch.eye(4).to_sparse(), "not a plain dense one"),
    ],
    ids=["meta", "sparse"],
)
def test_tensors_without_a_serial_form_are_refused(make: Callable[[], torch.Tensor], match: str) -> None:
    graph = capture(nn.Sequential(nn.Linear(4, 4)).eval(), (torch.randn(2, 4),))
    graph.get_submodule("0").weight = nn.Parameter(make())
    with pytest.raises(BundleError, match=match):
        serialize.weights(graph)
