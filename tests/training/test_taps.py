"""Values inside models come as [batch, channels, places …], whichever dim the model has channels in."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fxcompress.capture import capture
from fxcompress.training.features import adapter_for, attention, relational
from fxcompress.training.taps import tapped


class Swapped(nn.Module):
    """Channels last in the middle, as in models of images made of tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.norm = nn.LayerNorm(6)
        self.wide = nn.Linear(6, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = torch.nn.functional.gelu(self.wide(self.norm(self.stem(x).permute(0, 2, 3, 1))))
        return result


@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize(
    ("model", "shape", "expected"),
    [
        (nn.Sequential(nn.Conv1d(3, 5, 3, padding=1), nn.ReLU()), (2, 3, 7), {"0": (2, 5, 7)}),
        (nn.Sequential(nn.Conv3d(3, 5, 3, padding=1)), (2, 3, 4, 6, 7), {"0": (2, 5, 4, 6, 7)}),
        (nn.Sequential(nn.Linear(3, 5), nn.ReLU()), (2, 7, 3), {"0": (2, 5, 7)}),
        (nn.Sequential(nn.Linear(3, 5)), (2, 3), {"0": (2, 5)}),
        (Swapped(), (2, 3, 4, 5), {"stem": (2, 6, 4, 5), "norm": (2, 6, 4, 5), "wide": (2, 10, 4, 5)}),
    ],
    ids=["conv1d", "conv3d", "tokens", "rows", "channels_last"],
)
def test_the_layer_says_where_channels_are(
    model: nn.Module, shape: tuple[int, ...], expected: dict[str, tuple[int, ...]], captured: bool
) -> None:
    x = torch.randn(shape)
    model = capture(model.eval(), (x,)) if captured else model.eval()
    with tapped(model, expected) as values:
        model(x)
        assert {name: tuple(value.shape) for name, value in values.items()} == expected


def test_an_operation_has_channels_where_its_layer_has() -> None:
    x = torch.randn(2, 3, 7)
    graph = capture(nn.Sequential(nn.Conv1d(3, 5, 3, padding=1), nn.ReLU()).eval(), (x,))
    with tapped(graph, ["relu"]) as values:
        graph(x)
        assert values["relu"].shape == (2, 5, 7)


def test_maps_and_embeddings_of_signals_are_over_channels() -> None:
    signal = torch.zeros(1, 4, 6)
    signal[0, :, 2] = 1.0  # all at one place
    elsewhere = signal.roll(1, 2)
    assert float(attention(signal, signal * 3)) == 0.0
    assert float(attention(signal, elsewhere)) > 1.0
    batch = torch.randn(5, 4, 6)
    torch.testing.assert_close(relational(batch, batch[:, :, torch.randperm(6)]), torch.tensor(0.0), atol=1e-6, rtol=0)


@pytest.mark.parametrize("places", [(), (7,), (4, 5), (2, 3, 4)])
def test_an_adapter_maps_channels_alike_at_all_places(places: tuple[int, ...]) -> None:
    student, teacher = torch.randn(2, 3, *places), torch.randn(2, 8, *places)
    adapter = adapter_for(student, teacher)
    assert adapter(student).shape == teacher.shape
    assert sum(weight.numel() for weight in adapter.parameters()) == 24
