"""Calls of TensorRT, held against its type stubs, so that they are right for a library that is not installed here.

The stubs are the ``tensorrt-stubs`` distribution. It asks for TensorRT itself, so ``make`` unpacks it by itself, into
``.venv/stubs``, where nothing imports it by mistake; ``FXCOMPRESS_TENSORRT_STUBS`` names another folder.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
STUBS = Path(os.environ.get("FXCOMPRESS_TENSORRT_STUBS", ROOT / ".venv" / "stubs"))
BACKENDS = ROOT / "fxcompress" / "backends"
CHECKED = ("tensorrt_build.py", "tensorrt_engine.py")
PROGRAMS = ("build_engine.py", "run_engine.py")  # of a device, which import each other from their own folder
SETTINGS = """
[mypy]
python_version = 3.11
mypy_path = {stubs}
check_untyped_defs = True
disallow_untyped_defs = True
follow_imports = silent

[mypy-tensorrt_bindings.*]
ignore_errors = True

[mypy-tensorrt_libs.*,tensorrt_rtx.*,onnx.*,onnxruntime.*,onnxsim.*]
ignore_missing_imports = True
follow_imports = skip

[mypy-torch.*]
implicit_reexport = True
"""


def repaired(stubs: Path, folder: Path) -> Path:
    """A copy that mypy can read: the generator left C++ values as defaults, and a keyword as an argument's name."""
    for name in ("tensorrt", "tensorrt_bindings"):
        shutil.copytree(stubs / name, folder / name)
    path = folder / "tensorrt_bindings" / "tensorrt.pyi"
    text = re.sub(r"= <[^>\n]*>", "= ...", path.read_text())
    text = re.sub(r"\bin: ", "in_: ", text)
    text = re.sub(r"(def add_scale_nd\(.*channel_axis: int)\)", r"\1 = ...)", text)
    path.write_text(text)
    return folder


@pytest.mark.slow
@pytest.mark.skipif(not (STUBS / "tensorrt").is_dir(), reason="needs tensorrt-stubs in .venv/stubs")
@pytest.mark.skipif(importlib.util.find_spec("mypy") is None, reason="needs mypy")
def test_calls_fit_the_stubs(tmp_path: Path) -> None:
    settings = tmp_path / "mypy.ini"
    settings.write_text(SETTINGS.format(stubs=repaired(STUBS, tmp_path / "stubs")))
    device = Path(shutil.copytree(BACKENDS / "device", tmp_path / "device"))
    command = [sys.executable, "-m", "mypy", "--config-file", str(settings), "--cache-dir", str(tmp_path / "cache")]

    def check() -> str:
        told = ""
        for folder, files in ((ROOT, [f"fxcompress/backends/{name}" for name in CHECKED]), (device, PROGRAMS)):
            done = subprocess.run([*command, *files], cwd=folder, capture_output=True, text=True, check=False)
            told += "".join(line for line in done.stdout.splitlines(keepends=True) if line.startswith(tuple(files)))
        return told

    assert check() == ""
    # And that something was checked at all: a stub without a method that is called is noticed.
    stub = tmp_path / "stubs" / "tensorrt_bindings" / "tensorrt.pyi"
    text = stub.read_text().replace("def execute_async_v3(", "def execute_async_v4(")
    stub.write_text(text.replace("def add_optimization_profile(", "def add_profile("))
    told = check().splitlines()
    for name, call in zip(CHECKED + PROGRAMS, ("add_optimization_profile", "execute_async_v3") * 2, strict=True):
        assert any(name in line and call in line for line in told), told
