"""Memory measured in a process of its own: the weights show, and what fails there is told here."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import fxcompress as fxc
from fxcompress import footprint as module
from fxcompress.capture.inputs import ExampleInputs
from fxcompress.footprint import footprint

WIDTH = 4096
WEIGHTS = 4 * WIDTH * WIDTH  # bytes


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: torch.Tensor, *, more: dict[str, torch.Tensor]) -> torch.Tensor:
        return self.linear(x + more["shift"])


@pytest.fixture(autouse=True)
def _only_where_memory_is_told() -> None:
    if not module._status():
        pytest.skip("needs /proc")


def test_the_weights_show(tmp_path: Path) -> None:
    inputs = ExampleInputs((torch.randn(2, WIDTH),), {"more": {"shift": torch.ones(2, WIDTH)}})
    compiled = fxc.compile(Nested().eval(), example_inputs=inputs, progress=False)
    compiled.export("torchscript", tmp_path / "b", verify=False).close()
    found = footprint(str(tmp_path / "b"), inputs, threads=1)
    assert not found.problem
    assert found.resident is not None and found.peak is not None and found.process is not None
    assert 0.9 * WEIGHTS < found.resident < 4 * WEIGHTS
    assert found.resident <= found.peak < found.process


def test_what_fails_there_is_told(tmp_path: Path) -> None:
    found = footprint(str(tmp_path / "nothing"), ExampleInputs((torch.randn(2, 3),), {}))
    assert found.problem and found.resident is None
    assert "no answer after" in footprint("torchvision:resnet18", ExampleInputs((), {}), timeout=0.01).problem


def test_a_system_that_does_not_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_status", dict)
    assert "/proc" in footprint("anything", ExampleInputs((), {})).problem
