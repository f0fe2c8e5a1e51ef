"""Operators that TensorRT lacks, written with others: held against ONNX Runtime on the file as it was."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from fxcompress.backends.onnx_export import write_onnx
from fxcompress.backends.tensorrt_check import check_onnx
from fxcompress.backends.tensorrt_lowering import lower_operators
from fxcompress.capture import capture


class Folds(nn.Module):
    """Patches taken apart, changed, and summed up again."""

    def __init__(self, size: tuple[int, int], **options: object) -> None:
        super().__init__()
        self.unfold, self.fold = nn.Unfold(**options), nn.Fold(size, **options)  # type: ignore[arg-type]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fold(torch.tanh(self.unfold(x)))


def run(path: Path, x: torch.Tensor) -> np.ndarray:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (output,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    return np.asarray(output)


@pytest.mark.parametrize(
    ("size", "options"),
    [
        ((8, 8), {"kernel_size": 2, "stride": 2}),
        ((9, 12), {"kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 0)}),
        ((10, 9), {"kernel_size": 3, "stride": 3, "padding": 1, "dilation": (1, 2)}),  # pixels that no patch covers
    ],
)
@torch.no_grad()
def test_fold_is_a_transposed_convolution(tmp_path: Path, size: tuple[int, int], options: dict[str, object]) -> None:
    model = Folds(size, **options).eval()
    path = tmp_path / "model.onnx"
    write_onnx(capture(model, (torch.randn(2, 3, *size),)), path)
    assert any(finding.op == "Col2Im" for finding in check_onnx(path))
    lower_operators(path)
    assert not check_onnx(path)
    assert "Col2Im" not in {node.op_type for node in onnx.load(path).graph.node}
    for batch in (1, 3):
        x = torch.randn(batch, 3, *size)
        np.testing.assert_allclose(run(path, x), model(x).numpy(), rtol=1e-6, atol=1e-6)


def test_a_file_without_any_is_not_touched(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    write_onnx(capture(nn.Linear(3, 2).eval(), (torch.randn(2, 3),)), path)
    before = path.read_bytes(), path.stat().st_mtime_ns
    lower_operators(path)
    assert (path.read_bytes(), path.stat().st_mtime_ns) == before


def test_an_image_whose_size_is_computed_is_left(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    write_onnx(capture(Folds((8, 8), kernel_size=2, stride=2).eval(), (torch.randn(2, 3, 8, 8),)), path)
    model = onnx.load(path)
    (fold,) = (node for node in model.graph.node if node.op_type == "Col2Im")
    fold.input[1] = "computed"
    onnx.save(model, path)
    lower_operators(path)
    assert any(node.op_type == "Col2Im" for node in onnx.load(path).graph.node)
