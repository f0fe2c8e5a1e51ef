"""The OpenVINO backend: options, refusals, threads, and the precision in which layers run."""

from __future__ import annotations

import dataclasses
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import fxcompress as fxc
from fxcompress.backends import OpenVINO
from fxcompress.backends import openvino as openvino_backend
from fxcompress.errors import BackendError, OptionError

pytest.importorskip("openvino", reason="OpenVINO is not installed")


def built(model: nn.Module, inputs: Any, backend: OpenVINO, output: Path | None = None) -> Any:
    return fxc.compile(model.eval(), example_inputs=inputs, progress=False).export(backend, output)


@pytest.mark.parametrize(
    ("options", "message", "remedy"),
    [
        ({"threads": 0}, "option threads is 0", "1 or more"),
        ({"threads": True}, "option threads is True", "1 or more"),
        ({"mode": "fast"}, "option mode is 'fast'", "latency, throughput"),
        ({"precision": "fp16"}, "option precision is 'fp16'", "did you mean 'f16'"),
        ({"device": ""}, "option device is ''", "name one"),
        ({"opset": "x"}, "option opset is 'x'", "give 18 to"),
        ({"simplify": 1}, "option simplify is 1", "True or False"),
    ],
)
def test_options_are_checked_when_given(options: dict[str, Any], message: str, remedy: str) -> None:
    with pytest.raises(OptionError, match=message) as caught:
        OpenVINO(**options)
    assert remedy in str(caught.value.remedy) and str(caught.value.where).startswith("OpenVINO.")


def test_options_round_trip_through_json() -> None:
    backend = OpenVINO(threads=2, mode="throughput", precision="bf16")
    assert OpenVINO(**json.loads(json.dumps(backend.options()))) == backend
    with pytest.raises(dataclasses.FrozenInstanceError):
        backend.threads = 3  # type: ignore[misc]


def test_options_reach_the_compiled_model(tmp_path: Path) -> None:
    built(nn.Linear(3, 2), (torch.randn(2, 3),), OpenVINO(threads=1), tmp_path / "b").close()
    engine: Any = fxc.load_engine(tmp_path / "b", mode="throughput")
    assert engine.compiled.get_property("INFERENCE_NUM_THREADS") == 1
    assert str(engine.compiled.get_property("PERFORMANCE_HINT")).endswith("THROUGHPUT")
    assert engine.compiled.get_property("INFERENCE_PRECISION_HINT").to_string() == "f32"
    assert engine.backend == OpenVINO(threads=1, mode="throughput")


def test_a_device_that_is_not_there(tmp_path: Path) -> None:
    built(nn.Linear(3, 2), (torch.randn(2, 3),), OpenVINO(), tmp_path / "b").close()
    with pytest.raises(BackendError, match="no device 'FPGA'") as caught:
        fxc.load_engine(tmp_path / "b", device="FPGA")
    assert "CPU" in str(caught.value.remedy)


def has(precision: str) -> bool:
    import openvino

    return precision.upper() in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


@torch.no_grad()
def test_f32_is_f32(tmp_path: Path) -> None:
    model, x = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)).eval(), torch.randn(4, 64)
    engine = built(model, (x,), OpenVINO(), tmp_path / "b")
    assert engine.manifest.measurements["verification"]["tolerance"] == 1e-4
    assert engine.executed_precisions()["FullyConnected"] == {"f32": 2}
    engine.close()
    with pytest.raises(BackendError, match="closed"):
        engine.executed_precisions()


@torch.no_grad()
@pytest.mark.parametrize(("precision", "tolerance"), [("bf16", 1e-1), ("f16", 2e-2)])
def test_a_precision_that_rounds_is_verified_to_that(precision: Any, tolerance: float) -> None:
    if not has({"f16": "FP16"}.get(precision, precision)):
        pytest.skip(f"this processor has no {precision}")
    model, x = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)).eval(), torch.randn(4, 64)
    engine = built(model, (x,), OpenVINO(precision=precision))
    assert engine.manifest.options["precision"] == precision
    assert engine.manifest.measurements["verification"]["tolerance"] == tolerance
    assert precision in engine.executed_precisions()["FullyConnected"]
    torch.testing.assert_close(engine(x), model(x), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("precision", ["bf16", "f16"])
def test_a_precision_that_the_processor_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: Any) -> None:
    """OpenVINO takes f32 without a word, and f32 is not to be verified as if it rounded."""
    monkeypatch.setattr(openvino_backend, "_precision_of", lambda compiled: "f32")
    built(nn.Linear(3, 2), (torch.randn(2, 3),), OpenVINO(), tmp_path / "b").close()
    for use in (
        lambda: fxc.load_engine(tmp_path / "b", precision=precision),
        lambda: built(nn.Linear(3, 2), (torch.randn(2, 3),), OpenVINO(precision=precision), tmp_path / "none"),
    ):
        with pytest.raises(BackendError, match=f"this CPU has no {precision}: OpenVINO would compute in f32") as caught:
            use()
        assert caught.value.where == "precision" and "precision='f32'" in str(caught.value.remedy)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("precision", ["bf16", "f16"])
