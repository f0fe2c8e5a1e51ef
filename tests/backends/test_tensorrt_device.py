"""The device bundle: what lies in it, and its two programs, as far as a machine without a GPU can run them."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import importlib.util
import json
import shutil
import subprocess
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
from fxcompress.backends.bundle import read_manifest
from fxcompress.backends.bundle_writer import BundleWriter
from fxcompress.backends.reference import Reference, read_reference, write_reference
from fxcompress.backends.tensorrt import TensorRT
from fxcompress.backends.tensorrt_device import SCRIPTS
from fxcompress.errors import BackendError
from tests.backends import fake_tensorrt
from tests.support import randomize

needs_rtx = pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="needs tensorrt-rtx")


def net() -> nn.Module:
    return randomize(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(2), nn.Linear(36, 5)))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("device") / "net"
    backend = TensorRT(build_on="device", profiles=({"batch": (1, 4, 8)},), sparse_weights=True)
    fxc.compile(net(), example_inputs=(torch.randn(2, 3, 8, 8),), backend=backend, output=path)
    return path


@pytest.fixture
def bundle(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "net"))


@pytest.fixture
def programs(monkeypatch: pytest.MonkeyPatch, bundle: Path) -> Iterator[tuple[Any, Any]]:
    """The bundle's own build_engine and run_engine, with a stand-in for TensorRT."""
    monkeypatch.setitem(sys.modules, "tensorrt", fake_tensorrt.module())
    monkeypatch.syspath_prepend(str(bundle))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    names = ("build_engine", "run_engine")
    yield tuple(importlib.import_module(name) for name in names)  # type: ignore[misc]
    for name in names:
        sys.modules.pop(name, None)


def test_what_lies_in_it(made: Path) -> None:
    manifest = read_manifest(made)
    assert {"model.onnx", "tensorrt.json", "reference.safetensors", *SCRIPTS} == set(manifest.files)
    facts = json.loads((made / "tensorrt.json").read_text())
    assert facts["needs"] == {"tensorrt": "10.0", "tensorrt_rtx": "1.0"}
    assert facts["build_on"] == "device" and facts["options"]["sparse_weights"]
    reference = read_reference(made)
    assert reference is not None and reference.tolerance == 1e-4
    assert reference.inputs[0].shape == (4, 3, 8, 8)  # what the profile is tuned for, not the example's batch
    assert reference.outputs[0].shape == (4, 8, 5)
    assert "onnx_verification" in manifest.measurements


def test_it_tells_how_an_engine_is_made(made: Path) -> None:
    with fxc.load_engine(made) as engine, pytest.raises(BackendError, match="to be built on the device") as caught:
        engine(torch.randn(2, 3, 8, 8))
    assert "python build_engine.py" in str(caught.value.remedy) and "batch 1 to 8" in caught.value.problem
    assert "with tensorrt 10.0 or newer or tensorrt_rtx 1.0 or newer" in caught.value.problem


def test_it_needs_no_library_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from fxcompress.backends import tensorrt_library

    for name in tensorrt_library.LIBRARIES:
        monkeypatch.setitem(sys.modules, name, None)
    tensorrt_library._load.cache_clear()
    try:
        backend = TensorRT(build_on="device")
        fxc.compile(net(), example_inputs=(torch.randn(2, 3, 8, 8),), backend=backend, output=tmp_path / "b")
    finally:
        tensorrt_library._load.cache_clear()
    assert json.loads((tmp_path / "b" / "tensorrt.json").read_text())["library"] == "tensorrt"


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_programs_are_python_3_8_and_need_tensorrt_and_numpy_alone(made: Path, name: str) -> None:
    tree = ast.parse((made / name).read_text(), feature_version=(3, 8))
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.partition(".")[0] for name in imported} - set(sys.stdlib_module_names) <= {
        "numpy",
        "build_engine",
        "tensorrt",
    }


