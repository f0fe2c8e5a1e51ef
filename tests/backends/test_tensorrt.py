"""The TensorRT backend: options, engines built ahead of time, what errors name, what an engine tells without a GPU."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

import fxcompress as fxc
from fxcompress.backends import tensorrt_library
from fxcompress.backends.bundle import read_manifest
from fxcompress.backends.onnx_backend import MODEL_FILE
from fxcompress.backends.tensorrt import TensorRT
from fxcompress.backends.tensorrt_engine import FACTS_FILE, PLAN_FILE, TensorRTEngine
from fxcompress.backends.tensorrt_library import LIBRARIES, PORTABLE, RTX_CAPABILITIES, find_library
from fxcompress.errors import BackendError, BundleError, OptionError, VerificationError
from tests.backends import fake_tensorrt
from tests.support import randomize

needs_rtx = pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="needs tensorrt-rtx")
needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="what is told where there is no GPU")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        features = torch.relu(self.conv(x)).mean((2, 3))
        return {"logits": self.head(features), "features": features}


X = (torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)),)


@pytest.fixture
def classic(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """A stand-in for the ``tensorrt`` module is installed."""
    module = fake_tensorrt.module()
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    tensorrt_library._load.cache_clear()
    yield module
    tensorrt_library._load.cache_clear()  # not the loggers: TensorRT for RTX keeps its first one for good


@pytest.fixture
def no_library(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No TensorRT can be imported."""
    for name in LIBRARIES:
        monkeypatch.setitem(sys.modules, name, None)
    tensorrt_library._load.cache_clear()
    yield
    tensorrt_library._load.cache_clear()


# --- options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message", "remedy"),
    [
        ({"compute_capabilities": ("sm85",)}, "option compute_capabilities is 'sm85'", "did you mean 'sm8"),
        ({"compute_capabilities": ("sm86", "sm87")}, "option compute_capabilities is 'sm87'", "build_on='device'"),
        ({"compute_capabilities": ("sm86", "sm86")}, "option compute_capabilities", "each once"),
        ({"compute_capabilities": ()}, "option compute_capabilities", "None"),
        ({"compute_capabilities": "sm86"}, "compute_capabilities='sm86'", "tuple"),
        ({"compute_capabilities": ("sm86",), "build_on": "device"}, "compute_capabilities", "its own GPU"),
        ({"compute_capabilities": ("sm86",), "library": "tensorrt"}, "compute_capabilities", "TensorRT for RTX"),
        ({"compute_capabilities": ("sm86", "sm89"), "refit": True}, "compute_capabilities", "one at a time"),
        ({"build_on": "jetson"}, "build_on='jetson'", "here"),
        ({"library": "trt"}, "library='trt'", "tensorrt_rtx"),
        ({"profiles": ({"batch": (4, 2, 8)},)}, "option profiles", "in this order"),
        ({"profiles": ({"batch": (0, 2, 8)},)}, "option profiles", "in this order"),
        ({"profiles": ({"batch": (1, 2)},)}, "option profiles", "in this order"),
        ({"profiles": ({"batch": (1, 2.5, 3)},)}, "option profiles", "in this order"),
        ({"profiles": {"batch": (1, 2, 3)}}, "profiles=", "tuple"),
        ({"tf32": 1}, "tf32=1", "bool"),
        ({"hardware_compatibility": "turing"}, "hardware_compatibility='turing'", "ampere_plus"),
        ({"optimization_level": 6}, "option optimization_level is 6", "0 to 5"),
        ({"workspace_bytes": 0}, "option workspace_bytes is 0", "1 or more"),
        ({"opset": 5}, "option opset is 5", "18 to"),
        ({"strip_plan": True, "build_on": "device"}, "option strip_plan", "leave it out"),
    ],
)
def test_options_are_checked_when_given(options: dict[str, Any], message: str, remedy: str) -> None:
    with pytest.raises(OptionError) as caught:
        TensorRT(**options)
    assert message in caught.value.problem and remedy in str(caught.value.remedy)


def test_options_round_trip_through_json() -> None:
    backend = TensorRT(compute_capabilities=("sm86", "sm89"), profiles=({"batch": (1, 8, 32)},), optimization_level=2)
    told = json.loads(json.dumps(backend.options()))
    assert TensorRT(**told) == backend
    assert fxc.backends.TensorRT is TensorRT


# --- engines ahead of time --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("tensorrt_rtx")
    path = tmp_path_factory.mktemp("trt") / "net.bundle"
    backend = TensorRT(compute_capabilities=("sm86", "sm89"), profiles=({"batch": (1, 1, 4)}, {"batch": (4, 16, 32)}))
    fxc.compile(randomize(Net()), example_inputs=X, backend=backend, output=path).engine.close()  # type: ignore[union-attr]
    return path


