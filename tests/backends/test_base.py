"""Building: the manifest, verification before the bundle appears, clean-up, temporary bundles."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import onnx
import pytest
import torch
from onnx import helper
from torch import fx, nn

from fxcompress.backends.base import Backend, BuildContext, Engine, PassRecord, Signature, verify_engine
from fxcompress.backends.bundle import Manifest, read_manifest
from fxcompress.backends.onnxruntime import MODEL_FILE, OnnxRuntime, OnnxRuntimeEngine
from fxcompress.errors import BackendError, BundleError, VerificationError

Capture = Callable[..., fx.GraphModule]


class Add(nn.Module):
    def forward(self, left: torch.Tensor, right: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"total": left + right}


@dataclass(frozen=True)
class ByHand(Backend):
    """Writes ``operator`` of the inputs, whatever the graph says; everything else is as for ONNX Runtime."""

    name: ClassVar[str] = "by_hand"
    packages: ClassVar[tuple[str, ...]] = ("onnx", "no-such-package")
    operator: str = "Add"
    unavailable: str | None = None

    def write(self, graph_module: fx.GraphModule, directory: Path, signature: Signature, context: BuildContext) -> None:
        if self.operator == "disk full":
            (directory / "half").write_bytes(b"written")
            raise OSError(28, "No space left on device")
        values = [
            helper.make_tensor_value_info(spec.name, 1, list(spec.shape))
            for spec in (*signature.inputs, *signature.outputs)
        ]
        node = helper.make_node(self.operator, [spec.name for spec in signature.inputs], ["total"])
        graph = helper.make_graph([node], "g", values[:-1], values[-1:])
        onnx.save(
            helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), directory / MODEL_FILE
        )
        context.measurements["written"] = True

    @classmethod
    def load(cls, path: Path, manifest: Manifest, **overrides: Any) -> Engine:
        engine = OnnxRuntimeEngine(path, manifest, OnnxRuntime())
        engine.unavailable = cls.from_manifest(manifest, overrides).unavailable
        return engine


@pytest.fixture
def graph(captured: Capture) -> fx.GraphModule:
    return captured(Add(), (torch.ones(2, 3), torch.ones(2, 3)))


def checked(engine: Engine) -> dict[str, Any]:
    sets = [[torch.randn(batch, 3), torch.randn(batch, 3)] for batch in (1, 4)]
    return {"relative_error": verify_engine(engine, Add(), sets, 1e-6)}


def test_build(graph: fx.GraphModule, tmp_path: Path) -> None:
    steps: list[str] = []
    context = BuildContext(
        passes=[PassRecord("fuse_modules", {"rounds": 1})],
        example_inputs=[torch.ones(2, 3), torch.ones(2, 3)],
        progress=steps.append,
        measurements={"milliseconds": 1.5},
        verify=checked,
    )
    engine = ByHand().build(graph, tmp_path / "out" / "engine", context)
    assert engine.path == tmp_path / "out" / "engine" and os.listdir(tmp_path / "out") == ["engine"]
    manifest = read_manifest(engine.path)
    assert manifest == engine.manifest
    assert (manifest.kind, manifest.backend) == ("engine", "by_hand")
    assert manifest.options == {"operator": "Add", "unavailable": None}
    assert manifest.passes == (PassRecord("fuse_modules", {"rounds": 1}),)
    assert manifest.measurements == {
        "milliseconds": 1.5,
        "written": True,
        "verification": {"relative_error": {"total": 0.0}},
    }
    assert manifest.inputs[0].example == (2, 3) and manifest.inputs[0].shape == ("batch", 3)
    assert {"onnx", "torch", "python"} <= manifest.versions.keys() and "no-such-package" not in manifest.versions
    assert steps == ["load by_hand engine", "verify by_hand engine"]
    x = torch.ones(5, 3)
    assert torch.equal(engine(left=x, right=x)["total"], x + x)
    assert isinstance(engine, OnnxRuntimeEngine) and engine.optimized_op_counts() == {"Add": 1}, "reads the final place"


def test_a_wrong_engine_leaves_nothing(graph: fx.GraphModule, tmp_path: Path) -> None:
    with pytest.raises(VerificationError, match="differs from PyTorch"):
        ByHand("Sub").build(graph, tmp_path / "out" / "engine", BuildContext(verify=checked))
    assert os.listdir(tmp_path) == []


def test_an_engine_that_does_not_load_leaves_nothing(graph: fx.GraphModule, tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="cannot open the model"):
        ByHand("NoSuchOperator").build(graph, tmp_path / "engine", BuildContext())
    assert os.listdir(tmp_path) == []


def test_a_full_disk_leaves_nothing(graph: fx.GraphModule, tmp_path: Path) -> None:
    with pytest.raises(BackendError, match=r"writing the by_hand engine failed: .*No space left"):
        ByHand("disk full").build(graph, tmp_path / "engine", BuildContext())
    assert os.listdir(tmp_path) == []


def test_an_occupied_output_is_told_before_any_work(graph: fx.GraphModule, tmp_path: Path) -> None:
    (tmp_path / "mine").touch()
    with pytest.raises(BundleError, match="not empty"):
        ByHand("disk full").build(graph, tmp_path, BuildContext())


def test_engines_for_other_machines_are_built_unverified(graph: fx.GraphModule, tmp_path: Path) -> None:
    engine = ByHand(unavailable="it needs a GPU").build(graph, tmp_path / "engine", BuildContext(verify=checked))
    assert engine.manifest.measurements["verification"] == {"skipped": "it needs a GPU"}


def test_temporary_bundle(graph: fx.GraphModule) -> None:
    engine = ByHand().build(graph, None, BuildContext(verify=checked))
    directory = engine.path
    assert read_manifest(directory) == engine.manifest
    x = torch.ones(1, 3)
    assert torch.equal(engine(x, x)["total"], x + x)
    del engine
    gc.collect()
    assert not directory.exists() and not directory.parent.exists()
