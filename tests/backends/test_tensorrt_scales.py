"""Scales of int8 inputs moved beside the weights: the same integers, and kernels that layers share."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from torch import nn

import fxcompress as fxc
from fxcompress.backends.onnx_export import write_onnx
from fxcompress.backends.tensorrt_check import check_onnx
from fxcompress.backends.tensorrt_scales import move_scales_to_weights

needs_rtx = pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="needs tensorrt-rtx")


class Forked(nn.Module):
    """Convolutions (one of them grouped) that share an input, a sum, and linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.left = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.right, self.first, self.second = nn.Conv2d(8, 8, 1), nn.Linear(8, 6), nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(self.left(x) + self.right(x))
        return self.second(torch.relu(self.first(x.mean((2, 3)))))


def quantized(model: nn.Module, x: torch.Tensor) -> Any:
    passes = ["fuse_modules", fxc.passes.Quantize([(x,)], scheme="tensorrt", observer="minmax")]
    return fxc.compile(model.eval(), passes, (x,), progress=False)


def run(path: Path, x: torch.Tensor) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


def scales(path: Path, operator: str) -> list[float]:
    graph = onnx.load(path).graph
    held = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    found = [held[node.input[1]] for node in graph.node if node.op_type == operator]
    return [float(scale.reshape(())) for scale in found if scale.size == 1]


def test_the_same_function_with_scales_of_one(tmp_path: Path) -> None:
    x, path = torch.randn(2, 3, 8, 8), tmp_path / "model.onnx"
    write_onnx(quantized(Forked(), x).module, path)
    before, count = run(path, x), len(scales(path, "QuantizeLinear"))
    moved = move_scales_to_weights(path)
    assert 0 < moved <= count and scales(path, "QuantizeLinear").count(1.0) == moved
    onnx.checker.check_model(onnx.load(path), full_check=True)
    assert not [finding for finding in check_onnx(path) if finding.refused]
    np.testing.assert_allclose(run(path, x), before, rtol=1e-5, atol=1e-6)
    for batch in (1, 5):
        assert run(path, torch.randn(batch, 3, 8, 8)).shape == (batch, 4)


def test_an_input_that_others_read_too_is_left(tmp_path: Path) -> None:
    x, path = torch.randn(2, 3, 8, 8), tmp_path / "model.onnx"
    write_onnx(quantized(Forked(), x).module, path)
    model = onnx.load(path)
    kept = next(node for node in model.graph.node if node.op_type == "Conv").input[0]
    model.graph.node.append(onnx.helper.make_node("Identity", [kept], ["seen"]))
    onnx.save(model, path)
    (maker,) = (node for node in model.graph.node if kept in node.output)
    before = scales(path, "QuantizeLinear")
    move_scales_to_weights(path)
    after = onnx.load(path)
    (same,) = (node for node in after.graph.node if kept in node.output)
    assert same.input[1] == maker.input[1] and before[0] in scales(path, "QuantizeLinear")


def test_a_file_without_any_is_not_touched(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    write_onnx(fxc.compile(Forked().eval(), [], (torch.randn(2, 3, 8, 8),), progress=False).module, path)
    before = path.read_bytes(), path.stat().st_mtime_ns
    assert move_scales_to_weights(path) == 0
    assert (path.read_bytes(), path.stat().st_mtime_ns) == before


@needs_rtx
def test_layers_share_kernels_and_stay_int8(tmp_path: Path) -> None:
    """TensorRT for RTX keeps kernels as CUDA source; each copy of it begins with the same definitions."""
    layers = [layer for _ in range(6) for layer in (nn.Conv2d(16, 16, 1), nn.ReLU())]
    x = torch.randn(2, 16, 8, 8)
    with quantized(nn.Sequential(*layers), x).export("tensorrt", tmp_path / "b") as engine:
        assert engine.manifest.measurements["tensorrt"]["scales_in_weights"] == 6
    plan = (tmp_path / "b" / "model.engine").read_bytes()
    assert plan.count(b"using __myln_int8 = signed char;") <= 4
    assert plan.count(b"type=int8") >= 6
