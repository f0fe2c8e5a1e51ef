"""The public face of the dependency analysis: graph, groups, reasons, pictures."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path

import networkx as nx
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fxcompress.analysis.dependency import Dependencies, Dimension, dependencies
from fxcompress.analysis.dependency.layout import blocks
from fxcompress.capture import capture
from fxcompress.errors import OptionError, PreconditionError


class Residual(nn.Module):
    """Two branches added, their sum joined to the first one."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.inner = nn.Conv2d(16, 6, 1)
        self.head = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = F.relu(self.norm(self.stem(x)))
        both = torch.cat([first, first + self.conv(first)], 1)
        return self.head(self.inner(both).mean((2, 3)))


class Attention(nn.Module):
    """Fused projections, a tied head, a softmax over what the last layer makes."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 12)
        self.qkv = nn.Linear(12, 36)
        self.project = nn.Linear(12, 12)
        self.gate = nn.Linear(12, 12)
        self.head = nn.Linear(12, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        batch, length, width = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, 3, 4).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, length, width)
        x = x + self.project(mixed)
        return self.head(x * self.gate(x).softmax(-1))


class Recurrent(nn.Module):
    """A stacked LSTM with both directions, read flattened."""

    def __init__(self) -> None:
        super().__init__()
        self.front = nn.Linear(5, 6)
        self.lstm = nn.LSTM(6, 7, num_layers=2, bidirectional=True, batch_first=True)
        self.head = nn.Linear(14 * 3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.lstm(F.relu(self.front(x)))[0].flatten(1))


class Shuffled(nn.Module):
    """Grouped convolutions around a channel shuffle."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 1)
        self.grouped = nn.Conv2d(8, 12, 3, groups=4)
        self.depth = nn.Conv2d(12, 12, 3, groups=12)
        self.head = nn.Conv2d(12, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.grouped(self.stem(x))
        batch, channels, height, width = y.shape
        y = y.view(batch, 4, 3, height, width).transpose(1, 2).reshape(batch, channels, height, width)
        return self.head(self.depth(y))


MODELS = {
    "residual": (Residual, (torch.randn(2, 3, 6, 6),)),
    "attention": (Attention, (torch.randint(0, 11, (2, 5)),)),
    "recurrent": (Recurrent, (torch.randn(2, 3, 5),)),
    "shuffled": (Shuffled, (torch.randn(2, 3, 8, 8),)),
}


@pytest.fixture(scope="module", params=MODELS)
def found(request: pytest.FixtureRequest) -> Dependencies:
    return of(request.param)


def of(name: str) -> Dependencies:
    torch.manual_seed(0)
    build, inputs = MODELS[name]
    return dependencies(capture(build().eval(), inputs))


def classes(found: Dependencies, dim: tuple[object, ...], index: int) -> set[int]:
    """The classes that take an index of a dimension with them."""
    place = np.unravel_index(index, [factor.size for factor in dim])  # type: ignore[attr-defined]
    result = set()
    for block in blocks(dim):  # type: ignore[arg-type]
        at = {f.axis: place[i] for i, f in enumerate(dim) if f.block is block}  # type: ignore[attr-defined]
        label = block.labels[tuple(at.get(axis, 0) for axis in range(block.labels.ndim))]
        result.add(int(found._component[label]))
    return result


def test_every_dimension_is_a_vertex(found: Dependencies) -> None:
    named = dict(found.graph_module.named_parameters(remove_duplicate=False))
    named |= dict(found.graph_module.named_buffers())
    for item, facts in found.graph.nodes(data=True):
        if item.kind != "value":
            assert named[item.name].shape[item.dim] == facts["size"]
    weights = {item.name for item in found.graph if item.kind == "parameter"}
    assert weights == set(dict(found.graph_module.named_parameters(remove_duplicate=False)))


def test_what_goes_together_is_connected(found: Dependencies) -> None:
    part_of = {item: n for n, part in enumerate(nx.connected_components(found.graph)) for item in part}
    home: dict[int, int] = {}
    for item, facts in found.graph.nodes(data=True):
        for block in blocks(facts["dim"]):
            own = np.unique(found._solution.class_of[block.labels])
            for cls in own[found._solution.removable[own]].tolist():
                assert home.setdefault(cls, part_of[item]) == part_of[item], item
    assert home


def test_edges_map_indices_exactly(found: Dependencies) -> None:
    """Every pair of an edge's map has a class in common, and every removable index has a partner in some edge."""
    seen: dict[Dimension, set[int]] = {}
    for a, b, key, data in found.graph.edges(keys=True, data=True):
        if a == b:
            assert data["barrier"]
            continue
        if not isinstance(found.graph.nodes[a]["size"], int) or not isinstance(found.graph.nodes[b]["size"], int):
            continue
        pairs = found.index_map(a, b, key)
        assert len(pairs.source), (a, b, key)
        left, right = (found.graph.nodes[end]["dim"] for end in (a, b))
        for i, j in zip(pairs.source.tolist(), pairs.target.tolist(), strict=True):
            assert classes(found, left, i) & classes(found, right, j), (a, b, i, j)
        seen.setdefault(a, set()).update(pairs.source.tolist())
        seen.setdefault(b, set()).update(pairs.target.tolist())
    for path, layout in found._builder.weights.items():
        for number, dim in enumerate(layout):
            item = next(item for item in found.graph if item[1:] == (path, number, 0) and item.kind != "value")
            if found.graph.nodes[item]["removable"] and blocks(dim):
                assert seen.get(item), item


def test_channel_zero_of_every_weight_has_an_answer(found: Dependencies) -> None:
    for path, layout in found._builder.weights.items():
        for number in range(len(layout)):
            answer = found.why(path, 0, dim=number)
            assert str(answer).startswith(f"channel 0 of {path}[{number}] can")
            assert bool(answer.reason) != answer.removable


def test_groups_tell_layers_and_all_weights() -> None:
    found = of("residual")
    stem, inner = found.groups
    assert stem.layers == ("stem", "conv")
    assert (stem.width, stem.multiplicity, len(stem.classes)) == (8, 1, 8)
    assert stem.weights["inner.weight"] == (1,)
    assert stem.weights["conv.weight"] == (0, 1)
    assert stem.weights["norm.running_var"] == (0,)
    assert inner.layers == ("inner",)
    assert inner.weights == {"inner.weight": (0,), "inner.bias": (0,), "head.weight": (1,)}
    assert str(inner) == "inner: 6 channels; 3 weights"
    assert str(found).splitlines()[0] == "2 groups of channels that can be removed"


def test_why_tells_the_indices_of_a_concatenation() -> None:
    answer = of("residual").why("stem", 3)
    assert answer
    assert answer.together["stem.weight"] == {0: [3]}
    assert answer.together["conv.weight"] == {0: [3], 1: [3]}
    assert answer.together["inner.weight"] == {1: [3, 11]}
    assert "inner.weight[1] 3, 11" in str(answer)


def test_why_tells_what_stands_in_the_way_and_where() -> None:
    answer = of("attention").why("gate", 2)
    assert not answer
    assert "softmax over channels" in answer.reason
    assert answer.node == "softmax"
    assert answer.source is not None
    assert "self.gate(x).softmax(-1)" in answer.source
    assert answer.path[0] == Dimension("parameter", "gate.weight", 0)
    assert "cannot be removed: softmax over channels" in str(answer)
    output = of("residual").why("head", 0)
    assert (output.reason, output.node) == ("it is an output of the model", "output")
    image = of("residual").why("stem", 0, dim=1)
    assert "no operation ties this dimension" in image.reason


def test_a_channel_shuffle_permutes() -> None:
    """Of 4 groups of 3 the shuffle makes 3 of 4: channel 3g + k becomes 4k + g; whole groups go, so all k with them."""
    found = of("shuffled")
    answer = found.why("grouped", 5)
    assert answer.removable
    assert answer.together["grouped.weight"][0] == [3, 4, 5]
    assert answer.together["depth.weight"][0] == [1, 5, 9]
    assert answer.together["head.weight"][1] == [1, 5, 9]
    assert answer.together["stem.weight"][0] == [2, 3]
    node = next(node for node in found.graph_module.graph.nodes if "transpose" in node.name)
    ends = [(a, b) for a, b, key in found.graph.edges(keys=True) if key == node.name]
    ((a, b),) = [(a, b) for a, b in ends if found.graph.nodes[a]["size"] == 4]
    assert str(found.index_map(a, b, node.name)) == "i → i, 0 ≤ i ≤ 3"


def test_tied_weights_are_joined() -> None:
    found = of("attention")
    names = {item.name for item in found.graph if item.kind == "parameter"}
    assert {"embed.weight", "head.weight"} <= names
    assert found.graph.has_edge(Dimension("parameter", "embed.weight", 1), Dimension("parameter", "head.weight", 1))


def test_unknown_names_are_told_with_the_nearest() -> None:
    found = of("residual")
    with pytest.raises(OptionError, match="did you mean 'stem'"):
        found.why("stam")
    with pytest.raises(OptionError, match="from 0 to 7"):
        found.why("stem", 8)
    with pytest.raises(OptionError, match="4 dimensions"):
        found.why("stem", 0, dim=4)
    with pytest.raises(OptionError, match="no operation ties"):
        found.index_map(Dimension("parameter", "stem.weight", 0), Dimension("parameter", "head.weight", 0))


def test_a_graph_without_shapes_is_refused() -> None:
    with pytest.raises(PreconditionError, match="example inputs"):
        dependencies(capture(Residual().eval()))


def test_pictures(found: Dependencies, tmp_path: Path) -> None:
    svg = found.draw(tmp_path / "picture.svg")
    root = ET.fromstring(svg.read_text())
    titles = [element.text or "" for element in root.iter("{http://www.w3.org/2000/svg}title")]
    drawn = {title.split(", ")[0] for title in titles}
    assert {str(item) for part in found.components() for item in part} <= drawn
    assert any("stopped at " in title for title in titles)
    page = found.draw(tmp_path / "picture.html").read_text()
    assert page.startswith("<!doctype html>")
    assert "<script" not in page
    assert page.count("<li>") == len(found.groups)
    text = found.draw(tmp_path / "picture.dot").read_text()
    assert text.startswith("graph dependencies {")
    assert text.count(" -- ") > len(found.groups)


def test_a_picture_of_one_layer_is_smaller_and_other_endings_are_refused(tmp_path: Path) -> None:
    found = of("residual")
    whole, part = found.draw(tmp_path / "whole.svg"), found.draw(str(tmp_path / "part.svg"), layer="inner")
    assert part.stat().st_size < whole.stat().st_size
    with pytest.raises(OptionError, match=r"\.svg, \.html or \.dot"):
        found.draw(tmp_path / "picture.bmp")


def test_drawing_nothing_leaves_an_empty_picture(tmp_path: Path) -> None:
    found = dependencies(capture(nn.ReLU().eval(), (torch.randn(2, 3),)))
    assert found.groups == []
    assert ET.fromstring(found.draw(tmp_path / "empty.svg").read_text()).tag.endswith("svg")
