"""Backends by name, third-party backends, and loading bundles."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from fxcompress.backends.bundle import MANIFEST
from fxcompress.backends.onnxruntime import OnnxRuntime, OnnxRuntimeEngine
from fxcompress.backends.registry import backend_class, backend_names, load_engine, resolve_backend
from fxcompress.errors import BackendError, BundleError, OptionError

THIRD_PARTY = """
from dataclasses import dataclass
from typing import ClassVar
from fxcompress.backends.base import Backend, Engine

class EchoEngine(Engine):
    def _execute(self, inputs):
        return inputs * self.times

@dataclass(frozen=True)
class Echo(Backend):
    name: ClassVar[str] = "echo"
    times: int = 1
    def write(self, graph_module, directory, signature, context):
        raise NotImplementedError
    @classmethod
    def load(cls, path, manifest, **overrides):
        engine = EchoEngine(path, manifest)
        engine.times = cls.from_manifest(manifest, overrides).times
        return engine

not_a_backend = 3
"""


@pytest.fixture
def third_party(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An installed distribution with entry points, as pip would leave it."""
    info = tmp_path / "site" / "echo_backend-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: echo-backend\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[fxcompress.backends]\necho = echo_backend:Echo\nwrong = echo_backend:not_a_backend\n"
        "gone = no_such_module_here:Gone\n"
    )
    (tmp_path / "site" / "echo_backend.py").write_text(THIRD_PARTY)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.delitem(sys.modules, "echo_backend", raising=False)


def edit(bundle: Path, **changes: object) -> None:
    told = json.loads((bundle / MANIFEST).read_text())
    (bundle / MANIFEST).write_text(json.dumps(told | changes))


def test_names_and_instances() -> None:
    assert resolve_backend("onnxruntime") == resolve_backend("onnx") == OnnxRuntime()
    backend = OnnxRuntime(threads=2)
    assert resolve_backend(backend) is backend
    assert {"onnx", "onnxruntime"} <= set(backend_names())


def test_unknown_names() -> None:
    with pytest.raises(OptionError, match="unknown backend 'onnxruntme'") as caught:
        resolve_backend("onnxruntme")
    assert "did you mean 'onnxruntime'?" in str(caught.value)
    with pytest.raises(OptionError, match="not a int") as caught:
        resolve_backend(3)  # type: ignore[arg-type]
    assert "onnxruntime" in str(caught.value)


@pytest.mark.usefixtures("third_party")
def test_third_party_backends(relu_bundle: Path) -> None:
    assert {"echo", "gone", "wrong"} <= set(backend_names())
    assert resolve_backend("echo").name == "echo"
    edit(relu_bundle, backend="echo", options={"times": 1})
    x = torch.randn(2, 3)
    assert torch.equal(load_engine(relu_bundle)(x), x)
    with pytest.raises(OptionError, match="backend 'echo' has no option 'tims'"):
        load_engine(relu_bundle, tims=2)


@pytest.mark.usefixtures("third_party")
def test_third_party_backends_that_are_broken() -> None:
    with pytest.raises(BackendError, match="'gone' cannot be imported: No module named 'no_such_module_here'"):
        backend_class("gone")
    with pytest.raises(BackendError, match="not a subclass of"):
        backend_class("wrong")


def test_load_engine_checks_the_bundle(relu_bundle: Path) -> None:
    engine = load_engine(str(relu_bundle))
    assert isinstance(engine, OnnxRuntimeEngine) and engine.path == relu_bundle
    (relu_bundle / "model.onnx").write_bytes(b"")
    with pytest.raises(BundleError, match="0 bytes instead of"):
        load_engine(relu_bundle)


def test_load_engine_of_an_unknown_backend(relu_bundle: Path) -> None:
    edit(relu_bundle, backend="onnxrt")
    with pytest.raises(BackendError, match="needs backend 'onnxrt'") as caught:
        load_engine(relu_bundle)
    assert "did you mean 'onnx" in str(caught.value)


def test_load_engine_of_a_graph(relu_bundle: Path) -> None:
    edit(relu_bundle, kind="graph", backend=None)
    with pytest.raises(BundleError, match="does not hold an engine") as caught:
        load_engine(relu_bundle)
    assert "fxcompress.load" in str(caught.value)


def test_options_of_bundles_and_overrides(relu_bundle: Path) -> None:
    edit(relu_bundle, options={"threads": 1, "optimization_level": "basic", "providers": ["CPUExecutionProvider"]})
    engine = load_engine(relu_bundle, threads=2)
    assert isinstance(engine, OnnxRuntimeEngine)
    assert engine.backend == OnnxRuntime(threads=2, optimization_level="basic")
    with pytest.raises(OptionError, match="has no option 'thread'") as caught:
        load_engine(relu_bundle, thread=2)
    assert "did you mean 'threads'" in str(caught.value)
    with pytest.raises(OptionError, match="option threads is 0"):
        load_engine(relu_bundle, threads=0)
    edit(relu_bundle, options={"threads": -1})
    with pytest.raises(BundleError, match="the manifest's options are wrong: option threads is -1"):
        load_engine(relu_bundle)
    edit(relu_bundle, options={"weights": "/etc/passwd"})
    with pytest.raises(BundleError, match="has no option 'weights'"):
        load_engine(relu_bundle)
