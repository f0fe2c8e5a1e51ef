"""The command as a user types it: exit codes, one JSON document, readable errors, nothing left behind."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import save_model
from torch import nn

import fxcompress as fxc
from fxcompress.cli import main
from fxcompress.footprint import Footprint
from fxcompress.model_specs import load_model

MODELS = """
import torch
from torch import nn
from helper import width

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3, bias=False)
        self.norm = nn.BatchNorm2d(width)

    def forward(self, image):
        return torch.relu(self.norm(self.conv(image))).flatten(1)

def build():
    print("chatter of the user's own")
    torch.manual_seed(0)
    return Net(), (torch.randn(2, 3, 8, 8),)

instance = nn.Linear(4, 2)
number = 3

def broken():
    raise ValueError("no such luck")

def wrong():
    return 3

def branches():
    class Branches(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x
    return Branches(), (torch.randn(2, 3),)
"""


class Result(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    @property
    def told(self) -> str:
        """Standard error with its panel's frame and line breaks taken out."""
        return " ".join(self.err.replace("│", " ").split())


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """Run the command in a directory with ``models.py``."""
    (tmp_path / "models.py").write_text(MODELS)
    (tmp_path / "helper.py").write_text("width = 4\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setitem(sys.modules, "helper", None)
    monkeypatch.delitem(sys.modules, "helper")

    def call(*arguments: str) -> Result:
        code = main(arguments)
        out, err = capsys.readouterr()
        return Result(code, out, err)

    return call


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(1)).eval()
    path = tmp_path_factory.mktemp("bundle") / "net.bundle"
    fxc.compile(model, ["fuse_modules"], (torch.randn(2, 3, 8, 8),), backend="onnxruntime", output=path)
    return path


def written(tmp_path: Path) -> set[str]:
    return {path.name for path in tmp_path.iterdir()} - {"models.py", "helper.py", "__pycache__"}


# -- compile -----------------------------------------------------------------------------------------------------


def test_compile_to_an_engine(run: Callable[..., Result], tmp_path: Path) -> None:
    result = run(
        "compile", "models.py:build", "-p", "fuse_modules", "-b", "onnxruntime", "-B", "threads=1", "-o", "net.bundle",
        "--report", "report.json", "--json",
    )  # fmt: skip
    assert result.code == 0, result.err
    told = result.json
    assert told["output"] == str(tmp_path / "net.bundle")
    assert told["weights"] == "weights of build()"
    assert list(told["files"]) == ["model.onnx", "reference.safetensors"]
    assert [done["name"] for done in told["report"]["passes"]] == ["fuse_modules"]
    assert told["report"] == json.loads((tmp_path / "report.json").read_text())
    assert "chatter" in result.err
    engine = fxc.load_engine(tmp_path / "net.bundle")
    assert engine.manifest.options["threads"] == 1
    model, inputs = load_model("models.py:build").model, torch.randn(3, 3, 8, 8)
    torch.testing.assert_close(engine(inputs), model(inputs), rtol=1e-4, atol=1e-5)


def test_compile_to_a_saved_graph_and_further(run: Callable[..., Result], tmp_path: Path) -> None:
    result = run("compile", "models.py:build", "--pass", "fuse_modules", "--output", "net.fxc")
    assert result.code == 0, result.err
    for part in ("fuse_modules", "MACs", "saved graph", "net.fxc", "weights of build()"):
        assert part in result.out
    again = run("compile", "net.fxc", "-p", "fuse_modules", "--json")
    assert again.code == 0, again.err
    assert again.json["weights"] == "weights of the saved graph"
    assert again.json["report"]["capture"]["errors"] != {} or again.json["report"]["passes"]
    assert written(tmp_path) == {"net.fxc"}


def test_compile_without_output_writes_nothing(run: Callable[..., Result], tmp_path: Path) -> None:
    result = run("compile", "models.py:Net", "-i", "2x3x8x8", "--no-dynamic")
    assert result.code == 0, result.err
    assert "nothing was written" in result.out
    assert written(tmp_path) == set()


def test_compile_a_recipe(run: Callable[..., Result], tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("model: models.py:build\npasses: [fuse_modules]\noutput: a.fxc\n")
    result = run(
        "compile", "--recipe", "recipe.yaml", "-o", "b.fxc", "--dynamic-shapes", '{"image": {"0": "n"}}', "--json"
    )
    assert result.code == 0, result.err
    assert written(tmp_path) == {"recipe.yaml", "b.fxc"}
    assert fxc.load(tmp_path / "b.fxc").report.inputs == ["image: f32[n, 3, 8, 8]"]


def test_checkpoint(run: Callable[..., Result], tmp_path: Path) -> None:
    model = nn.Linear(4, 2)
    save_model(model, str(tmp_path / "right.safetensors"))
    save_model(nn.Linear(4, 3), str(tmp_path / "shape.safetensors"))
    save_model(nn.Sequential(model), str(tmp_path / "names.safetensors"))
    (tmp_path / "broken.safetensors").write_bytes(b"no")
    result = run("compile", "models.py:instance", "-i", "2x4", "--checkpoint", "right.safetensors", "-o", "net.fxc")
    assert result.code == 0, result.err
    assert "weights of right.safetensors" in result.out
    x = torch.randn(3, 4)
    torch.testing.assert_close(fxc.load(tmp_path / "net.fxc")(x), model(x))
    for file, message in (
        ("shape", "size mismatch for"),
        ("names", "bias is missing, weight is missing, 0.bias is unknown"),
        ("broken", "does not fit"),
        ("rihgt", "did you mean right.safetensors?"),
    ):
        result = run("compile", "models.py:instance", "-i", "2x4", "--checkpoint", f"{file}.safetensors")
        assert (result.code, message in result.told) == (2, True), result.err


def test_exported_program(run: Callable[..., Result], tmp_path: Path) -> None:
    program = torch.export.export(nn.Linear(4, 2).eval(), (torch.randn(2, 4),))
    torch.export.save(program, tmp_path / "net.pt2")
    result = run("inspect", "net.pt2", "--json")
    assert result.code == 0, result.err
    assert result.json["total"]["macs"] == 2 * 8  # its batch is fixed
    (tmp_path / "torn.pt2").write_bytes((tmp_path / "net.pt2").read_bytes()[:100])
    result = run("inspect", "torn.pt2")
    assert (result.code, "cannot read this file" in result.told) == (2, True)


# -- inspect, benchmark, report, lists ---------------------------------------------------------------------------


def test_inspect_a_model(run: Callable[..., Result]) -> None:
    result = run("inspect", "models.py:build")
    assert result.code == 0, result.err
    assert "graph(image: f32[batch, 3, 8, 8])" in result.out
    told = run("inspect", "models.py:build", "--json", "--batch", "2").json
    assert told["layers"][0] == {"kind": "Conv2d", "count": 1, "macs": 2 * 27 * 4 * 36, "parameters": 108, "bytes": 432}
    assert told["total"]["macs"] == 2 * 27 * 4 * 36
    assert told["graph"].startswith("graph(")


def test_inspect_without_inputs(run: Callable[..., Result]) -> None:
    result = run("inspect", "models.py:Net", "--no-graph")
    assert result.code == 0, result.err
    assert "--input" in result.out


def test_inspect_a_bundle(run: Callable[..., Result], bundle: Path) -> None:
    result = run("inspect", str(bundle))
    assert result.code == 0, result.err
    for part in ("onnxruntime engine", "float32[batch, 3, 8, 8]", "fuse_modules", "model.onnx", "relative_error"):
        assert part in result.out
    assert run("inspect", str(bundle), "--json").json["manifest"]["kind"] == "engine"


def test_benchmark(run: Callable[..., Result], bundle: Path) -> None:
    threads = torch.get_num_threads()
    arguments = [
        str(bundle),
        "models.py:build",
        str(bundle),
        "-n",
        "3",
        "--warmup",
        "1",
        "--threads",
        "1",
        "--batch",
        "3",
    ]
    result = run("benchmark", *arguments, "--json")
    assert result.code == 0, result.err
    told = result.json
    assert [timing["name"] for timing in told["timings"]] == [str(bundle), "models.py:build", f"{bundle} #2"]
    assert list(told["kinds"].values()) == ["onnxruntime engine", "eager PyTorch", "onnxruntime engine"]
    assert (told["batch"], told["threads"], told["repetitions"]) == (3, 1, 3)
    assert torch.get_num_threads() == threads
    memory = told["memory"]
    assert list(memory) == [timing["name"] for timing in told["timings"]]
    assert all(
        found["problem"] or 0 < found["resident"] <= found["peak"] < found["process"] for found in memory.values()
    )
    result = run("benchmark", *arguments, "--no-memory")
    assert "median ms" in result.out and "whole process" not in result.out
    assert run("benchmark", *arguments, "--no-memory", "--json").json["memory"] == {}


def test_memory_that_cannot_be_measured_is_told(
    run: Callable[..., Result], bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fxcompress.cli.footprint", lambda *_, **__: Footprint(problem="the process died"))
    result = run("benchmark", str(bundle), "-n", "2")
    assert result.code == 0 and "not measured: the process died" in result.out


def test_options_of_engines_that_are_benchmarked(run: Callable[..., Result], bundle: Path) -> None:
    result = run("benchmark", str(bundle), "-n", "2", "--no-memory", "-B", "optimization_level=basic")
    assert result.code == 0, result.told
    result = run("benchmark", str(bundle), "-B", "optimisation_level=basic")
    assert result.code == 2 and "no engine here can be loaded with an option" in result.told
    assert "optimization_level" in result.told
    assert "no such file" in run("benchmark", "nothing.bundle", "-B", "threads=1").told
    assert "none is among these" in run("benchmark", "models.py:build", "-B", "threads=1").told


def test_benchmark_of_what_does_not_fit(run: Callable[..., Result], bundle: Path) -> None:
    result = run("benchmark", str(bundle), "models.py:instance", "-n", "2")
    assert (result.code, "does not take inputs of shape [1, 3, 8, 8]" in result.told) == (2, True), result.err
    assert run("benchmark", "models.py:instance").told.count("--input") == 1
    arguments = ["models.py:instance", "-i", "5x4", "-n", "2", "--no-memory", "--json"]
    assert run("benchmark", *arguments).json["batch"] == 5


def test_report(run: Callable[..., Result], tmp_path: Path, bundle: Path) -> None:
    assert run("compile", "models.py:build", "-p", "fuse_modules", "-o", "net.fxc", "--report", "r.json").code == 0
    for source in ("net.fxc", "r.json"):
        result = run("report", source)
        assert (result.code, "fuse_modules" in result.out) == (0, True), result.err
    assert run("report", "r.json", "--json").json == json.loads((tmp_path / "r.json").read_text())
    assert "keep the report" in run("report", str(bundle)).told
    (tmp_path / "r.json").write_text("{}")
    assert run("report", "r.json").code == 2


@pytest.mark.skipif(find_spec("jinja2") is None, reason="needs Jinja2")
def test_report_as_a_page(run: Callable[..., Result], tmp_path: Path) -> None:
    result = run("compile", "models.py:build", "-p", "fuse_modules", "--report", "r.html", "--report", "r.json")
    assert result.code == 0, result.err
    assert run("report", "r.json", "--html", "s.html").code == 0
    for page in ("r.html", "s.html"):
        assert "fuse_modules" in (tmp_path / page).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("command", "name", "option"), [("passes", "fuse_modules", "ignore"), ("backends", "onnxruntime", "threads")]
)
def test_lists(command: str, name: str, option: str, run: Callable[..., Result]) -> None:
    assert name in run(command).out
    [entry] = [entry for entry in run(command, "--json").json if entry["name"] == name]
    assert option in [item["name"] for item in entry["options"]]
    assert entry["summary"]


def test_version_and_help(run: Callable[..., Result]) -> None:
    assert run("--version").out == f"fxcompress {fxc.__version__}\n"
    for arguments in (["--help"], ["compile", "-h"], ["inspect", "-h"], ["benchmark", "-h"], ["report", "-h"]):
        result = run(*arguments)
        assert (result.code, "Usage" in result.out) == (0, True)


# -- what goes wrong ---------------------------------------------------------------------------------------------

LINE = MODELS.splitlines().index('    raise ValueError("no such luck")') + 1
WRONG: dict[str, tuple[list[str], int, str]] = {
    "no model": (["compile"], 2, "name one: torchvision:NAME"),
    "no prefix": (["compile", "resnet50"], 2, "did you mean torchvision:resnet50"),
    "a misspelt prefix": (["compile", "torchvison:resnet50"], 2, "did you mean torchvision:resnet50"),
    "an unknown prefix": (["compile", "keras:resnet50"], 2, "known forms"),
    "no such file": (["compile", "model.py:build"], 2, "did you mean models.py"),
    "no such directory": (["inspect", "./nowhere/net.fxc"], 2, "not there either"),
    "no function": (["compile", "models.py"], 2, "write models.py:Net, models.py:build"),
    "a misspelt function": (["compile", "models.py:biuld"], 2, "did you mean build"),
    "a function that fails": (["compile", "models.py:broken"], 2, f"models.py:{LINE}"),
    "a function of nothing": (["compile", "models.py:wrong"], 2, "returned a int"),
    "no function at all": (["compile", "models.py:number"], 2, "is a int"),
    "weights for a model": (["compile", "weights.pth"], 2, "--checkpoint"),
    "an ONNX file": (["compile", "model.onnx"], 2, "exported from"),
    "branches on data": (["compile", "models.py:branches"], 1, "return x if x.sum() > 0 else -x"),
    "an unknown pass": (["compile", "models.py:build", "-p", "fuse_module"], 2, "did you mean 'fuse_modules'"),
    "an unknown backend": (["compile", "models.py:build", "-b", "onnxrutime"], 2, "did you mean 'onnxruntime'"),
    "an engine without a place": (["compile", "models.py:build", "-b", "onnx"], 2, "add --output"),
    "an engine without shapes": (["compile", "models.py:Net", "-b", "onnx", "-o", "x"], 2, "--input 1x3x224x224"),
    "inputs that do not fit": (["compile", "models.py:Net", "-i", "2x5x8x8"], 2, "3 channels"),
    "malformed inputs": (["compile", "models.py:Net", "-i", "2by3"], 2, "[NAME=]SHAPE[:DTYPE]"),
    "a malformed option": (["compile", "models.py:build", "-b", "onnx", "-B", "threads"], 2, "NAME=VALUE"),
    "an occupied output": (["compile", "models.py:build", "-o", "."], 1, "not empty"),
    "a report of another kind": (["compile", "models.py:build", "--report", "r.txt"], 2, ".json or .html"),
    "a report nowhere": (["compile", "models.py:build", "--report", "x/r.json"], 2, "directory is not there"),
    "an unpickled checkpoint": (["compile", "models.py:build", "--checkpoint", "w.pth"], 2, "safetensors"),
    "no recipe": (["compile", "-r", "recipe.yaml"], 2, "no such recipe"),
    "nothing to measure": (["benchmark", "models.py:instance"], 2, "--input"),
    "an unknown option": (["compile", "models.py:build", "--bakend", "onnx"], 2, "--bakend"),
    "an unknown command": (["compres", "models.py:build"], 2, "compres"),
}


@pytest.mark.parametrize("what", WRONG)
def test_errors_are_panels_or_json(what: str, run: Callable[..., Result], tmp_path: Path) -> None:
    arguments, code, message = WRONG[what]
    result = run(*arguments)
    assert result.code == code
    assert message in result.told
    assert result.out == ""
    assert "Traceback" not in result.err
    result = run(*arguments, "--json")
    assert result.code == code
    error = result.json["error"]
    assert set(error) == {"type", "problem", "where", "remedy"}
    assert message in " ".join(str(part) for part in error.values())
    assert written(tmp_path) == set()


def test_mistakes_of_ours_are_told_as_such(run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError("oops")

    monkeypatch.setattr("fxcompress.cli.load_model", fail)
    result = run("compile", "models.py:build")
    assert (result.code, "unexpected ZeroDivisionError: oops" in result.told, "--debug" in result.told) == (
        1,
        True,
        True,
    )
    with pytest.raises(ZeroDivisionError):
        run("compile", "models.py:build", "--debug")


def test_as_a_program(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fxcompress", "inspect", str(tmp_path), "--json"],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).resolve().parents[1],
    )
    assert done.returncode == 2
    assert json.loads(done.stdout)["error"]["type"] == "PreconditionError"
    assert "Traceback" not in done.stderr


# -- the zoos ----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(find_spec("torchvision") is None, reason="needs torchvision")
def test_torchvision(run: Callable[..., Result]) -> None:
    result = run("inspect", "torchvision:squeezenet1_1@num_classes=10", "--no-graph")
    assert result.code == 0, result.err
    assert "random weights" in result.out
    first, second = (load_model("torchvision:squeezenet1_1").model.state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    for spec, message in (
        ("squeezenet1_2", "did you mean squeezenet1_"),
        ("squeezenet1_1@clases=3", "clases"),
        ("squeezenet1_1@3", "NAME=VALUE"),
    ):
        result = run("inspect", f"torchvision:{spec}")
        assert (result.code, message in result.told) == (2, True), result.err


@pytest.mark.skipif(find_spec("timm") is None, reason="needs timm")
def test_timm(run: Callable[..., Result]) -> None:
    result = run("inspect", "timm:test_resnet", "--json")
    assert result.code == 0, result.err
    assert result.json["graph"].startswith("graph(x: f32[batch, 3, 160, 160])")
    result = run("inspect", "timm:test_resnett")
    assert (result.code, "did you mean test_resnet" in result.told) == (2, True)


@pytest.mark.skipif(find_spec("transformers") is None, reason="needs transformers")
def test_transformers(run: Callable[..., Result], tmp_path: Path) -> None:
    config = {
        "model_type": "bert", "architectures": ["BertForSequenceClassification"], "vocab_size": 50, "hidden_size": 8,
        "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "max_position_embeddings": 32,
    }  # fmt: skip
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text(json.dumps(config))
    result = run("inspect", "hf:bert", "--json")
    assert result.code == 0, result.err
    assert result.json["weights"] == "random weights"
    assert "logits=" in result.json["graph"]
    source = load_model("hf:bert")
    assert source.model.config.vocab_size == 50
    source.model.save_pretrained(tmp_path / "trained")
    assert load_model("hf:trained").weights == "weights of trained"
    assert "write hf:bert" in run("inspect", "bert").told
    assert "did you mean bert" in run("inspect", "hf:bertt").told
