"""The small model that the graph tests edit, and ways to find its nodes."""

import functools

import torch
from torch import nn

from fxcompress.capture import capture
from fxcompress.graph.edit import copy_graph


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 5)
        self.gain = nn.Parameter(torch.ones(4, 1, 1))

    def forward(self, x):
        return self.head((torch.relu(self.norm(self.conv(x))) * self.gain).mean((2, 3)))


X = torch.randn(2, 3, 8, 8)


@functools.cache
def _captured():
    return capture(Net().eval(), (X,))


def net():
    """A fresh graph of :class:`Net`."""
    return copy_graph(_captured())


def call(graph_module, path):
    return graph_module.graph.find_nodes(op="call_module", target=path)[0]


def op(graph_module, target):
    return graph_module.graph.find_nodes(op="call_function", target=target)[0]
