"""A saved graph that was damaged or altered is refused, and never runs anything."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from fxcompress.capture import capture
from fxcompress.errors import BundleError
from fxcompress.graph import serialize

# --- damage ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small() -> tuple[str, dict[str, torch.Tensor]]:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2)).eval()
    graph = capture(model, (torch.randn(2, 3, 4, 4),))
    return json.dumps(serialize.graph_to_json(graph)), serialize.weights(graph)


def _node(document: dict[str, Any], op: str) -> dict[str, Any]:
    return next(node for node in document["nodes"] if node["op"] == op)


def _set(*keys: Any, to: Any) -> Callable[[dict[str, Any]], None]:
    def change(document: dict[str, Any]) -> None:
        inner: Any = document
        for key in keys[:-1]:
            inner = inner[key]
        inner[keys[-1]] = to

    return change


def _set_node(op: str, key: str, to: Any) -> Callable[[dict[str, Any]], None]:
    return lambda document: _node(document, op).__setitem__(key, to)


DAMAGE: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "newer": (_set("format_version", to=99), "format 99"),
    "no format": (lambda d: d.pop("format_version"), "does not tell its format"),
    "version is text": (_set("format_version", to="1"), "does not tell its format"),
    "no nodes": (lambda d: d.pop("nodes"), "damaged"),
    "nodes is a number": (_set("nodes", to=3), "damaged"),
    "unknown op": (_set_node("call_function", "target", "aten.no_such_op.default"), "does not exist here"),
    "unknown overload": (_set_node("call_function", "target", "aten.relu.nothing"), "does not exist here"),
    "in-place op": (_set_node("call_function", "target", "aten.relu_.default"), "writes into its arguments"),
    "function by path": (_set_node("call_function", "target", "os.system"), "is no operator"),
    "other operator": (_set_node("call_function", "target", "operator.attrgetter"), "is no operator"),
    "library not allowed": (_set_node("call_function", "target", "prim.device.default"), "not on the list"),
    "file access": (_set_node("call_function", "target", "aten.from_file.default"), "not on the list"),
    "method": (_set_node("call_function", "op", "call_method"), "a node is 'call_method'"),
    "code as a name": (_set_node("call_function", "name", "x = __import__('os')"), "no valid name"),
    "code as an input": (_set_node("placeholder", "target", "x=print(1)"), "no valid name"),
    "code as an argument's name": (_set("parameter_names", to=["x, y=print(1)"]), "no valid name"),
    "code as a layer's path": (_set_node("call_module", "target", '0"), print(1), getattr(self, "0'), "no valid name"),
    "code as a keyword": (_set_node("call_function", "kwargs", {"a=print(1), b": 1}), "no valid name"),
    "two names": (_set("parameter_names", to=["x", "y"]), "2 names for 1 arguments"),
    "same name twice": (lambda d: d["nodes"].insert(1, d["nodes"][0]), "told twice"),
    "reads what comes later": (_set_node("call_module", "args", [{"node": "output"}]), "no argument of a graph"),
    "wrong argument": (_set_node("call_function", "args", [{"node": "x"}, {"what": 1}]), "no argument of a graph"),
    "op does not fit": (_set_node("call_function", "args", []), "does not accept its inputs"),
    "unknown layer": (_set("layers", "0", "class", to="torch.nn.Conv9d"), "not registered here"),
    "a class of the user's": (_set("layers", "0", "class", to="os.path"), "not registered here"),
    "layer option": (_set("layers", "0", "config", "depth", to=3), "does not take"),
    "layer value": (_set("layers", "0", "config", "groups", to=7), "does not take"),
    "other layer": (_set("layers", "0", "config", "in_channels", to=6), "the layer asks for the shape"),
    "no layer": (_set_node("call_module", "target", "1"), "malformed|damaged|altered"),
    "shape": (_set("tensors", "0.weight", "shape", to=[4, 3, 9]), "the stored tensor is"),
    "dtype": (_set("tensors", "0.weight", "dtype", to="float16"), "the stored tensor is"),
    "stride": (_set("tensors", "0.weight", "stride", to=[0, 0, 0, 0]), "do not fit the shape"),
    "outside": (
        lambda d: d["tensors"]["0.bias"].update(offset=3, stride=[1], elements=4),
        "reaches outside of what is stored",
    ),
    "not stored": (_set("tensors", "0.weight", "stored", to="nothing"), "missing from the file"),
    "no table": (lambda d: d["tensors"].pop("0.weight"), "does not name"),
    "parameter as buffer": (_set("tensors", "0.weight", "kind", to="buffer"), "the other way round"),
    "dtype name": (_set_node("placeholder", "value", {"dtype": "nn"}), "no argument of a graph"),
    "size": (lambda d: _node(d, "placeholder")["value"]["shape"].__setitem__(0, "__import__('os')"), "is no size"),
    "unknown symbol": (lambda d: _node(d, "placeholder")["value"]["shape"].__setitem__(0, "s999"), "is no size"),
    "range": (lambda d: next(iter(d["symbols"].values())).update(max=1), "outside of"),
    "structure": (_set("inputs", to={"kind": "leaf"}), "damaged|altered"),
    "output structure": (_set("outputs", to={"kind": "tuple", "children": []}), "holds 0 values, the graph 1"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_document_is_refused(damage: str, small: tuple[str, dict[str, torch.Tensor]]) -> None:
    change, match = DAMAGE[damage]
    document = json.loads(small[0])
    change(document)
    with pytest.raises(BundleError, match=match) as caught:
        serialize.load_graph(document, small[1])
    assert caught.value.remedy


@pytest.mark.parametrize("document", [None, [], "text", 3, {}, {"format_version": 1}], ids=repr)
def test_what_is_no_document_is_refused(document: Any) -> None:
    with pytest.raises(BundleError):
        serialize.load_graph(document, {})


def test_weights_that_do_not_fit_are_refused(small: tuple[str, dict[str, torch.Tensor]]) -> None:
    document, weights = json.loads(small[0]), small[1]
    with pytest.raises(BundleError, match="missing from the file"):
        serialize.load_graph(document, {k: v for k, v in weights.items() if k != "3.bias"})
    with pytest.raises(BundleError, match="does not name"):
        serialize.load_graph(document, {**weights, "extra": torch.zeros(1)})
    with pytest.raises(BundleError, match="the stored tensor is"):
        serialize.load_graph(document, {**weights, "3.bias": torch.zeros(3)})
    with pytest.raises(BundleError, match="the stored tensor is"):
        serialize.load_graph(document, {**weights, "3.bias": torch.zeros(2, dtype=torch.float64)})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("s0", 6),
        ("2*s0", 12),
        ("s0//4 + 1", 2),
        ("(s0 + s1)*3", 27),
        ("s0 % 4", 2),
        ("s0 - s1 - 1", 2),
        ("-s1 + 4", 1),
        ("s0**2", 36),
        ("7", 7),
        (5, 5),
    ],
)
def test_sizes_are_read(text: Any, expected: int) -> None:
    from fxcompress.graph.serialize_shapes import parse_size

    assert parse_size(text, {"s0": 6, "s1": 3}, "test") == expected


@pytest.mark.parametrize(
    "text", ["", "s2", "2 2", "s0 +", "(s0", "s0)", "s0.real", "s0**9999999", "1/2", "s0//0", True]
)
def test_what_is_no_size_is_refused(text: Any) -> None:
    from fxcompress.graph.serialize_shapes import parse_size

    with pytest.raises(BundleError, match="is no size"):
        parse_size(text, {"s0": 6, "s1": 3}, "test")
