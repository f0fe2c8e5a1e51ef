"""The user's parameter names in the state dict of a graph."""

import copy

import torch
from torch import nn

from fxcompress.capture import capture
from fxcompress.graph.edit import GraphEditor, copy_graph
from fxcompress.graph.names import keep_original_names, original_name


class Attends(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.attention(x, x, x, need_weights=False)[0])


X = torch.randn(2, 5, 8)


def attends():
    model = Attends().eval()
    return model, capture(model, (X,))


def test_the_state_dict_has_the_users_names():
    model, graph_module = attends()
    assert set(graph_module.state_dict()) == set(model.state_dict())
    inner = dict(graph_module.named_parameters())
    moved = [path for path in inner if path not in model.state_dict()]
    assert moved
    assert {original_name(graph_module, path) for path in inner} == set(model.state_dict())
    assert original_name(graph_module, "head.weight") == "head.weight"


def test_checkpoints_go_both_ways():
    _, graph_module = attends()
    other = Attends().eval()
    missing, unexpected = graph_module.load_state_dict(other.state_dict())
    assert not missing
    assert not unexpected
    torch.testing.assert_close(graph_module(X), other(X))
    third = Attends().eval()
    third.load_state_dict(graph_module.state_dict())
    torch.testing.assert_close(third(X), other(X))


def test_strict_loading_still_tells_what_is_wrong():
    model, graph_module = attends()
    state = dict(model.state_dict())
    state["surplus"] = state.pop("head.bias")
    missing, unexpected = graph_module.load_state_dict(state, strict=False)
    assert missing == ["head.bias"]
    assert unexpected == ["surplus"]


def test_copies_keep_the_names_and_hooks_are_registered_once():
    model, graph_module = attends()
    for _ in range(3):
        keep_original_names(graph_module)
    assert len(graph_module._state_dict_hooks) == 1
    for copied in (copy_graph(graph_module), copy_graph(copy_graph(graph_module)), copy.deepcopy(graph_module)):
        assert set(copied.state_dict()) == set(model.state_dict())
        copied.load_state_dict(model.state_dict())
        assert len(copied._state_dict_hooks) == 1


def test_inside_another_module():
    model, graph_module = attends()
    outer = nn.Sequential(graph_module)
    assert set(outer.state_dict()) == {f"0.{name}" for name in model.state_dict()}
    other = Attends().eval()
    outer.load_state_dict({f"0.{name}": value for name, value in other.state_dict().items()})
    torch.testing.assert_close(graph_module(X), other(X))


def test_names_of_layers_that_went_are_forgotten():
    _, graph_module = attends()
    moved = {path for path, _ in graph_module.named_parameters() if original_name(graph_module, path) != path}
    (head,) = graph_module.graph.find_nodes(op="call_module", target="head")
    (x,) = graph_module.graph.find_nodes(op="placeholder")
    with GraphEditor(graph_module) as editor:
        editor.set_args(head, (x,))
    assert set(graph_module.state_dict()) == {"head.weight", "head.bias"}
    assert all(original_name(graph_module, path) == path for path in moved)


def test_one_weight_under_two_layers():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Parameter(torch.randn(4, 4))

        def forward(self, x):
            y = nn.functional.linear(x, self.table)
            return nn.functional.linear(y.relu(), self.table, torch.ones(4)) + self.table.sum()

    model, x = Model().eval(), torch.randn(2, 4)
    graph_module = capture(model, (x,))
    state = graph_module.state_dict()
    assert "table" in state
    other = Model().eval()
    graph_module.load_state_dict({**state, **other.state_dict()})
    torch.testing.assert_close(graph_module(x), other(x))
    assert len({parameter.data_ptr() for parameter in graph_module.parameters()}) == 1
