"""Saving a graph as JSON and tensors: everything comes back, and whatever does not fit is refused."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import fx, nn
from torch.nn import functional as F

from fxcompress.capture import capture
from fxcompress.errors import BundleError, PreconditionError
from fxcompress.graph import serialize
from fxcompress.graph.edit import GraphEditor, copy_graph
from fxcompress.graph.info import info
from fxcompress.graph.record import Record
from fxcompress.graph.verify import verify

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning")


@dataclass
class Scores:
    logits: torch.Tensor
    hidden: torch.Tensor
    attention: torch.Tensor | None = None


class Residual(nn.Module):
    def __init__(self, momentum: float | None = 0.1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8, momentum=momentum)
        self.conv2 = nn.Conv2d(8, 8, 3, padding="same", groups=4)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(8, 5)
        self.register_buffer("scale", torch.full((8, 1, 1), 0.5))
        self.register_buffer("shift", torch.arange(8.0).view(8, 1, 1), persistent=False)
        self.offset = nn.Parameter(torch.randn(1, 8, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu_(self.norm(self.conv1(x)))
        x = x + self.conv2(x) * self.scale + self.shift + self.offset
        return self.head(self.drop(x.mean((2, 3))))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 16, 4, stride=4)
        self.token = nn.Parameter(torch.randn(1, 1, 16))
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, activation="gelu")
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1)
        return self.encoder(x)[:, 0]


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 6, num_layers=2, batch_first=True, bidirectional=True, proj_size=3)
        self.gru = nn.GRU(6, 5, batch_first=True)
        self.rnn = nn.RNN(5, 5, nonlinearity="relu", batch_first=True)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x, (h, c) = self.lstm(x)
        return self.rnn(self.gru(x)[0])[0], h.sum() + c.sum()


class Tied(nn.Module):
    """A head tied to the embedding as the same parameter, and another as a view of its storage."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 6, padding_idx=0)
        self.head = nn.Linear(6, 10)
        self.head.weight = self.embedding.weight
        self.back = nn.Parameter(self.embedding.weight.detach().t())

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(F.softmax(self.head(self.embedding(ids)), -1) @ self.back.t())


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, *, pair: tuple[torch.Tensor, dict[str, torch.Tensor]]) -> dict[str, Any]:
        y = self.fc(x) + pair[0]
        return {"sum": y, "parts": [y * 2, (pair[1]["k"], None, 3)]}


