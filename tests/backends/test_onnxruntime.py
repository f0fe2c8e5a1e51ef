"""The ONNX Runtime backend: options, sessions, refusals, and what the optimizer makes of a model."""

from __future__ import annotations

import dataclasses
import json
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import helper, numpy_helper
from torch import fx, nn

import fxcompress as fxc
from fxcompress.backends.base import BuildContext
from fxcompress.backends.bundle import MANIFEST, Manifest
from fxcompress.backends.bundle_writer import BundleWriter
from fxcompress.backends.onnxruntime import MODEL_FILE, OnnxRuntime, OnnxRuntimeEngine
from fxcompress.backends.registry import load_engine
from fxcompress.backends.signature import TensorSpec
from fxcompress.errors import BackendError, OptionError
from fxcompress.graph.structure import Structure

Open = Callable[..., OnnxRuntimeEngine]
X = TensorSpec("x", ("batch", 3), "float32")
Y = TensorSpec("y", ("batch", 3), "float32")


@pytest.mark.parametrize(
    ("options", "message", "remedy"),
    [
        ({"threads": 0}, "option threads is 0", "1 or more"),
        ({"threads": True}, "option threads is True", "1 or more"),
        ({"threads": "2"}, "option threads is '2'", "1 or more"),
        ({"providers": ()}, r"option providers is \(\)", "name one"),
        ({"providers": "CPUExecutionProvider"}, "option providers is 'CPU", "name one"),
        ({"providers": ("CPUExecutionProvder",)}, "is 'CPUExecutionProvder'", "did you mean 'CPUExecutionProvider'"),
        ({"optimization_level": "extend"}, "option optimization_level is 'extend'", "did you mean 'extended'"),
        ({"optimization_level": 99}, "option optimization_level is 99", "basic"),
        ({"opset": 5}, "option opset is 5", "give 18 to"),
        ({"opset": 999}, "option opset is 999", "give 18 to"),
        ({"simplify": 1}, "option simplify is 1", "True or False"),
    ],
)
def test_options_are_checked_when_given(options: dict[str, Any], message: str, remedy: str) -> None:
    with pytest.raises(OptionError, match=message) as caught:
        OnnxRuntime(**options)
    assert remedy in str(caught.value.remedy) and str(caught.value.where).startswith("OnnxRuntime.")


def test_options_round_trip_through_json() -> None:
    backend = OnnxRuntime(threads=2, providers=("CPUExecutionProvider",), optimization_level="basic", opset=20)
    assert OnnxRuntime(**json.loads(json.dumps(backend.options()))) == backend
    with pytest.raises(dataclasses.FrozenInstanceError):
        backend.threads = 3  # type: ignore[misc]


def test_session_options_reach_the_session(relu_bundle: Path) -> None:
    engine = load_engine(relu_bundle, threads=1, optimization_level="disabled")
    assert isinstance(engine, OnnxRuntimeEngine)
    options = engine.session.get_session_options()
    assert options.intra_op_num_threads == 1
    assert options.graph_optimization_level == onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    assert engine.session.get_providers() == ["CPUExecutionProvider"]


def test_a_provider_that_is_not_there(relu_bundle: Path) -> None:
    missing = sorted(set(onnxruntime.get_all_providers()) - set(onnxruntime.get_available_providers()))[0]
    with pytest.raises(BackendError, match=f"has no {missing}") as caught:
        load_engine(relu_bundle, providers=("CPUExecutionProvider", missing))
    assert "CPUExecutionProvider" in str(caught.value.remedy)


def bundle_of(tmp_path: Path, content: bytes, inputs: tuple[TensorSpec, ...] = (X,)) -> Path:
    leaves = Structure("tuple", (), tuple(Structure("leaf") for _ in inputs))
    manifest = Manifest(
        "engine", "onnxruntime", inputs, (Y,), Structure("tuple", (), (leaves, Structure("dict"))), Structure("leaf")
    )
    with BundleWriter(tmp_path / f"bundle{len(list(tmp_path.iterdir()))}") as writer:
        (writer.directory / MODEL_FILE).write_bytes(content)
        path, _ = writer.commit(manifest)
    return path


