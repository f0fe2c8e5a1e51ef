"""Saving a graph as JSON and tensors: everything comes back."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import fx, nn

from fxcompress.capture import capture
from fxcompress.errors import BundleError, PreconditionError
from fxcompress.graph import serialize
from fxcompress.graph.edit import GraphEditor, copy_graph
from fxcompress.graph.info import info
from fxcompress.graph.record import Record
from fxcompress.graph.verify import verify
from tests.graph.saving import CASES, Attention, Nested, Records, Residual, Scores, Tied, equal, images, reloaded, saved

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning")


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
    assert "saving.py" in line and "self.patch(x)" in line


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
