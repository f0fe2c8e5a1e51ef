"""Reference data in bundles, and what ``fxcompress verify`` makes of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxcompress as fxc
from fxcompress.backends.bundle import read_manifest
from fxcompress.backends.bundle_writer import BundleWriter
from fxcompress.backends.reference import REFERENCE_FILE, Reference, read_reference, replay, write_reference
from fxcompress.cli import main
from fxcompress.deployment import verify_bundle
from fxcompress.errors import BundleError, PreconditionError, VerificationError


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor, *, keep: torch.Tensor) -> dict[str, Any]:
        return {"y": self.linear(x) * keep, "size": x.shape[0]}


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    inputs = {"x": torch.randn(5, 4), "keep": torch.rand(5, 3) > 0.5}
    fxc.compile(Model().eval(), example_inputs=inputs, backend="torchscript", output=tmp_path / "b", progress=False)
    return tmp_path / "b"


def again(bundle: Path, target: Path, change: Callable[[Path], None]) -> Path:
    """The bundle with other files and a manifest that fits them."""
    manifest = read_manifest(bundle)
    with BundleWriter(target) as writer:
        for name in manifest.files:
            (writer.directory / name).write_bytes((bundle / name).read_bytes())
        change(writer.directory)
        path, _ = writer.commit(replace(manifest, files={}))
    return path


def test_the_smaller_run_is_kept(bundle: Path) -> None:
    reference = read_reference(bundle)
    assert reference is not None
    assert [tuple(tensor.shape) for tensor in reference.inputs] == [(1, 4), (1, 3)]
    assert [tuple(tensor.shape) for tensor in reference.outputs] == [(1, 3), ()]
    assert reference.tolerance == read_manifest(bundle).measurements["verification"]["tolerance"]
    assert REFERENCE_FILE in read_manifest(bundle).files


def test_it_does_not_count_as_the_engines_size(tmp_path: Path) -> None:
    compiled = fxc.compile(Model().eval(), example_inputs={"x": torch.randn(2, 4), "keep": torch.ones(2, 3)})
    engine = compiled.export("torchscript", tmp_path / "b")
    assert compiled.report.engine is not None
    assert compiled.report.engine.size_bytes == engine.manifest.files["model.ts"].bytes


def test_verify(bundle: Path) -> None:
    found = verify_bundle(bundle, repetitions=3)
    assert found.errors.keys() == {"y", "size"} and max(found.errors.values()) <= found.tolerance
    assert found.input_shapes == [[1, 4], [1, 3]] and found.latency.median_ms > 0
    assert json.loads(json.dumps(found.to_dict()))["verified"] is True


def test_an_engine_that_computes_something_else(bundle: Path, tmp_path: Path) -> None:
    def change(directory: Path) -> None:
        reference = read_reference(directory)
        assert reference is not None
        outputs = (reference.outputs[0] + 1, *reference.outputs[1:])
        assert write_reference(directory, replace(reference, outputs=outputs)) == ""

    with pytest.raises(VerificationError, match="differs from PyTorch") as caught:
        verify_bundle(again(bundle, tmp_path / "other", change))
    assert "build it anew" in str(caught.value.remedy) and "verify=False" not in str(caught.value.remedy)


def test_without_a_reference(tmp_path: Path, bundle: Path) -> None:
    path = again(bundle, tmp_path / "other", lambda directory: (directory / REFERENCE_FILE).unlink())
    with fxc.load_engine(path) as engine, pytest.raises(PreconditionError, match="holds no reference") as caught:
        replay(engine)
    assert "verify=True" in str(caught.value.remedy)
    compiled = fxc.compile(nn.ReLU().eval(), example_inputs=(torch.randn(2, 3),), verify=False, progress=False)
    assert read_reference(compiled.export("torchscript", tmp_path / "c", verify=False).path) is None


def test_a_damaged_reference(bundle: Path, tmp_path: Path) -> None:
    path = again(
        bundle, tmp_path / "other", lambda directory: (directory / REFERENCE_FILE).write_bytes(b"x" * 20) and None
    )
    with pytest.raises(BundleError, match="reference data cannot be read"):
        verify_bundle(path)


def test_what_is_left_out(tmp_path: Path) -> None:
    large = Reference((torch.zeros(3 << 20),), (torch.zeros(1),), 1e-4)
    assert "left out" in write_reference(tmp_path, large)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.bool, torch.uint8])
def test_dtypes_and_layouts(tmp_path: Path, dtype: torch.dtype) -> None:
    tensor = (torch.rand(4, 3) * 3).to(dtype).T
    assert write_reference(tmp_path, Reference((tensor, tensor), (tensor[:1], torch.tensor(3)), 0.25)) == ""
    found = read_reference(tmp_path)
    assert found is not None and found.tolerance == 0.25
    for got, want in zip((*found.inputs, *found.outputs), (tensor, tensor, tensor[:1], torch.tensor(3)), strict=True):
        assert got.dtype == want.dtype and torch.equal(got, want)


def test_the_command(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(bundle), "-n", "2", "-B", "optimize=true"]) == 0
    told = " ".join(capsys.readouterr().out.split())  # a long path breaks lines
    for part in ("torchscript engine, verified", "every hash", "relative error", "is allowed", "latency"):
        assert part in told
    assert main(["verify", str(bundle), "-n", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["relative_error"].keys() == {"y", "size"}
    (bundle / "model.ts").write_bytes((bundle / "model.ts").read_bytes()[:-1] + b"?")
    assert main(["verify", str(bundle), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["error"]["type"] == "BundleError"
