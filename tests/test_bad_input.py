"""What a user gets wrong beyond one call of ``compile()``: each is told what, where, and what to do; nothing is left.

The single arguments of ``compile()`` are in ``test_compile.py``, those of capture in ``capture/test_bad_input.py``, the
command's in ``test_cli.py``.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxcompress as fxc
from fxcompress.backends import tensorrt_library
from fxcompress.cli import main
from fxcompress.errors import (
    BackendError,
    BundleError,
    CaptureError,
    FxCompressError,
    OptionError,
    PreconditionError,
)
from fxcompress.recipes import read_recipe

T = torch.Tensor
X = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))


def refused(kind: type[FxCompressError], match: str, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    with pytest.raises(kind, match=match) as caught:
        function(*args, **options)
    assert caught.value.remedy, "an error says what to do"
    return caught.value


class Mean(nn.Module):
    """Divides by sizes, which the graph holds as numbers where they are fixed."""

    def forward(self, x: T, y: T | None = None) -> T:
        mean = x.sum(1) / x.shape[1]
        return mean if y is None else mean + y.sum() / y.shape[0]


# -- wrong numbers without an error ------------------------------------------------------------------------------


def test_a_call_with_other_sizes_than_the_graph_has() -> None:
    compiled = fxc.compile(Mean().eval(), [], (X,))
    assert torch.equal(compiled(X[:1]), Mean()(X[:1]))
    error = refused(PreconditionError, r"x of shape \[batch, 4\], this call gives \[2, 3\]", compiled, X[:, :3])
    assert "dim 1 is fixed" in error.problem and "dynamic_shapes" in error.remedy
    refused(PreconditionError, "number of dims", compiled, X[0])
    free = fxc.compile(Mean().eval(), [], (X,), dynamic_shapes={"x": {0: "batch", 1: "length"}})
    torch.testing.assert_close(free(X[:, :3]), Mean()(X[:, :3]))


def test_a_call_with_sizes_that_were_equal() -> None:
    compiled = fxc.compile(Mean().eval(), [], (X, X + 1), dynamic_shapes={"x": {0: "n"}, "y": {0: "n"}})
    torch.testing.assert_close(compiled(X, X), Mean()(X, X))
    refused(PreconditionError, "equal in dim 0", compiled, X, X[:1])


def test_one_tensor_for_two_arguments() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2, 4))

        def forward(self, x: T, y: T) -> T:
            return 2 * x + 3 * y * self.weight

    model = Two().eval()
    for inputs in ((X, X), (model.weight, X), (X, model.weight), {"x": X, "y": X}):
        compiled = fxc.compile(model, [], inputs, dynamic_shapes=None)
        torch.testing.assert_close(compiled(X, X + 1), model(X, X + 1))


class Even(nn.Module):
    """Down and up again: runs at even lengths only."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Conv1d(1, 2, 2, stride=2), nn.ConvTranspose1d(2, 1, 2, stride=2)

    def forward(self, x: T) -> T:
        return torch.cat([x, self.up(self.down(x))], 1)


def test_a_model_that_runs_at_some_sizes_only() -> None:
    wave = torch.randn(2, 1, 16, generator=torch.Generator().manual_seed(0))
    shapes = {"x": {0: "batch", 2: "time"}}
    compiled = fxc.compile(Even().eval(), [], (wave,), dynamic_shapes=shapes, backend="onnxruntime")
    assert list(compiled.report.capture.errors) == ["batch=2, time=16", "batch=4, time=32"]
    assert any("fails at batch=1, time=17" in note for note in compiled.report.capture.notes)
    assert compiled.report.engine is not None
    assert compiled.report.engine.verified == ["x[2, 1, 16]", "x[4, 1, 32]"]


# -- the model ---------------------------------------------------------------------------------------------------


def test_a_module_without_forward() -> None:
    for model in (nn.ModuleList([nn.Linear(4, 4)]), nn.ModuleDict(), nn.Module()):
        refused(PreconditionError, r"has no forward\(\)", fxc.compile, model.eval(), [], (X,))


def test_a_program_with_weights_that_are_not_finite() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).eval()
    model[1].running_var[0] = math.inf
    program = torch.export.export(model, (X,))
    assert refused(PreconditionError, "NaN or infinite", fxc.compile, program).where == "1.running_var"


