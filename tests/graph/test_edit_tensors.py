"""The editor: new tensors and layers in the place of old ones; the user's model and other graphs are left alone."""

import copy

import pytest
import torch
from torch import nn

from fxcompress.capture import capture
from fxcompress.graph.edit import GraphEditor, copy_graph
from fxcompress.graph.info import info
from fxcompress.graph.printer import format_graph
from fxcompress.graph.verify import verify
from tests.graph.nets import Net, X, net, op

aten = torch.ops.aten

# --- tensors -------------------------------------------------------------------------------------------------------


def test_set_tensor_puts_a_new_one_and_keeps_what_it_was():
    graph_module = net()
    graph_module.conv.weight.requires_grad_(False)
    old = graph_module.conv.weight
    value, mean = old.clone(), graph_module.norm.running_mean
    with GraphEditor(graph_module) as editor:
        editor.set_tensor("conv.weight", old * 2)
        editor.set_tensor("norm.running_mean", mean + 1)
        editor.set_tensor("gain", torch.full((4, 1, 1), 3.0))
    assert isinstance(graph_module.conv.weight, nn.Parameter)
    assert not graph_module.conv.weight.requires_grad
    assert graph_module.gain.requires_grad
    assert torch.equal(old, value)
    assert "norm.running_mean" in graph_module.state_dict()
    assert float(mean.abs().max()) == 0
    assert float(graph_module.norm.running_mean.min()) == 1


def test_set_tensor_of_a_transient_buffer_stays_transient():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mask", torch.ones(4), persistent=False)

        def forward(self, x):
            return x * self.mask

    graph_module = capture(Model().eval(), (torch.randn(2, 4),))
    with GraphEditor(graph_module) as editor:
        editor.set_tensor("mask", torch.zeros(4))
    assert not graph_module.state_dict()
    assert float(graph_module(torch.randn(2, 4)).abs().max()) == 0


def test_set_tensor_of_another_size_reaches_the_output():
    graph_module = net()
    with GraphEditor(graph_module) as editor:
        editor.set_tensor("head.weight", graph_module.head.weight[:2])
        editor.set_tensor("head.bias", graph_module.head.bias[:2])
    verify(graph_module, shapes=True)
    assert graph_module(X).shape == (2, 2)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_set_tensor_of_a_recurrent_layer_is_what_runs(kind):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = kind(4, 3, batch_first=True)

        def forward(self, x):
            return self.rnn(x)[0]

    model, x = Model().eval(), torch.randn(2, 5, 4)
    graph_module = capture(model, (x,))
    weight = torch.randn_like(model.rnn.weight_ih_l0)
    with GraphEditor(graph_module) as editor:
        editor.set_tensor("rnn.weight_ih_l0", weight)
    before = model(x)
    with torch.no_grad():
        model.rnn.weight_ih_l0.copy_(weight)
    assert not torch.equal(model(x), before)
    torch.testing.assert_close(graph_module(x), model(x))


def test_tied_weights_stay_tied_when_set_together():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.decoder = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
            self.decoder.weight = self.embedding.weight

        def forward(self, ids):
            return self.decoder(self.embedding(ids))

    model = Model().eval()
    graph_module = capture(model, (torch.randint(0, 7, (2, 5)),))
    assert graph_module.decoder.weight is graph_module.embedding.weight
    fresh = nn.Parameter(torch.zeros(7, 4))
    with GraphEditor(graph_module) as editor:
        editor.set_tensor("embedding.weight", fresh)
        editor.set_tensor("decoder.weight", fresh)
    assert graph_module.decoder.weight is graph_module.embedding.weight is fresh
    assert len(list(graph_module.parameters())) == 1


def test_set_module_serves_every_call():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x):
            return self.fc(torch.relu(self.fc(x)))

    graph_module = capture(Model().eval(), (torch.randn(2, 4),))
    replacement = nn.Sequential(nn.Linear(4, 2, bias=False), nn.Linear(2, 4))
    with GraphEditor(graph_module) as editor:
        editor.set_module("fc", replacement)
    verify(graph_module, shapes=True)
    assert not replacement.training
    x = torch.randn(2, 4)
    torch.testing.assert_close(graph_module(x), replacement(torch.relu(replacement(x))))


# --- copies --------------------------------------------------------------------------------------------------------


def test_a_copy_shares_weights_and_nothing_else():
    graph_module = net()
    text, expected = format_graph(graph_module), graph_module(X)
    copied = copy_graph(graph_module)
    assert format_graph(copied) == text
    assert all(a is b for a, b in zip(graph_module.parameters(), copied.parameters(), strict=True))
    assert torch.equal(copied(X), expected)
    with GraphEditor(copied) as editor:
        editor.set_tensor("head.weight", torch.zeros(5, 4))
        editor.set_tensor("norm.running_mean", torch.ones(4))
        editor.set_module("conv", nn.Conv2d(3, 4, 3, bias=False))
        relu = op(copied, aten.relu.default)
        editor.replace(relu, relu.args[0])
    copied.train()
    copied.norm.eps = 1.0
    copied.head.register_forward_hook(lambda *_: 1 / 0)
    info(copied).notes.append("of the copy")
    assert format_graph(graph_module) == text
    assert not any(module.training for module in graph_module.modules())
    assert torch.equal(graph_module(X), expected)
    assert info(graph_module).notes == []
    verify(graph_module, shapes=True)


def test_a_copy_of_a_recurrent_layer_is_isolated():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = nn.LSTM(4, 3, batch_first=True)

        def forward(self, x):
            return self.rnn(x)[0]

    x = torch.randn(2, 5, 4)
    graph_module = capture(Model().eval(), (x,))
    expected = graph_module(x)
    copied = copy_graph(graph_module)
    with GraphEditor(copied) as editor:
        editor.set_tensor("rnn.weight_hh_l0", torch.zeros(12, 3))
    assert torch.equal(graph_module(x), expected)
    assert not torch.equal(copied(x), expected)


def test_a_copy_keeps_shared_layers_and_ties():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4, bias=False)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.b(self.a(self.a(x)))

    copied = copy_graph(capture(Model().eval(), (torch.randn(2, 4),)))
    assert copied.a.weight is copied.b.weight
    verify(copied, shapes=True)


def test_the_users_model_is_left_alone():
    model = Net().eval()
    state = copy.deepcopy(model.state_dict())
    graph_module = capture(model, (X,))
    with GraphEditor(graph_module) as editor:
        editor.set_tensor("conv.weight", torch.zeros(4, 3, 3, 3))
        editor.set_tensor("norm.running_var", torch.ones(4) * 9)
        editor.set_module("head", nn.Linear(4, 2))
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert model(X).shape == (2, 5)


def test_a_deep_copy_is_a_graph_too():
    graph_module = net()
    copied = copy.deepcopy(graph_module)
    verify(copied, shapes=True)
    assert format_graph(copied) == format_graph(graph_module)
    assert copied.conv.weight is not graph_module.conv.weight
    assert torch.equal(copied(X), graph_module(X))