def model(
    x: list[int | str], y: list[int | str], op: str = "Relu", elem: int = 1, domain: str = "", result: str = "y"
) -> bytes:
    graph = helper.make_graph(
        [helper.make_node(op, ["x"], [result], domain=domain)],
        "g",
        [helper.make_tensor_value_info("x", elem, x)],
        [helper.make_tensor_value_info(result, elem, y)],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20), helper.make_opsetid("own", 1)])
    made.ir_version = 10
    return bytes(made.SerializeToString())


@pytest.mark.parametrize(
    "content",
    [b"", b"not onnx", model(["batch", 3], ["batch", 3], "NoSuchOp"), model(["b", 3], ["b", 3], "Op", 1, "own")],
)
def test_models_that_onnxruntime_refuses(tmp_path: Path, content: bytes) -> None:
    path = bundle_of(tmp_path, content)
    with pytest.raises(BackendError, match="ONNX Runtime cannot open the model") as caught:
        load_engine(path)
    assert caught.value.where == str(path / MODEL_FILE) and onnxruntime.__version__ in str(caught.value)
    assert caught.value.__cause__ is not None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (model([1, 3], [1, 3]), r"input 'x' is float\[1, 3\], the manifest's x: float32\[batch, 3\]"),
        (model(["batch", 4], ["batch", 4]), r"input 'x' is float\['batch', 4\]"),
        (model(["batch", 3, 1], ["batch", 3, 1]), r"input 'x' is float\['batch', 3, 1\]"),
        (model(["batch", 3], ["batch", 3], elem=10), r"input 'x' is float16\['batch', 3\]"),
        (model(["batch", 3], [2, 3], op="Abs"), r"output 'y' is float\[2, 3\]"),
    ],
)
def test_models_that_are_not_what_the_manifest_says(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(BackendError, match=message):
        load_engine(bundle_of(tmp_path, content))


def test_names_that_are_not_what_the_manifest_says(tmp_path: Path) -> None:
    content = model(["batch", 3], ["batch", 3])
    with pytest.raises(BackendError, match=r"the model's inputs are \['x'\], the manifest's \['z'\]"):
        load_engine(bundle_of(tmp_path, content, (dataclasses.replace(X, name="z"),)))


def test_failures_at_run_time(open_engine: Open) -> None:
    x, y = TensorSpec("x", ("n",), "int64"), TensorSpec("y", ("n", 2), "float32")
    table = numpy_helper.from_array(np.ones((3, 2), np.float32), "table")
    constant = helper.make_node("Constant", [], ["table"], value=table)
    engine = open_engine([constant, helper.make_node("Gather", ["table", "x"], ["y"])], [x], [y])
    assert engine(np.array([0, 2])).shape == (2, 2)
    with pytest.raises(BackendError, match=r"ONNX Runtime failed: .*indices element out of data bounds") as caught:
        engine(np.array([7]))
    assert caught.value.where == str(engine.path)


def test_weights_in_a_file_of_their_own(tmp_path: Path) -> None:
    weight = numpy_helper.from_array(np.random.randn(3, 3).astype(np.float32), "w")
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", 1, ["batch", 3])],
        [helper.make_tensor_value_info("y", 1, ["batch", 3])],
        [weight],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    source = bundle_of(tmp_path, model(["batch", 3], ["batch", 3]))
    with BundleWriter(tmp_path / "external") as writer:
        target = writer.directory / MODEL_FILE
        onnx.save(made, target, save_as_external_data=True, location=f"{MODEL_FILE}.data", size_threshold=0)
        path, manifest = writer.commit(load_engine(source).manifest)
    assert set(manifest.files) == {MODEL_FILE, f"{MODEL_FILE}.data"}
    x = torch.randn(2, 3)
    expected = x @ torch.from_numpy(numpy_helper.to_array(weight).copy())
    torch.testing.assert_close(load_engine(path)(x), expected)
    assert json.loads((path / MANIFEST).read_text())["files"][f"{MODEL_FILE}.data"]["bytes"] == 36


def test_build_hands_names_and_options_to_the_exporter(
    captured: Callable[..., fx.GraphModule], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}

    def write_onnx(graph_module: fx.GraphModule, path: Path, **options: Any) -> types.SimpleNamespace:
        seen.update(options)
        path.write_bytes(model(["batch", 3], ["batch", 3], result="o"))
        return types.SimpleNamespace(sources={}, notes=())

    exporter = types.ModuleType("fxcompress.backends.onnx_export")
    exporter.write_onnx = write_onnx  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, exporter.__name__, exporter)

    class Activation(nn.Module):
        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"o": x.relu()}

    x = torch.randn(2, 3)
    steps: list[str] = []
    context = BuildContext(example_inputs=[x], progress=steps.append)
    engine = OnnxRuntime(opset=20, simplify=False, threads=1).build(
        captured(Activation(), (x,)), tmp_path / "e", context
    )
    assert seen.pop("progress") is context.progress
    assert not seen.pop("onnxruntime_only")
    assert seen == {"input_names": ["x"], "output_names": ["o"], "opset": 20, "simplify": False}
    assert torch.equal(engine(x)["o"], x.relu())
    assert {"onnx", "onnxruntime", "onnxsim", "onnxscript", "torch"} <= engine.manifest.versions.keys()
    again = load_engine(tmp_path / "e")
    assert isinstance(again, OnnxRuntimeEngine) and again.backend == OnnxRuntime(opset=20, simplify=False, threads=1)
    assert torch.equal(again(x)["o"], x.relu())


