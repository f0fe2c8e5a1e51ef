"""The torch.export backend: programs that could run code are refused, native code is loaded only if it is trusted."""

from __future__ import annotations

import io
import json
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxcompress as fxc
from fxcompress.backends import TorchExport
from fxcompress.errors import BackendError, BundleError, OptionError

PROGRAM, WEIGHTS = "models/model.json", "data/weights/model_weights_config.json"


class Sized(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x).reshape(x.shape[0] * 2, -1)


@pytest.fixture
def engine(tmp_path: Path) -> Any:
    compiled = fxc.compile(Sized().eval(), example_inputs=(torch.randn(3, 4),), progress=False)
    return compiled.export("torch_export", tmp_path / "b")


def rewritten(file: Path, change: Callable[[dict[str, bytes]], None]) -> None:
    """Write the archive again, after ``change`` has changed its members (named without their root)."""
    with zipfile.ZipFile(file) as archive:
        members = {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}
    change(members)
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, content in members.items():
            archive.writestr(f"model/{name}", content)


def test_options_are_checked_when_given() -> None:
    with pytest.raises(OptionError, match="option aot_inductor is 1") as caught:
        TorchExport(aot_inductor=1)  # type: ignore[arg-type]
    assert caught.value.where == "TorchExport.aot_inductor"


def test_loads_with_torch_alone(engine: Any) -> None:
    program = torch.export.load(engine.path / "model.pt2")
    for batch in (1, 5):
        x = torch.randn(batch, 4)
        (output,) = program.module()(x)  # with torch's own guards
        assert torch.equal(output, engine(x))
    assert str(Path(__file__).parent).encode() not in (engine.path / "model.pt2").read_bytes(), "no source paths"


class Evil:
    def __reduce__(self) -> Any:
        return print, ("unpickled",)


def _pickled_weight(members: dict[str, bytes]) -> None:
    config = json.loads(members[WEIGHTS])
    first = next(iter(config["config"].values()))
    first["use_pickle"] = True
    members[WEIGHTS] = json.dumps(config).encode()
    members[f"data/weights/{first['path_name']}"] = pickle.dumps(Evil())


def _sample_inputs(members: dict[str, bytes]) -> None:
    buffer = io.BytesIO()
    torch.save(Evil(), buffer)
    members["data/sample_inputs/model.pt"] = buffer.getvalue()


def _older_format(members: dict[str, bytes]) -> None:
    members["data/weights/model.pt"] = pickle.dumps(Evil())


def _opaque(members: dict[str, bytes]) -> None:
    members["data/constants/opaque_obj_0"] = pickle.dumps(Evil())


def _program(change: Callable[[Any], None]) -> Callable[[dict[str, bytes]], None]:
    def rewrite(members: dict[str, bytes]) -> None:
        program = json.loads(members[PROGRAM])
        change(program)
        members[PROGRAM] = json.dumps(program).encode()

    return rewrite


def _target(name: str) -> Callable[[dict[str, bytes]], None]:
    return _program(lambda p: p["graph_module"]["graph"]["nodes"][0].update(target=name))


def _size(text: str) -> Callable[[dict[str, bytes]], None]:
    def replace(value: Any) -> None:
        for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            if isinstance(inner, dict) and "expr_str" in inner:
                inner["expr_str"] = text
            replace(inner)

    return _program(replace)


def _spec(program: Any) -> None:
    signature = program["graph_module"]["module_call_graph"][0]["signature"]
    signature["in_spec"] = signature["in_spec"].replace("builtins.tuple", "some.other.Class")


