"""``compile()`` from end to end, through public names only; and what it says to input that it cannot work on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fxcompress as fxc
from fxcompress.errors import (
    BundleError,
    CaptureError,
    FxCompressError,
    OptionError,
    PassError,
    PreconditionError,
    VerificationError,
)
from fxcompress.passes import Numerics, Pass, PassResult, Rewrite


class Net(nn.Module):
    """Convolution, norm and a head, called by keyword and returning a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(4, 2)
        nn.init.normal_(self.norm.weight)
        nn.init.normal_(self.norm.bias)
        self.norm.running_mean.normal_()
        self.norm.running_var.uniform_(0.5, 2)

    def forward(self, image: Tensor, gain: Tensor | None = None) -> dict[str, Tensor]:
        features = torch.relu(self.norm(self.conv(image)))
        if gain is not None:
            features = features * gain
        pooled = features.mean((2, 3))
        return {"logits": self.head(self.drop(pooled)), "pooled": pooled}


IMAGE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def net() -> Net:
    return Net().eval()


@pytest.fixture
def untouched(net: Net, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Run at the end of a test: the model is as it was, and the working directory as empty as before."""
    monkeypatch.chdir(tmp_path)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    attributes = {name: set(vars(module)) for name, module in net.named_modules()}

    def check() -> None:
        after = net.state_dict()
        assert list(after) == list(before)
        assert all(torch.equal(after[name], before[name]) for name in before)
        assert {name: set(vars(module)) for name, module in net.named_modules()} == attributes
        assert not any(module.training for module in net.modules())
        assert list(tmp_path.iterdir()) == []

    return check


# -- what works --------------------------------------------------------------------------------------------------


def test_model_to_engine(net: Net, tmp_path: Path) -> None:
    steps: list[str] = []
    compiled = fxc.compile(
        net,
        passes=[fxc.passes.FuseModules()],
        example_inputs={"image": IMAGE, "gain": torch.full((1,), 2.0)},
        backend="onnxruntime",
        output=tmp_path / "net.bundle",
        progress=lambda done, total, what: steps.append(f"{done}/{total} {what}"),
    )
    assert steps == ["0/4 capture", "1/4 fuse_modules", "2/4 report", "3/4 build onnxruntime engine"]
    for batch in (1, 2, 5):
        image, gain = torch.randn(batch, 3, 8, 8), torch.rand(1)
        wanted = net(image, gain)
        for given in (compiled(image=image, gain=gain), compiled.engine(image=image, gain=gain)):
            assert list(given) == ["logits", "pooled"]
            for name, value in wanted.items():
                torch.testing.assert_close(given[name], value, rtol=1e-4, atol=1e-5)
    arrays = compiled.engine(image=IMAGE.numpy(), gain=np.ones(1, np.float32))
    assert isinstance(arrays["logits"], np.ndarray)

    report = compiled.report
    assert [done.name for done in report.passes] == ["fuse_modules"]
    assert "norm" in [rewrite.site for rewrite in report.passes[0].rewrites]
    assert all(isinstance(rewrite.detail, dict) for rewrite in report.passes[0].rewrites)
    assert report.capture.errors == {"batch=2": 0.0, "batch=1": 0.0}
    assert report.engine.path == str(tmp_path / "net.bundle")
    assert max(report.engine.errors.values()) <= report.engine.tolerance
    assert "fuse_modules" in str(report)
    manifest = json.loads((tmp_path / "net.bundle" / "manifest.json").read_text())
    assert [entry["name"] for entry in manifest["passes"]] == ["fuse_modules"]


def test_saved_graph_trains_exports_and_compiles_further(net: Net, tmp_path: Path) -> None:
    first = fxc.compile(net, ["fuse_modules"], (IMAGE,), output=tmp_path / "net.fxc")
    again = fxc.load(tmp_path / "net.fxc")
    torch.testing.assert_close(again(IMAGE)["logits"], first(IMAGE)["logits"], rtol=0, atol=0)
    assert again.report.to_dict() == first.report.to_dict()

    again.module.train()
    loss = again(torch.randn(4, 3, 8, 8))["logits"].square().sum()
    loss.backward()
    assert all(parameter.grad is not None for parameter in again.module.parameters())
    with torch.no_grad():
        for parameter in again.module.parameters():
            parameter -= 0.01 * parameter.grad
    again.module.eval()

    further = fxc.compile(again, ["fuse_modules"], (IMAGE,))
    engine = further.export("onnxruntime", tmp_path / "net.bundle")
    wanted = again(IMAGE)["logits"]
    torch.testing.assert_close(fxc.load_engine(engine.path)(IMAGE)["logits"], wanted, rtol=1e-4, atol=1e-5)


def test_without_passes(net: Net, untouched: Callable[[], None]) -> None:
    compiled = fxc.compile(net, [], (IMAGE,))
    torch.testing.assert_close(compiled(IMAGE)["logits"], net(IMAGE)["logits"], rtol=0, atol=0)
    assert compiled.report.passes == []
    assert any("no passes" in note for note in compiled.report.capture.notes)
    untouched()


def test_weights_are_the_compiled_models_own(net: Net, untouched: Callable[[], None]) -> None:
    compiled = fxc.compile(net, ["fuse_modules"], (IMAGE,))
    with torch.no_grad():
        for parameter in compiled.module.parameters():
            parameter.zero_()
    untouched()


def test_exported_program_and_graph_module(net: Net) -> None:
    program = torch.export.export(net, (IMAGE,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    for model in (program, torch.fx.symbolic_trace(nn.Sequential(net.conv, net.norm))):
        compiled = fxc.compile(model, ["fuse_modules"], (IMAGE,))
        wanted = program.module()(IMAGE) if model is program else model(IMAGE)
        given = compiled(IMAGE)
        if isinstance(wanted, dict):
            wanted, given = wanted["logits"], given["logits"]
        torch.testing.assert_close(given, wanted, rtol=1e-4, atol=1e-5)


def test_fixed_sizes(net: Net) -> None:
    compiled = fxc.compile(net, example_inputs=(IMAGE,), dynamic_shapes=None, backend="onnxruntime")
    assert compiled.engine.manifest.inputs[0].shape == (2, 3, 8, 8)
    with pytest.raises(PreconditionError):
        compiled.engine(torch.randn(3, 3, 8, 8))


# -- input that cannot be worked on ------------------------------------------------------------------------------


class _Branches(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


def _training() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.Dropout())


def _broken(value: float) -> nn.Module:
    model = nn.Linear(4, 4).eval()
    with torch.no_grad():
        model.weight[0, 0] = value
    return model


class _NeedsInputs(Pass):
    name = "needs_inputs"
    numerics = Numerics.EXACT
    needs_inputs = True

    def run(self, graph_module: torch.fx.GraphModule, context: Any) -> PassResult:
        raise AssertionError("not reached")


LINEAR = nn.Linear(4, 4).eval()
X = torch.randn(2, 4)

BAD: dict[str, tuple[dict[str, Any], type[FxCompressError], str]] = {
    "no module": ({"model": [1, 2]}, PreconditionError, "list"),
    "a class": ({"model": nn.Linear}, PreconditionError, "nn.Module"),
    "training mode": ({"model": _training()}, PreconditionError, r"model\.eval\(\)"),
    "a NaN weight": ({"model": _broken(float("nan"))}, PreconditionError, "'weight'"),
    "an infinite weight": ({"model": _broken(float("inf"))}, PreconditionError, "'weight'"),
    "too many inputs": ({"example_inputs": (X, X)}, PreconditionError, "forward"),
    "too few inputs": ({"example_inputs": ()}, PreconditionError, "tensor"),
    "an unknown argument": ({"example_inputs": {"y": X}}, PreconditionError, "forward"),
    "another shape": ({"example_inputs": (torch.randn(2, 5),)}, PreconditionError, "5"),
    "another dtype": ({"example_inputs": (X.long(),)}, PreconditionError, "dtype"),
    "another structure": ({"example_inputs": ((X, X),)}, PreconditionError, "inputs"),
    "no tensor": ({"example_inputs": (3,)}, PreconditionError, "tensor"),
    "inputs as text": ({"example_inputs": "2x4"}, PreconditionError, "str"),
    "branches on data": ({"model": _Branches().eval()}, CaptureError, r"test_compile\.py:\d+"),
    "an unknown pass": ({"passes": ["fuse_module"]}, OptionError, "did you mean 'fuse_modules'"),
    "an unknown option": ({"passes": ["fuse_modules(ignor=())"]}, OptionError, "did you mean 'ignore'"),
    "an option of another type": ({"passes": ["fuse_modules(ignore=3)"]}, OptionError, "ignore"),
    "malformed text": ({"passes": ["fuse_modules(ignore="]}, OptionError, "no pass"),
    "code in an option": ({"passes": ["fuse_modules(ignore=__import__('os'))"]}, OptionError, "literal"),
    "a class for a pass": ({"passes": [fxc.passes.FuseModules]}, OptionError, r"FuseModules\("),
    "a number for a pass": ({"passes": [3]}, OptionError, "int"),
    "a number for passes": ({"passes": 3}, OptionError, "int"),
    "an unknown backend": ({"backend": "onnxrutime"}, OptionError, "did you mean 'onnxruntime'"),
    "a number for a backend": ({"backend": 3}, OptionError, "int"),
    "an engine without shapes": ({"example_inputs": None, "backend": "onnxruntime"}, OptionError, "example_inputs"),
    "a pass without inputs": ({"example_inputs": None, "passes": [_NeedsInputs()]}, PreconditionError, "inputs"),
    "unknown dynamic shapes": ({"dynamic_shapes": "all"}, OptionError, "'batch'"),
    "a dynamic dim of no argument": ({"dynamic_shapes": {"y": {0: "n"}}}, OptionError, "'y'"),
    "unknown progress": ({"progress": "bar"}, OptionError, "progress"),
    "an output below a file": ({"output": __file__ + "/x"}, BundleError, "cannot be written"),
    "an output that is a file": ({"output": __file__}, BundleError, "a file"),
    "an output that is not empty": ({"output": Path(__file__).parent}, BundleError, "not empty"),
    "an unwritable output": ({"output": "/proc/fxcompress"}, BundleError, "cannot be written"),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("what", BAD)
def test_bad_input(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options, error, message = BAD[what]
    monkeypatch.chdir(tmp_path)
    given: dict[str, Any] = {"model": LINEAR, "passes": (), "example_inputs": (X,), "output": "out"} | options
    before = {name: tensor.clone() for name, tensor in LINEAR.state_dict().items()}
    listing = sorted(Path(__file__).parent.iterdir())
    with pytest.raises(error, match=message) as caught:
        fxc.compile(**given)
    assert caught.value.remedy, "an error says what to do"
    assert list(tmp_path.iterdir()) == [], "nothing half-written"
    assert sorted(Path(__file__).parent.iterdir()) == listing
    assert all(torch.equal(LINEAR.state_dict()[name], before[name]) for name in before)


class _Wrong(Pass):
    name = "wrong"
    numerics = Numerics.REASSOCIATED

    def run(self, graph_module: torch.fx.GraphModule, context: Any) -> PassResult:
        with torch.no_grad():
            graph_module.head.weight = nn.Parameter(graph_module.head.weight * 1.01)
        return PassResult(graph_module, (Rewrite("head", "spoilt"),))


class _Failing(Pass):
    name = "failing"
    numerics = Numerics.EXACT

    def run(self, graph_module: torch.fx.GraphModule, context: Any) -> PassResult:
        for node in graph_module.graph.nodes:
            if node.op == "call_module":
                raise KeyError("oops")
        raise AssertionError


def test_pass_that_changes_outputs(net: Net, untouched: Callable[[], None]) -> None:
    with pytest.raises(VerificationError, match="wrong"):
        fxc.compile(net, [_Wrong()], (IMAGE,), backend="onnxruntime", output="out")
    untouched()


def test_pass_that_fails(net: Net, untouched: Callable[[], None]) -> None:
    with pytest.raises(PassError, match="failing") as caught:
        fxc.compile(net, [_Failing()], (IMAGE,), output="out")
    assert "conv" in caught.value.where
    assert "test_compile.py" in caught.value.where
    dump = Path(caught.value.remedy.split(" is in ")[1].split(";")[0])
    assert dump.read_text().startswith("graph(image: f32[batch, 3, 8, 8]")
    dump.unlink()
    untouched()


# -- bundles that cannot be trusted ------------------------------------------------------------------------------


def _edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    change(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))


def _spoil(what: str, path: Path) -> None:
    weights = path / "weights.safetensors"
    content = weights.read_bytes()
    if what == "altered":
        weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif what == "truncated":
        weights.write_bytes(content[:-1])
    elif what == "missing":
        weights.unlink()
    elif what == "unlisted":
        (path / "more").write_text("")
    elif what == "newer":
        _edit(path, lambda manifest: manifest.update(format_version=99))
    elif what == "climbing":
        _edit(path, lambda manifest: manifest["files"].update({"../other": manifest["files"].pop("graph.json")}))
    elif what == "no JSON":
        (path / "manifest.json").write_text("{")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fxc.compile(LINEAR, example_inputs=(X,), output=tmp_path_factory.mktemp("saved") / "net") and (
        tmp_path_factory.getbasetemp() / "saved0" / "net"
    )


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("altered", "sha256"),
        ("truncated", "bytes instead of"),
        ("missing", "is missing"),
        ("unlisted", "does not list"),
        ("newer", "format 99"),
        ("climbing", "no plain path"),
        ("no JSON", "cannot be read"),
    ],
)
def test_untrusted_bundle(what: str, message: str, saved: Path, tmp_path: Path) -> None:
    import shutil

    path = Path(shutil.copytree(saved, tmp_path / "net"))
    _spoil(what, path)
    with pytest.raises(BundleError, match=message) as caught:
        fxc.load(path)
    assert caught.value.remedy


def test_bundle_of_another_kind(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"fxcompress\.load\b"):
        fxc.load_engine(saved)
    with pytest.raises(BundleError, match="no bundle here"):
        fxc.load(tmp_path / "nowhere")


def test_weights_are_shared_until_the_module_is_asked_for(net: Net) -> None:
    owned, late = fxc.compile(net, [], (IMAGE,)), fxc.compile(net, [], (IMAGE,))
    theirs = {tensor.data_ptr() for tensor in net.parameters()}
    assert theirs & {tensor.data_ptr() for tensor in owned._module.parameters()}
    assert not theirs & {tensor.data_ptr() for tensor in owned.module.parameters()}
    before = owned(IMAGE)["logits"]
    with torch.no_grad():
        net.conv.weight.mul_(2)
    assert torch.equal(owned(IMAGE)["logits"], before)
    with pytest.raises(PreconditionError, match="changed after compile"):
        late(IMAGE)
    with pytest.raises(PreconditionError, match="changed after compile"):
        _ = late.module


@pytest.mark.slow
def test_weights_of_more_than_2_gib(tmp_path: Path) -> None:
    """More than a protocol buffer holds: they go into a file of their own. Needs 4 GiB of memory and 3 of disk."""
    width, depth = 8192, 9
    model = nn.Sequential(*[nn.Linear(width, width, bias=False) for _ in range(depth)]).eval()
    x = torch.randn(2, width, generator=torch.Generator().manual_seed(0))
    engine = fxc.compile(model, [], (x,), backend="onnxruntime", output=tmp_path / "large").engine
    assert engine is not None
    assert (tmp_path / "large" / "model.onnx.data").stat().st_size == depth * width**2 * 4 > 2**31
    with torch.no_grad():
        wanted = model(x[:1])
    assert float((engine(x[:1]) - wanted).abs().max() / wanted.abs().max()) < 1e-4