def test_openvino_itself_says_what_it_computes_in(tmp_path: Path, precision: Any) -> None:
    if has({"f16": "FP16"}.get(precision, precision)):
        pytest.skip(f"this processor has {precision}")
    built(nn.Linear(3, 2), (torch.randn(2, 3),), OpenVINO(), tmp_path / "b").close()
    with pytest.raises(BackendError, match=f"this CPU has no {precision}"):
        fxc.load_engine(tmp_path / "b", precision=precision)


def test_calls_from_several_threads() -> None:
    model = nn.Linear(16, 16).eval()
    engine = built(model, (torch.randn(2, 16),), OpenVINO(mode="throughput"))
    inputs = [torch.randn(1 + index % 5, 16) for index in range(64)]
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(engine, inputs))
    for x, result in zip(inputs, results, strict=True):
        torch.testing.assert_close(result, model(x).detach())


def test_without_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built(nn.Linear(3, 2), (torch.randn(2, 3),), OpenVINO(), tmp_path / "b").close()
    monkeypatch.setitem(sys.modules, "openvino", None)
    for use in (
        lambda: fxc.load_engine(tmp_path / "b"),
        lambda: built(nn.Linear(3, 2), (torch.randn(2, 3),), OpenVINO()),
    ):
        with pytest.raises(BackendError, match="needs its library") as caught:
            use()
        assert caught.value.remedy == "pip install 'fxcompress[openvino]'"


@pytest.mark.parametrize("content", [b"", b"not onnx"])
def test_a_file_that_openvino_refuses(tmp_path: Path, content: bytes) -> None:
    path = built(nn.Linear(3, 2), (torch.randn(2, 3),), OpenVINO(), tmp_path / "b").path
    manifest = fxc.load_engine(path).manifest
    (path / "model.onnx").write_bytes(content)
    with pytest.raises(BackendError, match="OpenVINO cannot open the model") as caught:
        OpenVINO.load(path, manifest)
    assert caught.value.where == str(path / "model.onnx")


def test_a_model_that_is_not_what_the_manifest_says(tmp_path: Path) -> None:
    path = built(nn.Linear(3, 2), (torch.randn(2, 3),), OpenVINO(), tmp_path / "b").path
    manifest = fxc.load_engine(path).manifest
    spec = manifest.inputs[0]
    for changed, message in (
        (
            dataclasses.replace(spec, shape=("batch", 4)),
            r"is f32\[None, 3\], the manifest's input: float32\[batch, 4\]",
        ),
        (dataclasses.replace(spec, dtype="int64"), "int64"),
        (dataclasses.replace(spec, name="other"), "inputs are not"),
    ):
        with pytest.raises(BackendError, match=message):
            OpenVINO.load(path, dataclasses.replace(manifest, inputs=(changed,)))


def test_scalars_and_read_only_arrays() -> None:
    class Scaled(nn.Module):
        def forward(self, x: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
            return x * by

    engine = built(Scaled(), (torch.randn(2, 3), torch.tensor(2.0)), OpenVINO())
    x = np.ones((4, 3), np.float32)
    x.setflags(write=False)
    by = np.array(3.0, np.float32)
    by.setflags(write=False)
    assert np.array_equal(engine(x, by), np.full((4, 3), 3.0, np.float32))


@torch.no_grad()
def test_8_bit_products_that_overflow_are_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without VNNI sums of 8-bit products saturate; 7-bit weights are right on every processor."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 32, 3, stride=2, padding=1), nn.ConvTranspose2d(32, 16, 2, stride=2)).eval()
    x = torch.randn(4, 3, 32, 32)
    passes = [fxc.passes.Quantize([(x,)], scheme="openvino", weight_bits=7)]
    compiled = fxc.compile(model, passes, (x,), progress=False)
    engine = compiled.export(OpenVINO(threads=1))
    torch.testing.assert_close(
        engine(x), compiled(x), rtol=0, atol=1e-2
    )  # one step of a grid; overflow is ten times that
    right = type(engine)._execute
    monkeypatch.setattr(type(engine), "_execute", lambda self, inputs: [y + 1 for y in right(self, inputs)])
    with pytest.raises(fxc.errors.VerificationError) as caught:
        compiled.export(OpenVINO(threads=1))
    assert "weight_bits=7" in str(caught.value.remedy)