ATTACKS = {
    "a pickled weight": (_pickled_weight, "is pickled"),
    "pickled sample inputs": (_sample_inputs, "may be pickled"),
    "a file of an older format": (_older_format, "may be pickled"),
    "an opaque object": (_opaque, "may be pickled"),
    "a function of torch": (_target("torch.hub.load"), "it calls 'torch.hub.load'"),
    "a function of the operating system": (_target("torch.os.system"), "it calls 'torch.os.system'"),
    "an operator that reads files": (_target("torch.ops.aten.from_file.default"), "from_file"),
    "an operator of a package": (_target("torch.ops.image.write_file.default"), "write_file"),
    "an extension": (_target("#torch.thing"), "it calls"),
    "code in a size": (_size("__import__('os').system('true')"), "no arithmetic"),
    "an attribute in a size": (_size("Symbol.mro()"), "no arithmetic"),
    "code in guards": (_program(lambda p: p.update(guards_code=["print(1)"])), "guards"),
    "a foreign structure": (_program(_spec), "some.other.Class"),
}


@pytest.mark.parametrize(("change", "message"), ATTACKS.values(), ids=ATTACKS)
def test_programs_that_could_run_code(
    engine: Any, change: Any, message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = engine.path / "model.pt2"
    before = file.read_bytes()
    rewritten(file, change)
    assert file.read_bytes() != before
    monkeypatch.setattr(torch.export, "load", lambda *_: pytest.fail("it was loaded"))
    with pytest.raises(BundleError) as caught:
        TorchExport.load(engine.path, engine.manifest)
    assert message in caught.value.problem and caught.value.where == str(file)
    assert "unpickled" not in capsys.readouterr().out


def test_an_archive_written_again_still_loads(engine: Any) -> None:
    """So what the attacks above meet is the check, and not the way in which they were written."""
    rewritten(engine.path / "model.pt2", lambda members: None)
    x = torch.randn(2, 4)
    assert torch.equal(TorchExport.load(engine.path, engine.manifest)(x), engine(x))


def test_files_that_are_no_programs(engine: Any) -> None:
    file = engine.path / "model.pt2"
    for content in (b"", b"nothing"):
        file.write_bytes(content)
        with pytest.raises(BackendError, match="no exported program"):
            TorchExport.load(engine.path, engine.manifest)


def test_native_code_must_be_trusted(engine: Any) -> None:
    manifest = engine.manifest
    manifest.options["aot_inductor"] = True
    with pytest.raises(BackendError, match="native code") as caught:
        TorchExport.load(engine.path, manifest)
    assert "trust_native_code=True" in str(caught.value.remedy)


def test_aot_inductor_without_a_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from torch._inductor import cpp_builder
    from torch._inductor.exc import InvalidCxxCompiler

    def none() -> str:
        raise InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", none)
    compiled = fxc.compile(nn.ReLU().eval(), example_inputs=(torch.randn(2, 3),), progress=False)
    with pytest.raises(BackendError, match="needs a C\\+\\+ compiler") as caught:
        compiled.export(TorchExport(aot_inductor=True), tmp_path / "b")
    assert "g++" in str(caught.value.remedy) and list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="needs a C++ compiler")
@torch.no_grad()
def test_aot_inductor(tmp_path: Path) -> None:
    model = Sized().eval()
    compiled = fxc.compile(model, example_inputs=(torch.randn(3, 4),), progress=False)
    compiled.export(TorchExport(aot_inductor=True), tmp_path / "b").close()
    assert (tmp_path / "b" / "model.aot.pt2").exists()
    with pytest.raises(BackendError, match="native code"):
        fxc.load_engine(tmp_path / "b")
    with fxc.load_engine(tmp_path / "b", trust_native_code=True) as engine:
        for batch in (1, 6):
            for x in (torch.randn(batch, 4), torch.randn(4, batch).T, torch.randn(batch, 8)[:, ::2]):
                torch.testing.assert_close(engine(x), model(x))


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.recurrent, self.head = nn.LSTM(6, 8, batch_first=True), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.recurrent(x)[0])


def test_operators_of_our_own_taken_apart_take_any_layout() -> None:
    # What an LSTM gives batch first is transposed in memory, which its fake value does not say.
    x = torch.randn(2, 5, 6)
    passes = [fxc.passes.QuantizeDynamic()]
    compiled = fxc.compile(Tagger().eval(), passes, example_inputs=(x,), progress=False)
    engine = compiled.export("torch_export")
    torch.testing.assert_close(torch.as_tensor(engine(x)), compiled(x), rtol=1e-2, atol=1e-2)
