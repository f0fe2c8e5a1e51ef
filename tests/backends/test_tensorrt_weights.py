"""Weights of 4 and 8 bits as TensorRT takes them: the same numbers in another form, and engines that become smaller."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

import fxcompress as fxc
from fxcompress.backends.tensorrt import TensorRT
from fxcompress.backends.tensorrt_check import check_onnx
from fxcompress.backends.tensorrt_weights import spread_block_weights
from fxcompress.errors import BackendError

needs_rtx = pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="needs tensorrt-rtx")


def block_model(path: Path, bits: int, zero: int | None, bias: bool, inner: int = 64, block: int = 32) -> Path:
    """MatMulNBits with random integers; a zero point away from the middle where one is given."""
    generator = np.random.default_rng(bits)
    outer, blocks = 8, -(-inner // block)
    held = {
        "w": generator.integers(0, 256, (outer, blocks, block * bits // 8)).astype(np.uint8),
        "s": generator.uniform(0.01, 0.1, (outer, blocks)).astype(np.float32).reshape(-1),
    }
    names = ["x", "w", "s"]
    if zero is not None:
        held["z"] = np.full((outer, -(-blocks * bits // 8)), zero if bits == 8 else zero * 17, np.uint8)
        names.append("z")
    if bias:
        held["b"] = generator.normal(size=outer).astype(np.float32)
        names += [""] * (5 - len(names)) + ["b"]
    attributes = {"K": inner, "N": outer, "bits": bits, "block_size": block}
    node = helper.make_node("MatMulNBits", names, ["y"], "layer/MatMulNBits", domain="com.microsoft", **attributes)
    ends = [
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["batch", k])] for n, k in (("x", inner), ("y", outer))
    ]
    graph = helper.make_graph([node], "g", *ends, [numpy_helper.from_array(a, n) for n, a in held.items()])
    imports = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=imports, ir_version=10), path)
    return path


def run(path: Path, x: np.ndarray) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"x": x})[0])


@pytest.mark.parametrize(
    ("bits", "zero", "stored"),
    [(4, None, TensorProto.INT4), (4, 8, TensorProto.INT4), (4, 3, TensorProto.INT8), (8, None, TensorProto.INT8)],
)
@pytest.mark.parametrize("bias", [False, True])
def test_the_same_numbers_in_another_form(tmp_path: Path, bits: int, zero: int | None, stored: int, bias: bool) -> None:
    path = block_model(tmp_path / "m.onnx", bits, zero, bias)
    x = np.random.default_rng(0).normal(size=(3, 64)).astype(np.float32)
    before = run(path, x)
    assert spread_block_weights(path) == 1
    np.testing.assert_allclose(run(path, x), before, rtol=1e-4, atol=1e-4)
    model = onnx.load(path)
    assert {tensor.name: tensor.data_type for tensor in model.graph.initializer}["w_spread"] == stored
    assert [node.name for node in model.graph.node][:2] == ["layer/DequantizeLinear", "layer/MatMul"]
    assert check_onnx(path) == []
    assert spread_block_weights(path) == 0


@pytest.mark.parametrize(("bits", "zero", "inner"), [(8, 3, 64), (4, None, 48)])
def test_what_has_no_other_form_stays_and_is_named(tmp_path: Path, bits: int, zero: int | None, inner: int) -> None:
    path = block_model(tmp_path / "m.onnx", bits, zero, False, inner=inner)
    content = path.read_bytes()
    assert spread_block_weights(path) == 0 and path.read_bytes() == content
    (finding,) = check_onnx(path)
    assert finding.code == "block_weights" and finding.layer == "layer"


def linear() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(512, 1024), nn.GELU(), nn.Linear(1024, 512)).eval()


@needs_rtx
def test_an_engine_of_4_bit_weights_is_smaller() -> None:
    backend, x = TensorRT(compute_capabilities=("sm86", "sm89")), (torch.randn(2, 512),)
    sizes = []
    for passes in ([], ["quantize_weights(bits=4)"]):
        engine = fxc.compile(linear(), passes, x, backend=backend).engine
        assert engine is not None and engine.manifest.measurements["onnx_verification"]["relative_error"]
        sizes.append(engine.manifest.measurements["tensorrt"]["bytes"])
    assert sizes[1] < sizes[0] / 2


@needs_rtx
def test_8_bit_weights_with_zero_points_are_refused() -> None:
    with pytest.raises(BackendError, match="without zero points") as caught:
        fxc.compile(linear(), ["quantize_weights(bits=8)"], (torch.randn(2, 512),), backend="tensorrt")
    assert "layer '0'" in str(caught.value.where)
    assert "symmetric=True" in str(caught.value.remedy)


@needs_rtx
@pytest.mark.parametrize("dtype", [None, "float16", "bfloat16"])
@pytest.mark.parametrize("bits", [4, 8])
def test_symmetric_weights_build_in_every_precision(bits: int, dtype: str | None, tmp_path: Path) -> None:
    passes = [f"quantize_weights(bits={bits}, symmetric=True)"]
    passes += [f"convert_precision(dtype={dtype!r})"] if dtype else []
    backend, x = TensorRT(compute_capabilities=("sm86",), keep_onnx=True), (torch.randn(2, 512),)
    fxc.compile(linear(), passes, x, backend=backend, output=tmp_path / "b")
    model = onnx.load(tmp_path / "b" / "model.onnx")
    kinds = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    assert kinds["0.packed_spread"] == (TensorProto.INT4 if bits == 4 else TensorProto.INT8)
    assert not {"MatMulNBits", "Reshape"} & {node.op_type for node in model.graph.node}


@needs_rtx
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_blocks_that_are_not_whole_are_refused_before_the_parser_does(dtype: str) -> None:
    passes = ["quantize_weights(bits=4)"] + (["convert_precision(dtype='float16')"] if dtype == "float16" else [])
    model = nn.Sequential(nn.Linear(100, 64)).eval()
    with pytest.raises(BackendError, match="will not import") as caught:
        fxc.compile(model, passes, (torch.randn(2, 100),), backend="tensorrt")
    assert "block_size" in str(caught.value.remedy) and "100" in str(caught.value.remedy)
