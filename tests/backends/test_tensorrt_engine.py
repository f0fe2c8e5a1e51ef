"""Running an engine: addresses, profiles and devices, on a stand-in for the runtime; and on a GPU if there is one."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import fxcompress as fxc
from fxcompress.backends import tensorrt_library
from fxcompress.backends.tensorrt import TensorRT
from fxcompress.backends.tensorrt_engine import PLAN_FILE, TensorRTEngine
from fxcompress.errors import BackendError, PreconditionError, VerificationError
from tests.backends import fake_tensorrt
from tests.support import randomize

PROFILES: Any = ({"batch": (1, 1, 4)}, {"batch": (4, 16, 32)})


class Two(nn.Module):
    """Two inputs, one of them integers; two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 4)
        self.linear = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mixed = x + self.table(index)
        return self.linear(mixed), mixed.sum(1)


def inputs(batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(batch, 4), torch.arange(batch) % 10


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[tuple[TensorRTEngine, nn.Module]]:
    """An engine of the stand-in, whose "GPU" is the CPU."""
    monkeypatch.setitem(sys.modules, "tensorrt", fake_tensorrt.module())
    tensorrt_library._load.cache_clear()
    model = randomize(Two())
    fxc.compile(
        model, example_inputs=inputs(2), backend=TensorRT(library="tensorrt", profiles=PROFILES), output=tmp_path / "b"
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 7))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(TensorRTEngine, "_stream", lambda self: 7)
    loaded = fxc.load_engine(tmp_path / "b")
    assert isinstance(loaded, TensorRTEngine) and loaded.unavailable is None
    loaded._device = torch.device("cpu")
    yield loaded, model
    loaded.close()
    tensorrt_library._load.cache_clear()


@pytest.mark.parametrize("batch", [1, 3, 4, 20])
def test_results_are_those_of_the_model(engine: tuple[TensorRTEngine, nn.Module], batch: int) -> None:
    loaded, model = engine
    x, index = inputs(batch)
    for given in ((x, index), (x.t().contiguous().t(), index), (x.clone().requires_grad_(), index)):
        for wanted, got in zip(model(*given), loaded(*given), strict=True):
            torch.testing.assert_close(got, wanted.detach())
    arrays = loaded(x.numpy(), index.numpy())
    assert all(isinstance(array, np.ndarray) for array in arrays)


def test_nothing_is_copied(engine: tuple[TensorRTEngine, nn.Module]) -> None:
    loaded, _ = engine
    x, index = inputs(2)
    loaded(x, index)
    context = loaded._contexts[0]
    assert context.addresses["x"] == x.data_ptr() and context.addresses["index"] == index.data_ptr()  # type: ignore[attr-defined]


def test_the_profile_that_is_tuned_closest(engine: tuple[TensorRTEngine, nn.Module]) -> None:
    loaded, _ = engine
    for batch, profile in ((1, 0), (4, 0), (5, 1), (32, 1)):
        loaded._contexts.clear()
        loaded(*inputs(batch))
        assert list(loaded._contexts) == [profile]
    assert loaded._contexts[1].profile == 1  # type: ignore[attr-defined]


def test_sizes_outside_of_every_profile(engine: tuple[TensorRTEngine, nn.Module]) -> None:
    loaded, _ = engine
    with pytest.raises(PreconditionError, match="not built for these sizes") as caught:
        loaded(*inputs(33))
    assert "batch 1 to 4" in str(caught.value.where) and "profiles" in str(caught.value.remedy)


