"""Producers and consumers, layers of a weight, who shares a storage, names of layers by pattern."""

import functools

import pytest
import torch
from torch import nn

from fxcompress.capture import capture
from fxcompress.errors import GraphError, OptionError
from fxcompress.graph.edit import GraphEditor
from fxcompress.graph.queries import (
    GraphIndex,
    calls_of,
    consumers,
    is_tied,
    layers_of,
    matching_layers,
    module_of,
    only_consumer,
    producer,
    storage_users,
)

aten = torch.ops.aten


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.body = nn.Linear(4, 4)
        self.decoder = nn.Linear(4, 7, bias=False)
        self.decoder.weight = self.embedding.weight

    def forward(self, ids):
        x = self.body(torch.relu(self.body(self.embedding(ids))))
        return self.decoder(x) + self.embedding.weight.sum()


@functools.cache
def tied():
    return capture(Tied().eval(), (torch.randint(0, 7, (2, 5)),))


def test_producers_and_consumers():
    graph_module = tied()
    first, second = calls_of(graph_module, "body")
    (relu,) = graph_module.graph.find_nodes(op="call_function", target=aten.relu.default)
    assert producer(relu) is first
    assert producer(second) is relu
    assert consumers(first) == (relu,)
    assert only_consumer(relu) is second
    (ids,) = graph_module.graph.find_nodes(op="placeholder")
    assert producer(ids) is None
    assert module_of(graph_module, first) is graph_module.body
    assert module_of(graph_module, relu) is None


def test_consumers_are_in_graph_order_and_a_double_reader_counts_once():
    class Model(nn.Module):
        def forward(self, x):
            return x + x, x.relu(), x.tanh()

    graph_module = capture(Model().eval(), (torch.randn(2, 3),))
    (x,) = graph_module.graph.find_nodes(op="placeholder")
    with GraphEditor(graph_module) as editor:  # a reader inserted last, yet first in the graph
        first = editor.insert_call(aten.sigmoid.default, (x,), after=x)
        output = graph_module.graph.output_node()
        editor.set_args(output, ((first, *output.args[0][1:]),))
    readers = consumers(x)
    assert readers[0] is first
    assert len(readers) == len(set(readers)) == 3
    assert only_consumer(x) is None


def test_layers_of_a_weight():
    graph_module = tied()
    calls = [*calls_of(graph_module, "embedding"), *calls_of(graph_module, "decoder")]
    assert list(layers_of(graph_module, "decoder.weight")) == calls
    assert list(layers_of(graph_module, graph_module.embedding.weight)) == calls
    assert layers_of(graph_module, "body.bias") == calls_of(graph_module, "body")


def test_ties_and_calls_are_different_things():
    graph_module = tied()
    index = GraphIndex(graph_module)
    assert index.is_tied("embedding.weight")
    assert is_tied(graph_module, graph_module.decoder.weight)
    assert not index.is_tied("body.weight")
    assert len(index.calls["body"]) == 2
    users = index.users_of("embedding.weight")
    assert [user.path for user in users] == ["embedding.weight", "decoder.weight"]
    # The sum reads the weight beside the layers, under one of its names.
    assert {node.op for user in users for node in user.nodes} == {"call_module", "get_attr"}


def test_a_view_of_a_weight_shares_its_memory():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)
            self.register_buffer("row", self.fc.weight.detach()[1:2])

        def forward(self, x):
            return self.fc(x) * self.row

    graph_module = capture(Model().eval(), (torch.randn(2, 4),))
    assert [user.path for user in GraphIndex(graph_module).users_of("row")] == ["fc.weight", "row"]
    assert is_tied(graph_module, graph_module.fc.weight[2:])  # a tensor that is no attribute, by its memory


def test_slices_of_one_buffer_do_not_share():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            whole = torch.randn(2, 4)
            self.register_buffer("left", whole[0])
            self.register_buffer("right", whole[1])
            self.register_buffer("odd", torch.randn(8)[1::2])

        def forward(self, x):
            return x * self.left + self.right + self.odd

    graph_module = capture(Model().eval(), (torch.randn(2, 4),))
    assert len(storage_users(graph_module)) == 3
    assert not any(is_tied(graph_module, path) for path in ("left", "right", "odd"))


def test_empty_tensors_never_share():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("a", torch.zeros(0))
            self.register_buffer("b", torch.zeros(0))

        def forward(self, x):
            return x, self.a, self.b

    graph_module = capture(Model().eval(), (torch.randn(2, 4),))
    assert len(storage_users(graph_module)) == 2
    assert not is_tied(graph_module, "a")


def test_meta_tensors_are_told_apart_by_their_storage():
    with torch.device("meta"):
        model = Tied().eval()
        graph_module = capture(model, (torch.zeros(2, 5, dtype=torch.long),))
    assert is_tied(graph_module, "decoder.weight")
    assert not is_tied(graph_module, "body.weight")
    assert not is_tied(graph_module, "body.bias")


def test_unknown_tensors_are_named():
    graph_module = tied()
    with pytest.raises(GraphError, match=r"did you mean 'decoder\.weight'"):
        layers_of(graph_module, "decoder.wieght")
    with pytest.raises(GraphError, match="does not hold this tensor"):
        is_tied(graph_module, torch.zeros(3))


def test_many_layers():
    model = nn.Sequential(*[nn.Linear(2, 2) for _ in range(50)]).eval()
    graph_module = capture(model, (torch.randn(2, 2),))
    index = GraphIndex(graph_module)
    assert len(index.storages) == 100
    assert not any(index.is_tied(f"{n}.weight") for n in range(50))


def test_layers_by_pattern():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Conv2d(3, 4, 3)
            self.blocks = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1))

        def forward(self, x):
            return self.blocks(self.stem(x))

    graph_module = capture(Model().eval(), (torch.randn(2, 3, 8, 8),))
    assert matching_layers(graph_module, ["blocks"]) == ["blocks.0", "blocks.1", "blocks.2"]
    assert matching_layers(graph_module, ["*.0", "stem"]) == ["stem", "blocks.0"]
    assert matching_layers(graph_module, ["blocks.[02]"]) == ["blocks.0", "blocks.2"]
    assert matching_layers(graph_module, []) == []
    with pytest.raises(OptionError, match="did you mean 'blocks'"):
        matching_layers(graph_module, ["block"])
