"""Models to save, and the way through files and back."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import fx, nn
from torch.nn import functional as F

from fxcompress.graph import serialize
from fxcompress.graph.verify import verify


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