def test_a_program_is_compared_too() -> None:
    program = torch.export.export(nn.Linear(4, 4).eval(), (X,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    assert fxc.compile(program).report.capture.errors == {"batch=2": 0.0, "batch=1": 0.0}
    refused(PreconditionError, "does not take these example inputs", fxc.compile, program, [], (X.double(),))


def test_the_line_that_fixes_a_size() -> None:
    class Baked(nn.Module):
        def forward(self, x: T) -> T:
            y = x * 2
            return y + torch.ones(2, 4)  # a batch of two

    error = refused(CaptureError, "dim 0 of x is always 2", fxc.compile, Baked().eval(), [], (X,))
    assert "a batch of two" in error.where and "x.shape[0]" in error.remedy
    error = refused(
        CaptureError,
        "dim 1 of input is always 4",
        fxc.compile,
        nn.Linear(4, 4).eval(),
        [],
        (X,),
        dynamic_shapes={"input": {1: "n"}},
    )
    assert error.where is None, "the line that calls compile() is not to blame"


def test_torch_is_quiet_where_capture_fails(capfd: pytest.CaptureFixture[str]) -> None:
    class Branches(nn.Module):
        def forward(self, x: T) -> T:
            return x if x.sum() > 0 else -x

    refused(CaptureError, "depend on the values", fxc.compile, Branches().eval(), [], (X,))
    assert capfd.readouterr() == ("", "")


# -- example inputs ----------------------------------------------------------------------------------------------


def test_empty_example_inputs() -> None:
    refused(PreconditionError, r"shape \[0, 4\] is empty", fxc.compile, nn.Linear(4, 4).eval(), [], (X[:0],))


def test_values_that_the_model_does_not_take() -> None:
    ids = torch.tensor([[1, 99]])
    refused(PreconditionError, "index out of range", fxc.compile, nn.Embedding(10, 4).eval(), [], (ids,))


def test_outputs_that_prove_nothing_are_noted() -> None:
    report = fxc.compile(nn.Linear(4, 4).eval(), ["fuse_modules"], (X * math.nan,)).report
    assert any("no finite value" in note for note in report.capture.notes)


# -- options -----------------------------------------------------------------------------------------------------

OPTIONS: dict[str, tuple[Callable[[], Any], str]] = {
    "of a pass": (lambda: fxc.passes.PruneChannels(ration=0.5), "no option 'ration'"),
    "of a backend": (lambda: fxc.backends.OnnxRuntime(thread=2), "no option 'thread'"),
    "that is missing": (lambda: fxc.compile(nn.Linear(4, 4).eval(), ["quantize"], (X,)), "needs the option 'data'"),
    "passes as a dict": (lambda: fxc.compile(nn.Linear(4, 4).eval(), {"fuse_modules": {}}, (X,)), "passes is a dict"),
    "a backend's class": (
        lambda: fxc.compile(nn.Linear(4, 4).eval(), [], (X,), backend=fxc.backends.OnnxRuntime),
        "a class: OnnxRuntime",
    ),
    "a backend's options as text": (
        lambda: fxc.compile(nn.Linear(4, 4).eval(), [], (X,), backend="onnxruntime(threads=2)"),
        "is no name",
    ),
    "an output that is no path": (lambda: fxc.compile(nn.Linear(4, 4).eval(), [], (X,), output=3), "output is 3"),
    "an empty output": (lambda: fxc.compile(nn.Linear(4, 4).eval(), [], (X,), output=""), "output is ''"),
    "a graph that is no path": (lambda: fxc.load(3), "path is 3"),
    "an engine that is no path": (lambda: fxc.load_engine(""), "path is ''"),
}


@pytest.mark.parametrize("what", OPTIONS)
def test_options(what: str) -> None:
    function, match = OPTIONS[what]
    error = refused(OptionError, match, function)
    assert "thread" not in match or "did you mean 'threads'" in error.remedy or "instance" in error.remedy


RECIPES: dict[str, tuple[str, type[FxCompressError], str, str | None]] = {
    "an unknown key": ("pases: [fuse_modules]", OptionError, "unknown key 'pases'", None),
    "broken YAML": ("passes: [fuse_modules", PreconditionError, "cannot be read", ":2"),
    "a key twice": ("model: a\npasses: []\nmodel: b", PreconditionError, "'model' comes twice", ":3"),
    "code": ("model: !!python/object/apply:os.getcwd []", PreconditionError, "cannot be read", ":1"),
    "no mapping": ("- fuse_modules", OptionError, "no mapping", None),
    "nothing": ("", OptionError, "no mapping", None),
    "passes that are no list": ("passes: 3", OptionError, "'passes' is 3", None),
    "options that are no mapping": ("passes: [{fuse_modules: 0.5}]", OptionError, "which names none", None),
    "options beside the pass": (
        "passes:\n - fuse_modules:\n   ignore: []",
        OptionError,
        "names 2 passes",
        None,
    ),
    "an unknown option": ("passes: [{fuse_modules: {ignor: []}}]", OptionError, "no option 'ignor'", None),
}


@pytest.mark.parametrize("what", RECIPES)
def test_recipes(what: str, tmp_path: Path) -> None:
    text, kind, match, line = RECIPES[what]
    path = tmp_path / "recipe.yaml"
    path.write_text(text + "\n")
    error = refused(kind, match, lambda: read_recipe(path).make_passes())
    assert line is None or error.where == f"{path}{line}"


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("broken.py", "import a_package_that_is_not_there\ndef net(): pass\n", "No module named"),
        ("broken.py", "def net(:\n", "cannot be read as Python"),
        ("broken.py", "raise SystemExit(3)\ndef net(): pass\n", "SystemExit"),
        ("broken.pt2", "no archive", "torch.export cannot read"),
        ("broken.json", "{}", "holds no model"),
    ],
)
def test_models_that_cannot_be_loaded(
    name: str, text: str, problem: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_text(text)
    spec = str(tmp_path / name) + (":net" if name.endswith(".py") else "")
    assert main(["compile", spec, "--json"]) == 2
    assert problem in capsys.readouterr().out


# -- disks and packages ------------------------------------------------------------------------------------------


@pytest.mark.skipif(os.name == "nt", reason="limits the size of files as POSIX does")
def test_a_full_disk(tmp_path: Path) -> None:
    """In a process of its own, whose files may not grow beyond 100 kB."""
    script = textwrap.dedent("""
        import os, resource, signal, torch, fxcompress as fxc
        from torch import nn
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        x = torch.randn(2, 300)
        compiled = fxc.compile(nn.Linear(300, 300).eval(), [], (x,))
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        def told(name, function):
            try:
                function()
            except fxc.errors.FxCompressError as error:
                print(name, type(error).__name__, bool(error.remedy))
        told("save", lambda: compiled.save("net.fxc"))
        for backend in ("onnxruntime", "torchscript", "torch_export"):
            told(backend, lambda: compiled.export(backend, f"{backend}.bundle"))
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100_000))
        told("report", lambda: compiled.report.save("report.json"))
        print(os.listdir("."))
    """)
    root = str(Path(__file__).parents[1])
    environment = os.environ | {"PYTHONPATH": root, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path.parent / "inductor")}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=tmp_path, env=environment
    )
    assert done.stdout.splitlines() == [
        "save BundleError True",
        "onnxruntime BackendError True",
        "torchscript BackendError True",
        "torch_export BackendError True",
        "report FxCompressError True",
        "[]",
    ], done.stderr