@needs_rtx
def test_it_builds_ahead_of_time_with_the_real_library(bundle: Path) -> None:
    command = [sys.executable, str(bundle / "build_engine.py"), "--library", "tensorrt_rtx"]
    command += ["--compute-capability", "sm86", "--compute-capability", "sm89"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    engine = bundle.parent / "net.engine"
    assert f"built {engine}: {engine.stat().st_size:,} bytes" in done.stdout
    read_manifest(bundle)  # nothing was left inside
    done = subprocess.run([*command, "--compute-capability", "sm1"], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "does not build for sm1: sm75, sm80" in done.stderr
    done = subprocess.run([*command, "--compute-capability", "SM86"], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "names one twice" in done.stderr
    done = subprocess.run([*command, "--timing-cache", "cache"], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "keeps no timing cache" in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
@needs_rtx
def test_a_machine_without_a_gpu_is_told(bundle: Path) -> None:
    """The engine is not to blame, and the bundle is as it was."""
    (bundle.parent / "net.engine").write_bytes(b"an engine")
    done = subprocess.run([sys.executable, str(bundle / "run_engine.py")], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and not done.stdout
    assert "none can be used here" in done.stderr or "libcudart" in done.stderr
    assert "refuses the engine" not in done.stderr
    read_manifest(bundle)


def test_build_run_verdict(programs: tuple[Any, Any], bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build, run = programs
    assert build.main([], bundle) == 0
    (config,) = fake_tensorrt.Builder.made
    assert config.profiles[0].shapes == {"input": ((1, 3, 8, 8), (4, 3, 8, 8), (8, 3, 8, 8))}
    assert config.flags == {fake_tensorrt.BuilderFlag.SPARSE_WEIGHTS}
    assert fake_tensorrt.Builder.networks[0].flags == 1 << 1
    result = bundle.parent / "result.json"
    assert run.main(["--repetitions", "3", "--warmup", "1", "--json", str(result)], bundle, fake_tensorrt.Cuda) == 0
    assert "PASS: the engine computes what PyTorch did" in capsys.readouterr().out
    told = json.loads(result.read_text())
    assert told["verdict"] == "pass" and told["relative_error"]["output"] <= told["tolerance"] == 1e-4
    assert told["median_ms"] > 0 and told["input_shapes"] == [[4, 3, 8, 8]]


@pytest.mark.parametrize("wrong_by", [1.0, float("nan"), float("inf")])
def test_a_wrong_engine_fails(
    programs: tuple[Any, Any],
    bundle: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    wrong_by: float,
) -> None:
    build, run = programs
    assert build.main([], bundle) == 0
    monkeypatch.setattr(fake_tensorrt.Engine, "wrong_by", wrong_by)
    result = bundle.parent / "result.json"
    assert run.main(["--repetitions", "1", "--json", str(result)], bundle, fake_tensorrt.Cuda) == 1
    assert "FAIL: the engine computes something else" in capsys.readouterr().out
    assert json.loads(result.read_text())["verdict"] == "fail"


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["--output", "{bundle}/model.engine"], "may not lie inside the bundle"),
        (["--compute-capability", "sm86"], "builds for the GPU that it runs on"),
        (["--library", "tensorrt_rtx"], "no TensorRT can be imported"),
        (["--output", "{bundle}/../none/net.engine"], "there is no folder"),
        (["--timing-cache", "{bundle}/../none/cache"], "there is no folder"),
        (["--workspace-mib", "-3"], "1 or more"),
    ],
)
def test_command_lines_that_do_not_fit(
    programs: tuple[Any, Any],
    bundle: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    given: list[str],
    told: str,
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    assert programs[0].main([part.format(bundle=bundle) for part in given], bundle) == 2
    assert told in capsys.readouterr().err


@pytest.mark.parametrize("given", [["--library", "trt"], ["--workspace-mib", "much"], ["--no-such-option"]])
def test_options_of_the_command_line_are_checked(programs: tuple[Any, Any], bundle: Path, given: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        programs[0].main(given, bundle)
    assert caught.value.code == 2


def test_bundles_and_machines_that_do_not_fit(
    programs: tuple[Any, Any], bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    build, run = programs
    assert run.main([], bundle, fake_tensorrt.Cuda) == 2
    assert "run build_engine.py first" in capsys.readouterr().err
    assert run.main(["--repetitions", "0"], bundle, fake_tensorrt.Cuda) == 2
    assert run.main(["--json", str(bundle / "none" / "told.json")], bundle, fake_tensorrt.Cuda) == 2
    assert "there is no folder" in capsys.readouterr().err
    monkeypatch.setattr(sys.modules["tensorrt"], "__version__", "8.6.1")
    assert build.main([], bundle) == 2
    assert "8.6.1 is too old" in capsys.readouterr().err
    monkeypatch.setattr(sys.modules["tensorrt"], "__version__", "10.13.0")
    fake_tensorrt.Builder.refuses = "no"
    monkeypatch.setattr(fake_tensorrt.Builder, "build_serialized_network", lambda *_: None)
    assert build.main([], bundle) == 1
    assert "could not build the engine" in capsys.readouterr().err
    (bundle / "model.onnx").write_bytes(b"another")
    assert build.main([], bundle) == 2
    assert "model.onnx was altered" in capsys.readouterr().err
    for content in ("[]", '{"files": []}', '{"files": {"model.onnx": 3}}', "no json"):
        (bundle / "manifest.json").write_text(content)
        assert build.main([], bundle) == 2
        assert "no whole bundle" in capsys.readouterr().err
    (bundle / "manifest.json").unlink()
    assert build.main([], bundle) == 2
    assert "no whole bundle" in capsys.readouterr().err


def test_the_timing_cache_and_the_workspace(programs: tuple[Any, Any], bundle: Path) -> None:
    cache = bundle.parent / "cache"
    assert programs[0].main(["--timing-cache", str(cache), "--workspace-mib", "2"], bundle) == 0
    assert cache.read_bytes() == b"+"
    assert list(fake_tensorrt.Builder.made[0].pools.values()) == [2 << 20]
    cache.write_bytes(b"of another device")
    assert programs[0].main(["--timing-cache", str(cache)], bundle) == 2


def test_reference_data_that_cannot_be_read(programs: tuple[Any, Any], bundle: Path) -> None:
    facts = json.loads((bundle / "tensorrt.json").read_text())
    path = bundle / "reference.safetensors"
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    wrong = (
        (b'"F32"', b'"F33"'),
        (b'"output.0"', b'"output.1"'),
        (b'"tolerance"', b'"tolerated"'),
        (b"[4,8,5]", b"[4,8,6]"),
    )
    for broken in (content[:100], b"", b"nothing", content[: start + 7], *(content.replace(*pair) for pair in wrong)):
        path.write_bytes(broken)
        with pytest.raises(sys.modules["build_engine"].Unfit, match="reference data cannot be read"):
            programs[1].read_reference(bundle, facts)


def test_every_dtype_is_read_as_it_was_written(programs: tuple[Any, Any], tmp_path: Path) -> None:
    names = ("float64", "float32", "float16", "bfloat16", "bool", "uint8", *(f"int{8 << power}" for power in range(4)))
    tensors = [(torch.randn(3, 4) * 9).to(getattr(torch, name)).T for name in names]
    tensors += [torch.tensor(7), torch.zeros(0, 3)]
    assert write_reference(tmp_path, Reference(tuple(tensors), (tensors[3],), 0.25), whatever_size=True) == ""
    inputs, outputs, tolerance = programs[1].read_reference(tmp_path, {"inputs": tensors, "outputs": [None]})
    assert tolerance == 0.25
    for array, tensor in zip([*inputs, *outputs], [*tensors, tensors[3]], strict=True):
        bits = tensor.contiguous().view(torch.int16) if tensor.dtype is torch.bfloat16 else tensor
        np.testing.assert_array_equal(array.view(bits.numpy().dtype), bits.numpy())


class Named(nn.Module):
    """A dict, a size, and a constant, of two inputs of which one holds integers."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(16, 6)

    def forward(self, tokens: torch.Tensor, *, weight: torch.Tensor) -> dict[str, Any]:
        return {"sum": (self.table(tokens) * weight).sum(1), "count": tokens.shape[0], "version": 3}


def test_the_reference_of_a_model_with_dicts_and_sizes(tmp_path: Path) -> None:
    """As large as it may be, and there without verification: a device has nothing else to go by."""
    inputs = {"tokens": torch.randint(16, (2, 5)), "weight": torch.randn(2, 5, 6)}
    backend = TensorRT(build_on="device", profiles=({"batch": (1, 3, 90_000)},))
    compiled = fxc.compile(Named().eval(), example_inputs=inputs, progress=False)
    compiled.export(backend, tmp_path / "small", verify=False)
    reference = read_reference(tmp_path / "small")
    assert reference is not None
    assert [tuple(tensor.shape) for tensor in (*reference.inputs, *reference.outputs)] == [
        (3, 5),
        (3, 5, 6),
        (3, 6),
        (),
    ]
    assert reference.outputs[1] == 3
    backend = TensorRT(build_on="device", profiles=({"batch": (1, 90_000, 90_000)},))
    compiled.export(backend, tmp_path / "large")
    assert (tmp_path / "large" / "reference.safetensors").stat().st_size > 8 << 20
    assert "reference" not in read_manifest(tmp_path / "large").measurements


def test_a_bundle_of_the_time_before_opens(bundle: Path, tmp_path: Path) -> None:
    """Its reference data was an npz file, which its own programs read."""
    manifest = read_manifest(bundle)
    with BundleWriter(tmp_path / "old") as writer:
        for name in manifest.files:
            (writer.directory / name.replace(".safetensors", ".npz")).write_bytes((bundle / name).read_bytes())
        facts = json.loads((bundle / "tensorrt.json").read_text()) | {"tolerance": 1e-4}
        (writer.directory / "tensorrt.json").write_text(json.dumps(facts))
        writer.commit(dataclasses.replace(manifest, files={}))
    with fxc.load_engine(tmp_path / "old") as engine, pytest.raises(BackendError, match="to be built on the device"):
        engine(torch.randn(2, 3, 8, 8))


def test_errors_are_measured_as_fxcompress_does(programs: tuple[Any, Any]) -> None:
    from fxcompress.backends.verification import relative_error

    generator = np.random.default_rng(0)
    inf, nan = float("inf"), float("nan")
    pairs = [(generator.normal(size=8), generator.normal(size=8)), (np.zeros(3), np.ones(3)), (np.ones(0), np.ones(0))]
    pairs += [(np.array([1, nan, inf]), np.array([2, nan, inf])), (np.array([1, nan]), np.array([nan, 1]))]
    pairs += [
        (np.array([inf, 1]), np.array([-inf, 1])),
        (np.array([-3e38, 1, 2, -3e38]), np.array([-3e38, 1, 3, -3e38])),
    ]
    pairs += [(np.array([-3e38, 1]), np.array([-2e38, 1])), (np.array([5e3, 0.0]), np.array([5e3, 1]))]
    for a, b in pairs:
        assert programs[1].relative_error(a, b) == relative_error(torch.from_numpy(a), torch.from_numpy(b))
    assert programs[1].relative_error(np.ones(2), np.ones(3)) == inf


def test_bfloat16_travels_as_its_bits(programs: tuple[Any, Any], tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4)).to(torch.bfloat16).eval()
    x = torch.randn(2, 4, dtype=torch.bfloat16)
    backend = TensorRT(build_on="device")
    fxc.compile(model, example_inputs=(x,), backend=backend, output=tmp_path / "half", verify=False)
    facts = json.loads((tmp_path / "half" / "tensorrt.json").read_text())
    (given,), (wanted,), _ = programs[1].read_reference(tmp_path / "half", facts)
    assert given.dtype == np.uint16
    np.testing.assert_array_equal(programs[1].as_float(given, "bfloat16"), x.double().numpy())
    np.testing.assert_array_equal(programs[1].as_float(wanted, "bfloat16"), model(x).detach().double().numpy())


def test_pick_profile(programs: tuple[Any, Any]) -> None:
    profiles = [{"shapes": {"x": [[1, 3], [1, 3], [4, 3]]}}, {"shapes": {"x": [[4, 3], [8, 3], [16, 3]]}}]
    run: ModuleType = programs[1]
    assert [run.pick_profile(profiles, {"x": (size, 3)}) for size in (1, 4, 5, 16)] == [0, 0, 1, 1]
    with pytest.raises(sys.modules["build_engine"].Unfit):
        run.pick_profile(profiles, {"x": (17, 3)})
