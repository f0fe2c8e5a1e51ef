"""``load_model("torchvision:resnet50")``: one entry for all kinds of specs; files are read here."""

from __future__ import annotations

import ast
import difflib
import importlib.util
import re
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from fxcompress.backends.bundle import MANIFEST, read_manifest
from fxcompress.backends.sampling import random_inputs
from fxcompress.capture.inputs import ExampleInputs, example_inputs
from fxcompress.compiled import load
from fxcompress.errors import OptionError, PreconditionError
from fxcompress.model_specs.source import ModelSource, first_line, similar_file, suggestion
from fxcompress.model_specs.zoos import ZOOS

__all__ = ["SPEC_FORMS", "load_model"]

SPEC_FORMS = (
    "torchvision:NAME, timm:NAME, hf:NAME_OR_DIR, FILE.py:FUNCTION, FILE.pt2, or the directory of a saved graph"
)


def load_model(spec: str) -> ModelSource:
    """Make or load the model that ``spec`` names.

    Raises:
        OptionError: the spec is malformed, or names a model or function that is not there; the nearest is suggested.
        PreconditionError: a file or package is missing, or the model's own code failed.
        BundleError: a saved graph is damaged.
    """
    file, colon, function = spec.rpartition(":")
    if spec.endswith(".py") or (colon and file.endswith(".py")):
        return _from_file(spec, Path(file if colon and not spec.endswith(".py") else spec), function if colon else "")
    prefix, colon, rest = spec.partition(":")
    if colon and prefix in ZOOS:
        name, _, told = rest.partition("@")
        return ZOOS[prefix](spec, name, _options(told, spec))
    path = Path(spec)
    if path.is_dir():
        return _saved_graph(spec, path)
    if path.suffix == ".pt2":
        return _exported_program(spec, path)
    raise _unknown(spec, path, prefix if colon else "")


def _from_file(spec: str, path: Path, function: str) -> ModelSource:
    if not path.is_file():
        raise PreconditionError("there is no such file", where=str(path), remedy=similar_file(path))
    source = path.read_text(encoding="utf-8")
    try:
        body = ast.parse(source, str(path)).body
    except SyntaxError as error:
        raise PreconditionError(
            f"the file is no Python: {error.msg}", where=f"{path}:{error.lineno}", remedy="repair it"
        ) from error
    defined = [item.name for item in body if isinstance(item, (ast.FunctionDef, ast.ClassDef)) and item.name[0] != "_"]
    if not function:
        told = ", ".join(f"{path}:{name}" for name in defined[:4]) or f"{path}:FUNCTION"
        raise OptionError("which function of the file makes the model?", where=spec, remedy=f"write {told}")
    directory = str(path.resolve().parent)
    if directory not in sys.path:
        sys.path.insert(0, directory)  # as Python does for a script, for what lies beside the file
    module_spec = importlib.util.spec_from_file_location(f"_fxcompress_{path.stem}", path)
    assert module_spec is not None and module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_spec.name] = module
    loader = module_spec.loader
    _called(path, "the file cannot be imported", lambda: loader.exec_module(module))
    factory = getattr(module, function, None)
    if factory is None:
        raise OptionError(
            f"there is no {function!r} in {path.name}",
            where=spec,
            remedy=suggestion(function, defined, "its functions"),
        )
    made = factory
    if not isinstance(factory, nn.Module):
        if not callable(factory):
            raise OptionError(f"{function!r} is a {type(factory).__name__}, not a function", where=spec)
        made = _called(path, f"{function}() failed", factory)
    model, inputs = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(model, (nn.Module, ExportedProgram)):
        raise PreconditionError(
            f"{function}() returned a {type(made).__name__}",
            where=spec,
            remedy="return a torch.nn.Module, or (module, example_inputs)",
        )
    if isinstance(model, nn.Module):
        model.eval()
    return ModelSource(
        spec,
        re.sub(r"\W", "_", function),
        model,
        example_inputs(inputs) if inputs is not None else None,
        f"weights of {function}()",
    )


def _saved_graph(spec: str, path: Path) -> ModelSource:
    if not (path / MANIFEST).exists():
        hint = f"write hf:{spec}" if (path / "config.json").exists() else f"known forms: {SPEC_FORMS}"
        raise PreconditionError("this directory is no saved graph", where=str(path), remedy=hint)
    compiled = load(path)
    manifest = read_manifest(path)
    leaves = random_inputs(manifest.inputs, batch=2)
    args, kwargs = manifest.input_structure.unflatten(leaves)
    return ModelSource(
        spec, path.name, compiled, ExampleInputs(tuple(args), dict(kwargs)), "weights of the saved graph"
    )


def _exported_program(spec: str, path: Path) -> ModelSource:
    if not path.is_file():
        raise PreconditionError("there is no such file", where=str(path), remedy=similar_file(path))
    try:
        program = torch.export.load(path)
    except Exception as error:  # torch raises whatever its reader meets
        raise PreconditionError(
            f"torch.export cannot read this file: {first_line(error)}",
            where=str(path),
            remedy="write it with torch.export.save, of a torch no newer than this one",
        ) from error
    given = program.example_inputs
    inputs = ExampleInputs(tuple(given[0]), dict(given[1])) if given is not None else None
    return ModelSource(spec, path.stem, program, inputs, "weights of the file")


def _called(path: Path, problem: str, function: Callable[[], Any]) -> Any:
    """Run the user's code; what it raises is told with its line."""
    try:
        return function()
    except (Exception, SystemExit) as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename) == path]
        raise PreconditionError(
            f"{problem}: {type(error).__name__}: {first_line(error)}",
            where=f"{path}:{lines[-1]}" if lines else str(path),
            remedy="repair it; --debug shows the whole traceback",
        ) from error


def _unknown(spec: str, path: Path, prefix: str) -> OptionError:
    if prefix:
        close = difflib.get_close_matches(prefix, ZOOS, n=1, cutoff=0.5)
        if close:
            return OptionError(
                f"there is no model zoo {prefix!r}",
                where=spec,
                remedy=f"did you mean {close[0]}:{spec.partition(':')[2]}? known forms: {SPEC_FORMS}",
            )
    elif path.suffix in (".pt", ".pth", ".bin", ".ckpt", ".safetensors"):
        return OptionError(
            "this file holds weights without the model they belong to",
            where=spec,
            remedy="name the model, FILE.py:FUNCTION, and give its weights with --checkpoint weights.safetensors",
        )
    elif path.suffix == ".onnx":
        return OptionError(
            "an ONNX file is no PyTorch model", where=spec, remedy="give the model that it was exported from"
        )
    elif re.fullmatch(r"[\w.-]+", spec) and not path.suffix:
        return OptionError(
            f"{spec!r} is neither a directory nor a model",
            where="MODEL",
            remedy=f"did you mean torchvision:{spec} or timm:{spec}? known forms: {SPEC_FORMS}",
        )
    return OptionError(f"{spec!r} names no model", where="MODEL", remedy=f"known forms: {SPEC_FORMS}")
