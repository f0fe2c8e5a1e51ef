"""A graph in another precision is a copy that computes the same."""

import torch
from torch import nn

from fxcompress.capture import capture
from fxcompress.graph.casting import cast_graph, cast_leaves
from fxcompress.graph.verify import verify


class Mixed(nn.Module):
    """Tied weights, an LSTM, a buffer, an integer input and a cast."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.lstm = nn.LSTM(6, 6, batch_first=True)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.rand(6))

    def forward(self, tokens, gain):
        x = self.lstm(self.embed(tokens))[0] * self.scale + gain.to(torch.float32).mean()
        return self.head(x), tokens + 1


def test_casting_to_float64():
    tokens, gain = torch.randint(0, 11, (2, 5)), torch.rand(2, 3)
    graph = capture(Mixed().eval(), (tokens, gain))
    weight = graph.get_submodule("head").weight
    wide = cast_graph(graph, torch.float64)
    verify(wide, shapes=True)
    expected, _ = graph(tokens, gain)
    actual, counted = wide(*cast_leaves([tokens, gain], torch.float64))
    assert actual.dtype == torch.float64 and counted.dtype == torch.int64
    torch.testing.assert_close(actual.float(), expected)
    assert wide.get_submodule("head").weight is wide.get_submodule("embed").weight
    assert graph.get_submodule("head").weight is weight and weight.dtype == torch.float32
    assert wide(*cast_leaves([tokens[:1], gain[:1]], torch.float64))[0].shape == (1, 5, 11)
