"""Running an ONNX model part by part: where it is cut, and that the parts compute what the whole does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

import fxcompress as fxc
from fxcompress.backends import onnx_weights
from fxcompress.backends.onnx_parts import cut, run_parts
from fxcompress.backends.onnxruntime import OnnxRuntimeEngine
from fxcompress.errors import VerificationError

WIDTH = 8
BYTES = WIDTH * WIDTH * 4


def chain(depth: int, *, typed: bool = True) -> onnx.ModelProto:
    """``depth`` products with weights of their own; the first result is added in the end, and given back too."""
    rng = np.random.default_rng(0)
    weights = [
        numpy_helper.from_array(rng.standard_normal((WIDTH, WIDTH), np.float32) / 3, f"w{i}") for i in range(depth)
    ]
    names = ["x", *(f"h{i}" for i in range(depth))]
    nodes = [helper.make_node("MatMul", [names[i], f"w{i}"], [names[i + 1]]) for i in range(depth)]
    if not typed:
        nodes = [helper.make_node("Scaled", [names[i], f"w{i}"], [names[i + 1]], domain="own") for i in range(depth)]
    nodes.append(helper.make_node("Add", [names[1], names[-1]], ["y"]))
    floats = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", WIDTH]) for name in ("x", "y", "h0")]
    graph = helper.make_graph(nodes, "g", floats[:1], floats[1:], weights)
    domains = [helper.make_opsetid("", 20), helper.make_opsetid("own", 1)]
    return helper.make_model(graph, opset_imports=domains, ir_version=10)


def test_parts_hold_no_more_weights_than_allowed_and_every_node_once() -> None:
    model = chain(7)
    parts = cut(model, 2 * BYTES + 64)
    assert [len(part.model.graph.initializer) for part in parts] == [2, 2, 2, 1]
    assert [node.output[0] for part in parts for node in part.model.graph.node] == [f"h{i}" for i in range(7)] + ["y"]
    assert parts[0].inputs == ("x",) and parts[0].outputs == ("h0", "h1")
    assert parts[1].inputs == ("h1",) and parts[1].outputs == ("h3",)
    assert parts[-1].inputs == ("h0", "h5") and parts[-1].outputs == ("y",)


def test_a_model_with_few_weights_is_one_part() -> None:
    assert len(cut(chain(7))) == 1


def test_a_value_of_unknown_type_does_not_cross() -> None:
    model = chain(4, typed=False)  # the types of the results are those of an operator that nobody knows
    assert len(cut(model, BYTES)) == 2  # but for the first, which is also an output and so declared


def test_the_parts_compute_what_the_whole_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxcompress.backends.onnx_parts._LEAST", BYTES)
    path = tmp_path / "model.onnx"
    onnx.save(chain(7), path)
    opened = []

    def open_(model: bytes) -> onnxruntime.InferenceSession:
        opened.append(model)
        return onnxruntime.InferenceSession(model)

    arrays = [np.random.default_rng(size).standard_normal((size, WIDTH), np.float32) for size in (2, 5)]
    feeds = [{"x": onnxruntime.OrtValue.ortvalue_from_numpy(array)} for array in arrays]
    found = run_parts(path, open_, feeds)
    assert len(opened) > 3  # each part once, for all inputs
    whole = onnxruntime.InferenceSession(path)
    for array, values in zip(arrays, found, strict=True):
        assert values.keys() == {"y", "h0"}
        for name, expected in zip(("y", "h0"), whole.run(["y", "h0"], {"x": array}), strict=True):
            np.testing.assert_allclose(values[name].numpy(), expected, rtol=1e-5, atol=1e-6)


@pytest.fixture
def heavy(monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """A model whose weights become a file of their own, and whose engine is verified in several parts."""
    monkeypatch.setattr(onnx_weights, "_EMBED", 1 << 10)
    monkeypatch.setattr("fxcompress.backends.onnx_parts._LEAST", 1 << 10)
    torch.manual_seed(0)
    return nn.Sequential(*(layer for _ in range(6) for layer in (nn.Linear(32, 32), nn.ReLU()))).eval()


def test_a_large_engine_opens_when_it_is_first_run(heavy: nn.Module) -> None:
    x = torch.randn(2, 32)
    compiled = fxc.compile(heavy, example_inputs=(x,), backend="onnxruntime", progress=False)
    engine = compiled.engine
    assert isinstance(engine, OnnxRuntimeEngine) and engine._session is None
    assert engine.manifest.measurements["verification"]["input_shapes"] == [[[2, 32]], [[1, 32]]]
    torch.testing.assert_close(engine(x), heavy(x), rtol=1e-5, atol=1e-6)
    assert engine._session is not None and engine.session.get_inputs()[0].shape == ["batch", 32]
    first, second = engine.run_each([[x], [x[:1]]])
    torch.testing.assert_close(first[0][:1], second[0], rtol=1e-5, atol=1e-6)
    engine.close()


def test_without_verification_it_is_opened_at_once(heavy: nn.Module) -> None:
    compiled = fxc.compile(
        heavy, example_inputs=(torch.randn(2, 32),), backend="onnxruntime", verify=False, progress=False
    )
    assert isinstance(compiled.engine, OnnxRuntimeEngine) and compiled.engine._session is not None


def test_a_wrong_weight_in_the_file_is_noticed(
    heavy: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = onnx_weights.raw_bytes

    def spoiled(tensor: torch.Tensor) -> np.ndarray:
        return write(tensor * 1.01 if tensor.dim() == 2 else tensor)

    monkeypatch.setattr(onnx_weights, "raw_bytes", spoiled)
    output = tmp_path / "bundle"
    with pytest.raises(VerificationError, match="differs from PyTorch"):
        fxc.compile(heavy, example_inputs=(torch.randn(2, 32),), backend="onnxruntime", output=output, progress=False)
    assert not output.exists()


def test_an_engine_that_opens_late_proves_the_whole_before_it_runs(heavy: nn.Module) -> None:
    x = torch.randn(2, 32)
    engine = fxc.compile(heavy, example_inputs=(x,), backend="onnxruntime", progress=False).engine
    assert isinstance(engine, OnnxRuntimeEngine)
    model = onnx.load(engine.path / "model.onnx")
    weight = next(tensor for tensor in model.graph.initializer if len(tensor.dims) == 2)
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * 1.01, weight.name))
    onnx.save(model, engine.path / "model.onnx")  # stands for an optimizer that goes wrong across two parts
    for _ in range(2):  # it is not taken the second time either
        with pytest.raises(VerificationError, match="differs from PyTorch"):
            engine(x)
        assert engine._session is None


def test_without_room_for_reference_data_the_whole_is_verified_at_once(
    heavy: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fxcompress.backends.reference._LIMIT", 16)
    engine = fxc.compile(heavy, example_inputs=(torch.randn(2, 32),), backend="onnxruntime", progress=False).engine
    assert isinstance(engine, OnnxRuntimeEngine) and engine._session is not None
    assert engine.manifest.measurements["verification"]["input_shapes"] == [[[2, 32]], [[1, 32]]]
    assert "left out" in engine.manifest.measurements["reference"]