def test_an_engine_for_two_gpus_and_two_ranges(bundle: Path) -> None:
    manifest = read_manifest(bundle)
    assert {PLAN_FILE, FACTS_FILE} <= set(manifest.files) and MODEL_FILE not in manifest.files
    assert "tensorrt-rtx" in manifest.versions
    measured = manifest.measurements["tensorrt"]
    assert measured["bytes"] == manifest.files[PLAN_FILE].bytes > 0
    assert measured["compute_capabilities"] == ["sm86", "sm89"]
    facts = json.loads((bundle / FACTS_FILE).read_text())
    assert [profile["sizes"] for profile in facts["profiles"]] == [{"batch": [1, 1, 4]}, {"batch": [4, 16, 32]}]
    assert facts["profiles"][1]["shapes"]["x"] == [[4, 3, 8, 8], [16, 3, 8, 8], [32, 3, 8, 8]]


@needs_no_gpu
def test_what_was_verified_and_what_was_not(bundle: Path) -> None:
    measured = read_manifest(bundle).measurements
    assert set(measured["onnx_verification"]["relative_error"]) == {"logits", "features"}
    assert max(measured["onnx_verification"]["relative_error"].values()) <= measured["onnx_verification"]["tolerance"]
    skipped = measured["verification"]["skipped"]
    assert "runs on a GPU only" in skipped and "run in ONNX Runtime instead: relative error" in skipped


@needs_rtx
@needs_no_gpu
def test_the_report_says_that_the_engine_was_not_run() -> None:
    compiled = fxc.compile(randomize(Net()), example_inputs=X, backend=TensorRT(compute_capabilities=("sm89",)))
    assert compiled.report.engine is not None and not compiled.report.engine.errors
    assert "runs on a GPU only" in compiled.report.engine.unverified
    assert "not verified: a TensorRT engine runs on a GPU only" in str(compiled.report).replace("\n", " ")


@needs_no_gpu
def test_an_engine_without_a_gpu_tells_what_it_holds(bundle: Path) -> None:
    with fxc.load_engine(bundle) as engine:
        assert isinstance(engine, TensorRTEngine)
        with pytest.raises(BackendError) as caught:
            engine(*X)
        for told in ("sm86, sm89", "batch 1 to 4", "batch 4 to 32", "x: float32[batch, 3, 8, 8]", "logits: float32"):
            assert told in caught.value.problem
        assert f"{engine.facts.bytes:,} bytes" in caught.value.problem
        assert caught.value.where == str(bundle) and "device" in str(caught.value.remedy)
        with pytest.raises(BackendError, match="cannot run here"):
            engine.benchmark()
    with pytest.raises(BackendError, match="is closed"):
        engine(*X)


def test_a_bundle_can_be_read_without_the_library(bundle: Path, no_library: None) -> None:
    engine = fxc.load_engine(bundle)
    assert engine.unavailable and "sm86" in engine.holds()  # type: ignore[attr-defined]


def test_options_are_built_in(bundle: Path) -> None:
    with pytest.raises(OptionError, match="built into the engine"):
        fxc.load_engine(bundle, tf32=True)
    with pytest.raises(OptionError, match="no option 'threads'"):
        fxc.load_engine(bundle, threads=2)


@pytest.mark.parametrize("content", ["", "[]", '{"build_on": "here"}'])
def test_facts_that_cannot_be_read(bundle: Path, tmp_path: Path, content: str) -> None:
    (tmp_path / FACTS_FILE).write_text(content)
    with pytest.raises(BundleError, match="cannot be read"):
        TensorRT.load(tmp_path, read_manifest(bundle))


@needs_rtx
def test_every_gpu_from_ampere_on_by_default() -> None:
    library = find_library("tensorrt_rtx")
    assert set(RTX_CAPABILITIES) <= set(library.capabilities)
    with TensorRT(keep_onnx=True).build(captured(Net(), X), None, context()) as engine:
        assert engine.facts.compute_capabilities == PORTABLE  # type: ignore[attr-defined]
        assert MODEL_FILE in engine.manifest.files


@needs_rtx
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_what_it_is(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(4, 4)).to(dtype)
    with TensorRT(compute_capabilities=("sm89",)).build(
        captured(model, (torch.randn(2, 4, dtype=dtype),)), None, context()
    ) as engine:
        assert engine.manifest.outputs[0].dtype == str(dtype).removeprefix("torch.")