class Records(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> Scores:
        return Scores(self.fc(x), x * 2)


def saved(graph_module: fx.GraphModule, directory: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Through real files, as ``compiled.save`` writes them."""
    text = json.dumps(serialize.graph_to_json(graph_module), allow_nan=False)
    save_file(serialize.weights(graph_module), directory / "weights.safetensors")
    return json.loads(text), load_file(directory / "weights.safetensors")


def reloaded(graph_module: fx.GraphModule, directory: Path) -> fx.GraphModule:
    loaded = serialize.load_graph(*saved(graph_module, directory))
    verify(loaded, shapes=True)
    return loaded


def equal(left: Any, right: Any) -> bool:
    left, right = torch.utils._pytree.tree_leaves(left), torch.utils._pytree.tree_leaves(right)
    return len(left) == len(right) and all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(left, right, strict=True)
    )


def images(count: int = 2) -> tuple[torch.Tensor, ...]:
    return (torch.randn(count, 3, 8, 8),)


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[int], tuple[Any, ...]]]] = {
    "residual": (Residual, images),
    "momentum_none": (lambda: Residual(momentum=None), images),
    "attention": (Attention, images),
    "recurrent": (Recurrent, lambda n: (torch.randn(n, 7, 4),)),
    "tied": (Tied, lambda n: (torch.randint(0, 10, (n, 5)),)),
    "bfloat16": (lambda: Residual().bfloat16(), lambda n: (torch.randn(n, 3, 8, 8).bfloat16(),)),
    "float16": (lambda: nn.Sequential(nn.Linear(4, 4), nn.GELU()).half(), lambda n: (torch.randn(n, 4).half(),)),
    "channels_last": (
        lambda: Residual().to(memory_format=torch.channels_last),
        lambda n: (torch.randn(n, 3, 8, 8).to(memory_format=torch.channels_last),),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_round_trip(case: str, tmp_path: Path) -> None:
    make, inputs = CASES[case]
    graph = capture(make().eval(), inputs(2))
    loaded = reloaded(graph, tmp_path)
    for count in (2, 3):
        x = inputs(count)
        assert equal(graph(*x), loaded(*x))
    ours, theirs = loaded.state_dict(), graph.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) and ours[name].dtype == theirs[name].dtype for name in ours)
    assert [p.stride() for p in loaded.parameters()] == [p.stride() for p in graph.parameters()]
    assert [str(node.target) for node in loaded.graph.nodes] == [str(node.target) for node in graph.graph.nodes]
    # Saving what was loaded says the same again, but for the names of symbols.
    again = json.dumps(serialize.graph_to_json(loaded))
    assert len(again) == len(json.dumps(serialize.graph_to_json(graph)))


def trained(graph: fx.GraphModule, inputs: tuple[Any, ...]) -> list[torch.Tensor]:
    graph.train()
    optimizer = torch.optim.SGD(graph.parameters(), lr=0.1)
    torch.manual_seed(0)
    outputs = [leaf for leaf in torch.utils._pytree.tree_leaves(graph(*inputs)) if leaf.requires_grad]
    sum(output.float().square().sum() for output in outputs).backward()
    optimizer.step()
    return [*graph.state_dict().values()]


@pytest.mark.parametrize("case", ["residual", "momentum_none", "recurrent", "tied"])
def test_trains_like_the_graph_that_was_saved(case: str, tmp_path: Path) -> None:
    make, inputs = CASES[case]
    x = inputs(4)
    graph = capture(make().eval(), x)
    loaded = reloaded(graph, tmp_path)
    before = [tensor.clone() for tensor in loaded.state_dict().values()]
    ours, theirs = trained(loaded, x), trained(graph, x)
    assert equal(ours, theirs)
    assert not equal(ours, before)


def test_training_mode_frozen_weights_and_transient_buffers_are_kept(tmp_path: Path) -> None:
    model = Residual().eval()
    model.conv1.weight.requires_grad_(False)
    graph = capture(model, images())
    graph.train()
    graph.get_submodule("drop").eval()
    loaded = reloaded(graph, tmp_path)
    flags = {name: module.training for name, module in loaded.named_modules()}
    assert flags == {name: module.training for name, module in graph.named_modules()}
    assert [p.requires_grad for p in loaded.parameters()] == [p.requires_grad for p in graph.parameters()]
    assert not loaded.conv1.weight.requires_grad
    assert "shift" not in loaded.state_dict() and "scale" in loaded.state_dict()
    assert loaded.norm.num_batches_tracked.dtype is torch.int64


def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    loaded = reloaded(capture(Tied().eval(), (torch.tensor([[1, 2]]),)), tmp_path)
    parameters = dict(loaded.named_parameters(remove_duplicate=False))
    assert parameters["embedding.weight"] is parameters["head.weight"]
    with torch.no_grad():
        parameters["embedding.weight"][3, 4] = 7.0
    assert parameters["back"][4, 3] == 7.0
    stored = serialize.weights(loaded)
    assert sum(tensor.numel() for tensor in stored.values()) == 10 * 6 + 10


def test_neighbours_in_one_storage_are_not_tied(tmp_path: Path) -> None:
    graph = capture(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).eval(), (torch.randn(2, 3),))
    flat = torch.arange(40.0)
    graph.get_submodule("0").weight = nn.Parameter(flat[:9].view(3, 3))
    graph.get_submodule("0").bias = nn.Parameter(flat[9:12])
    graph.get_submodule("1").weight = nn.Parameter(flat[10:13])  # shares two elements with the bias
    graph.get_submodule("1").num_batches_tracked = flat.view(torch.int64)[10]
    stored = serialize.weights(graph)
    assert {name: len(tensor.view(-1)) for name, tensor in stored.items() if name[0] == "0"} == {
        "0.weight": 9,
        "0.bias": 4,
    }
    loaded = reloaded(graph, tmp_path)
    assert equal(loaded.state_dict(), graph.state_dict())
    with torch.no_grad():
        loaded.get_submodule("0").bias[1] = -5
    assert loaded.get_submodule("1").weight[0] == -5
    graph.get_submodule("1").num_batches_tracked = flat.view(torch.int64)[5]
    with pytest.raises(BundleError, match="different dtypes lie in the same memory"):
        serialize.weights(graph)


def test_structure_of_inputs_and_outputs(tmp_path: Path) -> None:
    x = torch.randn(2, 4)
    pair = (torch.randn(2, 4), {"k": torch.randn(2, 4)})
    graph = capture(Nested().eval(), {"x": x, "pair": pair})
    loaded = reloaded(graph, tmp_path)
    result = loaded(x=x, pair=pair)
    assert torch.utils._pytree.tree_structure(result) == torch.utils._pytree.tree_structure(graph(x=x, pair=pair))
    assert result["parts"][1][1:] == (None, 3)
    assert equal(result, graph(x=x, pair=pair))
    assert info(loaded).parameter_names == ("x", "pair")


class Odd(nn.Module):
    """Arguments that are no tensors, names that are no identifiers, sizes as outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleDict({"a-b/c": nn.Linear(4, 4), "0": nn.Dropout(0.1)})

    def forward(self, x: torch.Tensor, power: int = 1, mask: torch.Tensor | None = None) -> tuple[Any, ...]:
        x = self.parts["0"](self.parts["a-b/c"](x)) ** power
        return x.masked_fill(x < 0, float("-inf")), x.shape[0], x.to(torch.float64)[:, ::2], x.shape[0] * 2 + 1


def test_constants_names_and_sizes(tmp_path: Path) -> None:
    x = torch.randn(3, 4)
    graph = capture(Odd().eval(), (x, 2, None))
    loaded = reloaded(graph, tmp_path)
    assert equal(loaded(x, 2, None), graph(x, 2, None))
    assert list(loaded.state_dict()) == list(graph.state_dict()) == ["parts.a-b/c.weight", "parts.a-b/c.bias"]
    with pytest.raises(PreconditionError, match="captured with power = 2"):
        loaded(x, 3, None)


def test_a_dataclass_comes_back_as_a_record(tmp_path: Path) -> None:
    x = torch.randn(2, 4)
    graph = capture(Records().eval(), (x,))
    assert isinstance(graph(x), Scores)
    result = reloaded(graph, tmp_path)(x)
    assert isinstance(result, Record) and result.attention is None
    assert torch.equal(result["logits"], graph(x).logits) and torch.equal(result.hidden, x * 2)


def test_a_graph_that_takes_a_dataclass_takes_it_again(tmp_path: Path) -> None:
    class Takes(nn.Module):
        def forward(self, batch: Scores, scale: torch.Tensor) -> torch.Tensor:
            return batch.logits * scale + batch.hidden

    batch, scale = Scores(torch.randn(2, 4), torch.randn(2, 4)), torch.randn(2, 1)
    graph = capture(Takes().eval(), (batch, scale))
    loaded = reloaded(graph, tmp_path)
    for given in (batch, {"logits": batch.logits, "hidden": batch.hidden}):
        assert torch.equal(loaded(given, scale), graph(batch, scale))


def test_user_names_source_lines_and_notes_are_kept(tmp_path: Path) -> None:
    graph = capture(Attention().eval(), images())
    info(graph).notes.append("a note")
    loaded = reloaded(graph, tmp_path)
    assert info(loaded).notes == ["a note"]
    assert info(loaded).original_names == info(graph).original_names != {}
    assert "encoder.layers.0.self_attn.in_proj_weight" in loaded.state_dict()
    assert list(info(loaded).dim_names.values()) == ["batch"]
    line = next(node for node in loaded.graph.nodes if node.target == "patch").meta["stack_trace"]
    assert "test_serialize.py" in line and "self.patch(x)" in line


def test_dynamic_dims_are_equal_again(tmp_path: Path) -> None:
    class Two(nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return x + y

    shapes = {"x": {0: "batch", 1: "time"}, "y": {0: "batch", 1: "time"}}
    graph = capture(Two().eval(), (torch.randn(2, 5), torch.randn(2, 5)), dynamic_shapes=shapes)
    loaded = reloaded(graph, tmp_path)
    x, y = (node.meta["val"] for node in loaded.graph.find_nodes(op="placeholder"))
    assert x.shape == y.shape and str(x.shape[0]) != str(x.shape[1])
    assert sorted(info(loaded).dim_names.values()) == sorted(info(graph).dim_names.values())


def test_derived_dims(tmp_path: Path) -> None:
    class Twice(nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return torch.cat([x, x]) + y

    batch = torch.export.Dim("batch", min=2, max=64)
    graph = capture(
        Twice().eval(), (torch.randn(3, 4), torch.randn(6, 4)), dynamic_shapes={"x": {0: batch}, "y": {0: 2 * batch}}
    )
    document, weights = saved(graph, tmp_path)
    assert list(document["symbols"].values()) == [{"example": 3, "min": 2, "max": 64}]
    loaded = serialize.load_graph(document, weights)
    verify(loaded, shapes=True)
    x, y = torch.randn(5, 4), torch.randn(10, 4)
    assert equal(loaded(x, y), graph(x, y))


def test_the_loaded_graph_can_be_copied_edited_and_captured(tmp_path: Path) -> None:
    x = images()
    graph = capture(Residual().eval(), x)
    loaded = reloaded(graph, tmp_path)
    assert equal(copy.deepcopy(loaded)(*x), graph(*x))
    copied = copy_graph(loaded)
    with GraphEditor(copied) as editor:
        node = next(iter(copied.graph.find_nodes(op="call_module", target="head")))
        twice = editor.insert_call(torch.ops.aten.mul.Tensor, (node, 2), after=node)
        editor.replace(node, twice)
    verify(copied, shapes=True)
    assert torch.equal(copied(*x), loaded(*x) * 2)
    assert equal(capture(loaded, x)(*x), graph(*x))
    assert equal(reloaded(copied, tmp_path)(*x), copied(*x))


def test_loads_where_the_class_of_the_model_does_not_exist(tmp_path: Path) -> None:
    x = images()
    graph = capture(Attention().eval(), x)
    document, _ = saved(graph, tmp_path)
    (tmp_path / "graph.json").write_text(json.dumps(document))
    save_file({"x": x[0], "y": graph(*x).detach().contiguous()}, tmp_path / "data.safetensors")
    code = f"""
        import json, sys, torch
        from safetensors.torch import load_file
        from fxcompress.graph.serialize import load_graph

        loaded = load_graph(json.load(open({str(tmp_path / "graph.json")!r})),
                            load_file({str(tmp_path / "weights.safetensors")!r}))
        data = load_file({str(tmp_path / "data.safetensors")!r})
        assert torch.equal(loaded(data["x"]), data["y"])
        assert not any("test_serialize" in name for name in sys.modules)
    """
    root = Path(__file__).parents[2]
    subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        check=True,
        cwd=root,
        env={"PYTHONPATH": str(root), "OMP_NUM_THREADS": str(torch.get_num_threads()), "PATH": ""},
    )


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