def test_what_the_runtime_cannot_do(engine: tuple[TensorRTEngine, nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    loaded, _ = engine
    loaded(*inputs(2))
    context = type(loaded._contexts[0])
    for call, message in (("execute_async_v3", "could not run"), ("set_input_shape", "refuses the shape")):
        with monkeypatch.context() as patch:
            patch.setattr(context, call, lambda *_: False)
            with pytest.raises(BackendError, match=message):
                loaded(*inputs(2))
    with monkeypatch.context() as patch:
        patch.setattr(context, "get_tensor_shape", lambda *_: (-1, 3))
        with pytest.raises(BackendError, match="depends on the data"):
            loaded(*inputs(2))
    with monkeypatch.context() as patch:
        patch.setattr(fake_tensorrt.Engine, "create_execution_context", lambda _: None)
        with pytest.raises(BackendError, match="execution context"):
            loaded(*inputs(20))


def test_engines_that_do_not_fit_this_gpu(
    engine: tuple[TensorRTEngine, nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, _ = engine
    with monkeypatch.context() as patch:
        patch.setattr(fake_tensorrt.Runtime, "deserialize_cuda_engine", lambda *_: None)
        refused = TensorRTEngine(loaded.path, loaded.manifest)
        assert "refuses the engine" in str(refused.unavailable)
    facts = loaded.path / "tensorrt.json"
    facts.write_text(facts.read_text().replace('"compute_capabilities": []', '"compute_capabilities": ["sm86"]', 1))
    assert TensorRTEngine(loaded.path, loaded.manifest).unavailable == "the engine is for sm86, and this GPU is sm87"
    monkeypatch.setitem(sys.modules, "tensorrt", ModuleType("tensorrt"))
    tensorrt_library._load.cache_clear()
    facts.write_text(facts.read_text().replace('"sm86"', ""))
    assert TensorRTEngine(loaded.path, loaded.manifest).unavailable == "tensorrt is not installed"
    assert (loaded.path / PLAN_FILE).exists()


def test_profiles_without_the_examples_sizes_are_verified_at_their_own(
    engine: tuple[TensorRTEngine, nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, model = engine
    monkeypatch.setattr("fxcompress.backends.tensorrt_engine._current_device", lambda: torch.device("cpu"))
    backend = TensorRT(library="tensorrt", profiles=({"batch": (4, 8, 16)}, {"batch": (20, 20, 20)}))
    compiled = fxc.compile(model, example_inputs=inputs(2), backend=backend)
    assert compiled.report.engine is not None and not compiled.report.engine.unverified
    assert compiled.report.engine.verified == ["x[8, 4], index[8]", "x[20, 4], index[20]"]
    monkeypatch.setattr(fake_tensorrt.Engine, "wrong_by", 1.0)
    with pytest.raises(VerificationError, match="differs from PyTorch"):
        fxc.compile(model, example_inputs=inputs(2), backend=backend)


# --- on a GPU ---------------------------------------------------------------------------------------------------------

on_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        importlib.util.find_spec("tensorrt_rtx") is None and importlib.util.find_spec("tensorrt") is None,
        reason="needs TensorRT",
    ),
]


@pytest.fixture
def real() -> Iterator[tuple[Any, nn.Module]]:
    major, minor = torch.cuda.get_device_capability()
    capability = f"sm{major}{minor}"
    rtx = capability in tensorrt_library.RTX_CAPABILITIES and importlib.util.find_spec("tensorrt_rtx") is not None
    if not rtx and importlib.util.find_spec("tensorrt") is None:
        pytest.skip(f"TensorRT for RTX has no {capability}")
    options: Any = {"compute_capabilities": (capability,)} if rtx else {"library": "tensorrt"}
    model = randomize(Two())
    compiled = fxc.compile(model, example_inputs=inputs(2), backend=TensorRT(profiles=PROFILES, **options))
    assert compiled.engine is not None and compiled.report.engine is not None and not compiled.report.engine.unverified
    yield compiled.engine, model
    compiled.engine.close()


class TestOnAGpu:
    pytestmark = on_gpu

    @pytest.mark.parametrize("batch", [1, 4, 20])
    def test_results_stay_on_the_gpu(self, real: tuple[Any, nn.Module], batch: int) -> None:
        engine, model = real
        given = inputs(batch)
        for wanted, got in zip(model(*given), engine(*[value.cuda() for value in given]), strict=True):
            assert got.is_cuda
            torch.testing.assert_close(got.cpu(), wanted.detach(), rtol=1e-4, atol=1e-4)

    def test_on_the_current_stream(self, real: tuple[Any, nn.Module]) -> None:
        engine, model = real
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            x, index = (value.cuda(non_blocking=True) for value in inputs(3))
            x = x * 2  # what the stream was given before the engine is done before it
            got = engine(x, index)[0] + 1
        stream.synchronize()
        torch.testing.assert_close(got.cpu(), model(x.cpu(), index.cpu())[0].detach() + 1, rtol=1e-4, atol=1e-4)

    def test_inputs_on_the_cpu_come_back_to_the_cpu(self, real: tuple[Any, nn.Module]) -> None:
        engine, _ = real
        given = inputs(2)
        assert all(not output.is_cuda for output in engine(*given))
        assert engine.benchmark(given, repetitions=3).median_ms > 0