def captured(model: nn.Module, inputs: tuple[Any, ...]) -> Any:
    from fxcompress.capture import capture

    return capture(model.eval(), inputs)


def context() -> Any:
    from fxcompress.backends.base import BuildContext

    return BuildContext(example_inputs=X)


# --- refusals ---------------------------------------------------------------------------------------------------------


class Determinant(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.linalg.det(self.linear(x))


class Antialiased(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = Enlarge()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.up(x) + 1


class Enlarge(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.interpolate(x, size=(13, 13), mode="bilinear", antialias=True)


@needs_rtx
@pytest.mark.parametrize(
    ("model", "inputs", "problem", "line"),
    [
        (Determinant(), (torch.randn(2, 4, 4),), "no such operator", "torch.linalg.det(self.linear(x))"),
        (Antialiased(), X, "without antialiasing", "nn.functional.interpolate("),
    ],
)
def test_a_refusal_names_the_users_line(
    model: nn.Module, inputs: tuple[torch.Tensor, ...], problem: str, line: str, tmp_path: Path
) -> None:
    with pytest.raises(BackendError, match=problem) as caught:
        fxc.compile(model.eval(), example_inputs=inputs, backend="tensorrt", output=tmp_path / "b")
    assert line in str(caught.value.where) and "test_tensorrt.py" in str(caught.value.where)
    assert list(tmp_path.iterdir()) == []


@needs_rtx
def test_float64_is_refused_since_it_would_be_float32() -> None:
    model, x = nn.Linear(3, 3).double(), torch.randn(2, 3).double()
    with pytest.raises(BackendError, match="float64, which TensorRT computes as float32"):
        fxc.compile(model.eval(), example_inputs=(x,), backend="tensorrt")


@needs_rtx
def test_what_the_builder_refuses_names_the_layer() -> None:
    backend = TensorRT(compute_capabilities=("sm75",))
    with pytest.raises(BackendError, match="cannot build the engine for sm75") as caught:
        fxc.compile(randomize(Net()), example_inputs=X, backend=backend)
    assert "'head/Gemm' of layer 'head' (Linear)" in str(caught.value.where)
    assert "self.head(features)" in str(caught.value.where) and "sm75" in str(caught.value.remedy)


@needs_rtx
def test_what_the_parser_refuses_names_the_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxcompress.backends.tensorrt.check_onnx", lambda path: [])
    with pytest.raises(
        BackendError, match=r"cannot import the model: Resize .*Antialiasing is not supported"
    ) as caught:
        fxc.compile(Antialiased().eval(), example_inputs=X, backend=TensorRT(compute_capabilities=("sm86",)))
    assert "nn.functional.interpolate(" in str(caught.value.where)
    monkeypatch.undo()
    monkeypatch.setattr("fxcompress.backends.tensorrt.check_onnx", lambda path: [])
    with pytest.raises(BackendError, match="there is no importer for Det"):
        fxc.compile(Determinant().eval(), example_inputs=(torch.randn(2, 4, 4),), backend="tensorrt")


@needs_rtx
@needs_no_gpu
def test_an_onnx_file_that_is_wrong_builds_no_engine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import onnx

    from fxcompress.backends import onnx_export

    write = onnx_export.write_onnx

    def wrong(graph_module: Any, path: Path, **options: Any) -> Any:
        made = write(graph_module, path, **options)
        model = onnx.load(path)
        next(node for node in model.graph.node if node.op_type == "Relu").op_type = "Neg"
        onnx.save(model, path)
        return made

    monkeypatch.setattr(onnx_export, "write_onnx", wrong)
    with pytest.raises(VerificationError, match=r"ONNX file that the engine is made of is wrong.*differs from PyTorch"):
        fxc.compile(randomize(Net()), example_inputs=X, backend="tensorrt", output=tmp_path / "b")
    assert list(tmp_path.iterdir()) == []


@needs_rtx
def test_a_profile_for_a_size_that_is_not_there() -> None:
    with pytest.raises(OptionError, match="no input has a size called 'bach'"):
        fxc.compile(Net().eval(), example_inputs=X, backend=TensorRT(profiles=({"bach": (1, 2, 3)},)))


@needs_rtx
@pytest.mark.parametrize(
    "options", [{"version_compatible": True}, {"timing_cache": "t"}, {"hardware_compatibility": "ampere_plus"}]
)
def test_what_tensorrt_for_rtx_lacks_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=f"has no {next(iter(options))}"):
        fxc.compile(Net().eval(), example_inputs=X, backend=TensorRT(library="tensorrt_rtx", **options))


def test_no_library(no_library: None) -> None:
    with pytest.raises(BackendError, match="tensorrt_rtx is not installed; tensorrt is not installed") as caught:
        fxc.compile(Net().eval(), example_inputs=X, backend="tensorrt")
    assert "fxcompress[tensorrt]" in str(caught.value.remedy)


# --- TensorRT itself --------------------------------------------------------------------------------------------------


def test_the_same_road_with_tensorrt_itself(classic: ModuleType, tmp_path: Path) -> None:
    cache = tmp_path / "timing"
    cache.write_bytes(b"known")
    backend = TensorRT(
        library="tensorrt",
        sparse_weights=True,
        version_compatible=True,
        hardware_compatibility="ampere_plus",
        timing_cache=str(cache),
        workspace_bytes=1 << 20,
        optimization_level=5,
    )
    engine = fxc.compile(randomize(Net()), example_inputs=X, backend=backend).engine
    assert engine is not None and engine.facts.library == "tensorrt"  # type: ignore[attr-defined]
    (network,), (config,) = fake_tensorrt.Builder.networks, fake_tensorrt.Builder.made
    flag = fake_tensorrt.BuilderFlag
    assert network.flags == 1 << 1
    assert config.flags == {flag.SPARSE_WEIGHTS, flag.VERSION_COMPATIBLE}  # and TF32 is cleared
    assert config.hardware_compatibility_level is fake_tensorrt.HardwareCompatibilityLevel.AMPERE_PLUS
    assert config.pools == {fake_tensorrt.MemoryPoolType.WORKSPACE: 1 << 20}
    assert config.builder_optimization_level == 5
    assert config.profiles[0].shapes == {"x": ((1, 3, 8, 8), (2, 3, 8, 8), (8, 3, 8, 8))}
    assert cache.read_bytes() == b"known+"


def test_a_stripped_engine_keeps_the_onnx_file(classic: ModuleType) -> None:
    with TensorRT(library="tensorrt", strip_plan=True, tf32=True).build(captured(Net(), X), None, context()) as engine:
        assert MODEL_FILE in engine.manifest.files and engine.facts.stripped  # type: ignore[attr-defined]
    assert fake_tensorrt.BuilderFlag.STRIP_PLAN in fake_tensorrt.Builder.made[0].flags
    assert fake_tensorrt.BuilderFlag.TF32 in fake_tensorrt.Builder.made[0].flags


def test_what_this_tensorrt_lacks_is_an_error(classic: ModuleType, tmp_path: Path) -> None:
    graph = captured(Net(), X)
    with pytest.raises(BackendError, match="has no hardware_compatibility"):
        TensorRT(library="tensorrt", hardware_compatibility="same_compute_capability").build(graph, None, context())
    cache = tmp_path / "timing"
    cache.write_bytes(b"of another device")
    with pytest.raises(BackendError, match="timing cache was made on another device"):
        TensorRT(library="tensorrt", timing_cache=str(cache)).build(graph, None, context())
    fake_tensorrt.Builder.refuses = "no implementation for conv/Conv"
    with pytest.raises(BackendError, match="no implementation for conv/Conv") as caught:
        TensorRT(library="tensorrt").build(graph, None, context())
    assert "layer 'conv' (Conv2d)" in str(caught.value.where)


@pytest.mark.parametrize(
    ("options", "said", "remedy"),
    [
        ({}, "no bf16 kernel for conv/Conv", "use float16, or keep the layer that is named in float32: {keep}"),
        ({}, "BF16 is not supported here", "use float16"),
        (
            {"workspace_bytes": 4096},
            "Could not find any implementation for node conv/Conv due to insufficient workspace.",
            "raise workspace_bytes, now 4096, or leave it out",
        ),
        ({}, "conv/Conv: insufficient workspace", "simplify the layer that is named, or ask for fewer options"),
        ({"workspace_bytes": 4096}, "no tactic", "simplify the model, or ask for fewer options"),
        ({"refit": True}, "an engine of another kind", "leave out refit and strip_plan"),
        ({}, "Turing GPUs have no kernel", "leave sm75 out of compute_capabilities"),
    ],
)
def test_what_the_builder_refuses_has_a_remedy(
    classic: ModuleType, tmp_path: Path, options: dict[str, Any], said: str, remedy: str
) -> None:
    fake_tensorrt.Builder.refuses = said
    with pytest.raises(BackendError, match=re.escape(said)) as caught:
        TensorRT(library="tensorrt", **options).build(captured(Net(), X), tmp_path / "none", context())
    keep = "ConvertPrecision(dtype='bfloat16', keep=('conv',))"
    assert str(caught.value.remedy).startswith(remedy.format(keep=keep))
    assert not (tmp_path / "none").exists()
    assert ("layer 'conv' (Conv2d)" in str(caught.value.where)) is ("conv/Conv" in said)


def test_the_remedy_for_bfloat16_can_be_followed(classic: ModuleType) -> None:
    keep = fxc.passes.ConvertPrecision(dtype="bfloat16", keep=("conv",))
    compiled = fxc.compile(Net().eval(), [keep], X, backend=TensorRT(library="tensorrt"))
    assert compiled.module.get_submodule("conv").weight.dtype is torch.float32
    assert compiled.module.get_submodule("head").weight.dtype is torch.bfloat16


def test_an_old_tensorrt_and_a_directory_of_stubs(classic: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(classic, "__version__", "10.3.0")
    with pytest.raises(BackendError, match=r"10\.3\.0 is too old"):
        find_library("tensorrt")
    monkeypatch.setitem(sys.modules, "tensorrt", ModuleType("tensorrt"))
    with pytest.raises(BackendError, match="is not installed"):
        find_library("tensorrt")


class Subscripts(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("N C h W, NChK -> N C W K".replace(" ", ""), x, x + 1)


@needs_rtx
def test_subscripts_become_small_letters() -> None:
    backend = TensorRT(compute_capabilities=("sm86",))
    compiled = fxc.compile(Subscripts().eval(), example_inputs=X, backend=backend)
    assert compiled.engine is not None
    assert compiled.engine.manifest.measurements["onnx_verification"]["relative_error"]


# --- after passes -----------------------------------------------------------------------------------------------------


def wide() -> nn.Module:
    layers = [nn.Conv2d(3, 128, 3), nn.BatchNorm2d(128), nn.ReLU(), nn.Conv2d(128, 512, 3), nn.ReLU()]
    return randomize(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10)))


@needs_rtx
def test_engines_shrink_as_their_models_do() -> None:
    quantize = fxc.passes.Quantize([X], scheme="tensorrt")
    recipes: list[list[Any]] = [
        ["fuse_modules"],
        ["fuse_modules", "convert_precision"],
        ["fuse_modules", "prune_channels(ratio=0.5)"],
        ["fuse_modules", quantize],
    ]
    sizes = []
    for passes in recipes:
        backend = TensorRT(compute_capabilities=("sm86", "sm89"))
        compiled = fxc.compile(wide(), passes, X, backend=backend)
        assert compiled.engine is not None
        measured = compiled.engine.manifest.measurements
        assert (
            max(measured["onnx_verification"]["relative_error"].values()) <= measured["onnx_verification"]["tolerance"]
        )
        sizes.append(measured["tensorrt"]["bytes"])
    assert all(size < sizes[0] for size in sizes[1:]), sizes


@needs_rtx
def test_a_model_quantized_for_another_engine_is_explained() -> None:
    quantize = fxc.passes.Quantize([X], scheme="onnxruntime")
    with pytest.raises(BackendError, match="takes uint8 for int8") as caught:
        fxc.compile(wide(), ["fuse_modules", quantize], X, backend="tensorrt")
    assert "scheme='tensorrt'" in str(caught.value.remedy)


# --- documentation ----------------------------------------------------------------------------------------------------


def test_the_page_lists_every_option_and_every_finding() -> None:
    root = Path(__file__).resolve().parents[2]
    page = (root / "docs" / "tensorrt.md").read_text(encoding="utf-8")
    source = (root / "fxcompress" / "backends" / "tensorrt_check.py").read_text(encoding="utf-8")
    codes = set(re.findall(r'(?:yield|_end\()\s*"(\w+)",', source))
    assert len(codes) >= 15
    assert [name for name in (*TensorRT().options(), *sorted(codes)) if f"`{name}`" not in page] == []


@pytest.mark.parametrize(("given", "flagged"), [(None, True), (False, False)])
def test_two_of_four_sets_the_flag_and_stands_in_the_manifest(
    classic: ModuleType, given: bool | None, flagged: bool
) -> None:
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)).eval()
    backend = TensorRT(library="tensorrt", sparse_weights=given)
    compiled = fxc.compile(model, ["sparsify_weights(pattern='2:4')"], (torch.randn(2, 4, 8, 8),), backend=backend)
    assert (fake_tensorrt.BuilderFlag.SPARSE_WEIGHTS in fake_tensorrt.Builder.made[-1].flags) is flagged
    assert compiled.engine is not None
    assert compiled.engine.manifest.measurements["tensorrt"]["sparse_2_4"] == ["0", "2"]