def test_optimized_op_counts(open_engine: Open) -> None:
    weight = numpy_helper.from_array(np.ones((4, 3, 1, 1), np.float32))
    x, y = TensorSpec("x", ("batch", 3, 8, 8), "float32"), TensorSpec("y", ("batch", 4, 8, 8), "float32")
    nodes = [
        helper.make_node("Constant", [], ["w"], value=weight),
        helper.make_node("Identity", ["x"], ["same"]),
        helper.make_node("Conv", ["same", "w"], ["c"]),
        helper.make_node("Relu", ["c"], ["y"]),
    ]
    engine = open_engine(nodes, [x], [y])
    counts = engine.optimized_op_counts()
    assert counts.get("Conv", 0) + counts.get("FusedConv", 0) == 1, "whichever the CPU's layout makes of it"
    assert "Relu" not in counts and "Identity" not in counts
    plain = load_engine(engine.path, optimization_level="disabled")
    assert isinstance(plain, OnnxRuntimeEngine)
    assert {"Identity": 1, "Conv": 1, "Relu": 1}.items() <= plain.optimized_op_counts().items()
    plain.close()
    with pytest.raises(BackendError, match="closed"):
        plain.optimized_op_counts()


def test_op_counts_look_into_branches(open_engine: Open) -> None:
    def branch(op: str, name: str) -> onnx.GraphProto:
        return helper.make_graph(
            [helper.make_node(op, ["x"], [name])], name, [], [helper.make_tensor_value_info(name, 1, ["batch", 3])]
        )

    flag = TensorSpec("flag", (), "bool")
    node = helper.make_node("If", ["flag"], ["y"], then_branch=branch("Relu", "p"), else_branch=branch("Neg", "q"))
    engine = open_engine([node], [X, flag], [Y])
    assert engine.optimized_op_counts() == {"If": 1, "Relu": 1, "Neg": 1}
    x = torch.tensor([[1.0, -1.0, 0.0]])
    assert torch.equal(engine(x, torch.tensor(False)), -x)


def test_a_type_without_kernels_is_told_as_such() -> None:
    compiled = fxc.compile(nn.Linear(4, 2).bfloat16().eval(), [], (torch.randn(2, 4).bfloat16(),), progress=False)
    with pytest.raises(BackendError, match="NOT_IMPLEMENTED") as caught:
        compiled.export("onnxruntime")
    assert "bfloat16" in str(caught.value.remedy) and "openvino" in str(caught.value.remedy)


def test_what_is_in_the_file_is_no_option_of_loading(tmp_path: Path) -> None:
    compiled = fxc.compile(nn.ReLU().eval(), example_inputs=(torch.randn(2, 3),), progress=False)
    compiled.export(OnnxRuntime(opset=20), output=tmp_path / "engine")
    with pytest.raises(OptionError, match="the option opset is built into the engine"):
        fxc.load_engine(tmp_path / "engine", opset=18)
    with fxc.load_engine(tmp_path / "engine", opset=20, threads=1) as engine:
        assert engine.backend.threads == 1  # type: ignore[attr-defined]
