"""The table of ``docs/tensorrt.md``: what builds ahead of time, and what is refused. Each cell is tried."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxcompress as fxc
from fxcompress.backends.tensorrt import TensorRT
from fxcompress.errors import BackendError
from tests.backends import contract

DOCS = Path(__file__).resolve().parents[2] / "docs" / "tensorrt.md"

Case = tuple[nn.Module, tuple[Any, ...], list[Any], dict[str, Any]]
IMAGES, ROWS = (torch.randn(2, 3, 8, 8),), (torch.randn(2, 64),)


class Keywords(nn.Module):
    def forward(self, x: torch.Tensor, *, scale: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"y": x * scale["by"]}


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.gru = nn.LSTM(6, 8, batch_first=True, bidirectional=True), nn.GRU(16, 4, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.gru(self.lstm(x)[0])[0]


class Increment(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1


def linear() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32)).eval()


def tokens() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randint(0, 50, (2, 6)), torch.ones(2, 6, dtype=torch.bool)


CASES: dict[str, Callable[[], Case]] = {
    "dynamic dims": lambda: (contract.Convolutional().eval(), IMAGES, [], {}),
    "several profiles": lambda: (linear(), ROWS, [], {"profiles": ({"batch": (1, 1, 4)}, {"batch": (4, 16, 64)})}),
    "dict and keyword inputs": lambda: (Keywords().eval(), ROWS, [], {}),
    "attention": lambda: (contract.Attention().eval(), tokens(), [], {}),
    "recurrent layers": lambda: (Recurrent().eval(), (torch.randn(2, 5, 6),), [], {}),
    "float16": lambda: (linear(), ROWS, ["convert_precision(dtype='float16')"], {}),
    "bfloat16": lambda: (linear(), ROWS, ["convert_precision(dtype='bfloat16')"], {}),
    "float64": lambda: (linear().double(), (ROWS[0].double(),), [], {}),
    "integers of 64 bits": lambda: (Increment().eval(), (torch.tensor([1, 2]),), [], {}),
    "static int8": lambda: (
        contract.Convolutional().eval(),
        IMAGES,
        ["fuse_modules", fxc.passes.Quantize([IMAGES], scheme="tensorrt")],
        {},
    ),
    "static int8 of the onnxruntime scheme": lambda: (
        contract.Convolutional().eval(),
        IMAGES,
        ["fuse_modules", fxc.passes.Quantize([IMAGES], scheme="onnxruntime")],
        {},
    ),
    "dynamic int8": lambda: (linear(), ROWS, ["quantize_dynamic"], {}),
    "weights stored in 4 bits": lambda: (linear(), ROWS, ["quantize_weights(bits=4, block_size=32)"], {}),
    "weights stored in 8 bits": lambda: (linear(), ROWS, ["quantize_weights(bits=8, symmetric=True)"], {}),
    "2:4 sparse kernels": lambda: (linear(), ROWS, [], {"sparse_weights": True}),
    "fold and unfold": lambda: (
        nn.Sequential(nn.Unfold(3, padding=1), nn.Tanh(), nn.Fold((8, 8), 3, padding=1)).eval(),
        IMAGES,
        [],
        {},
    ),
}


def table() -> dict[str, str]:
    lines = DOCS.read_text(encoding="utf-8").splitlines()
    start = next(index for index, line in enumerate(lines) if line.startswith("| feature"))
    rows: dict[str, str] = {}
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        title, builds, *_ = (cell.strip() for cell in line.strip("|").split("|"))
        rows[title] = builds
    return rows


def test_the_table_has_every_case() -> None:
    assert list(table()) == list(CASES) and set(table().values()) == {"yes", "no"}


@pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="needs tensorrt-rtx")
@pytest.mark.parametrize("title", CASES)
def test_the_table_is_true(title: str, tmp_path: Path) -> None:
    model, args, passes, options = CASES[title]()
    inputs: Any = {"x": args[0], "scale": {"by": args[0]}} if isinstance(model, Keywords) else args
    compiled = fxc.compile(model, passes, inputs, progress=False, verify=False)
    backend = TensorRT(compute_capabilities=("sm86", "sm89"), **options)
    if table()[title] == "yes":
        assert compiled.export(backend, tmp_path / "b").manifest.measurements["tensorrt"]["bytes"] > 0
    else:
        with pytest.raises(BackendError) as caught:
            compiled.export(backend, tmp_path / "b")
        assert caught.value.remedy and not (tmp_path / "b").exists()