MISSING: dict[str, tuple[str, Callable[[Path], Any], type[FxCompressError], str]] = {
    "openvino": (
        "openvino",
        lambda path: fxc.compile(nn.Linear(4, 4).eval(), [], (X,), backend="openvino", output=path / "o"),
        BackendError,
        "fxcompress[openvino]",
    ),
    "tensorrt": (
        "tensorrt_rtx tensorrt",
        lambda path: fxc.compile(nn.Linear(4, 4).eval(), [], (X,), backend="tensorrt", output=path / "o"),
        BackendError,
        "fxcompress[tensorrt]",
    ),
    "accelerate": (
        "accelerate",
        lambda _: fxc.compile(
            nn.Linear(4, 4).eval(), [fxc.passes.FineTune([(X, torch.tensor([0, 1]))], epochs=1)], (X,)
        ),
        PreconditionError,
        "fxcompress[train]",
    ),
    "jinja2": (
        "jinja2",
        lambda path: fxc.compile(nn.Linear(4, 4).eval(), [], (X,)).report.save(path / "r.html"),
        PreconditionError,
        "fxcompress[report]",
    ),
}


@pytest.mark.parametrize("extra", MISSING)
def test_a_missing_extra(extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packages, function, kind, remedy = MISSING[extra]
    tensorrt_library._load.cache_clear()  # another test may have found it
    for package in packages.split():
        monkeypatch.setitem(sys.modules, package, None)  # what makes an import fail
    error = refused(kind, "install|librar", function, tmp_path)
    assert remedy in error.remedy
    assert list(tmp_path.iterdir()) == []


def test_damaged_manifest_options_say_what_to_do(tmp_path: Path) -> None:
    engine = fxc.compile(nn.Linear(4, 4).eval(), [], (X,), backend="onnxruntime", output=tmp_path / "e").engine
    assert engine is not None
    manifest = Path(engine.path) / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"threads"', '"treads"'))
    refused(BundleError, "no option 'treads'", fxc.load_engine, tmp_path / "e")


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64, torch.bool])
def test_a_graph_called_with_another_dtype(dtype: torch.dtype) -> None:
    graph = fxc.compile(nn.Linear(3, 2).eval(), example_inputs=(torch.randn(2, 3),), progress=False)
    with pytest.raises(PreconditionError, match=r"of torch\.float32, this call gives") as caught:
        graph(torch.ones(2, 3, dtype=dtype))
    assert "to(torch.float32)" in str(caught.value.remedy)
    graph.module.double()  # whoever brings the graph to a dtype may give it
    assert graph.module(torch.ones(2, 3, dtype=torch.float64)).dtype == torch.float64
