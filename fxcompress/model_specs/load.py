"""``load_model("torchvision:resnet50")``: one entry for all kinds of specs; files are read here."""

from __future__ import annotations

import ast
import difflib
import importlib.util
import inspect
import re
import sys
import traceback
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from types import ModuleType
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
from fxcompress.options import parse_options

__all__ = ["SPEC_FORMS", "load_model", "load_value"]

SPEC_FORMS = "torchvision:NAME, timm:NAME, hf:NAME, FILE.py:FUNCTION, FILE.pt2, or the directory of a saved graph"


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
        return ZOOS[prefix](spec, name, parse_options(filter(None, told.split(",")), where=spec))
    path = Path(spec)
    if path.is_dir():
        return _saved_graph(spec, path)
    if path.suffix == ".pt2":
        return _exported_program(spec, path)
    raise _unknown(spec, path, prefix if colon else "")


def load_value(spec: str) -> Any:
    """What ``file.py:name`` means as an option: what a function without arguments returns, or the value itself.

    A function that takes arguments, such as a loss, is handed over as it is.

    Raises:
        OptionError: the file does not define the name; the nearest is suggested.
        PreconditionError: there is no such file, or its code failed.
    """
    file, _, name = spec.rpartition(":")
    path = Path(file)
    defined = _public_names(path)
    module = _imported_once(path.resolve(), path.stat().st_mtime_ns)
    if not hasattr(module, name):
        raise OptionError(
            f"there is no {name!r} in {path.name}", where=spec, remedy=suggestion(name, defined, "its functions")
        )
    value = getattr(module, name)
    if not callable(value) or _takes_arguments(value):
        return value
    return _called(path, f"{name}() failed", value)


@cache
def _imported_once(path: Path, changed_at: int) -> ModuleType:
    """The values of one recipe are of one module: what a function keeps it keeps for all of them."""
    return _import_file(path)


def _takes_arguments(function: Callable[..., Any]) -> bool:
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    told = inspect.signature(function).parameters.values()
    return any(parameter.kind in kinds and parameter.default is parameter.empty for parameter in told)


def _from_file(spec: str, path: Path, function: str) -> ModelSource:
    defined = _public_names(path)
    if not function:
        told = ", ".join(f"{path}:{name}" for name in defined[:4]) or f"{path}:FUNCTION"
        raise OptionError("which function of the file makes the model?", where=spec, remedy=f"write {told}")
    factory = getattr(_import_file(path), function, None)
    if factory is None:
        remedy = suggestion(function, defined, "its functions")
        raise OptionError(f"there is no {function!r} in {path.name}", where=spec, remedy=remedy)
    made = factory
    if not isinstance(factory, nn.Module):
        if not callable(factory):
            raise OptionError(f"{function!r} is a {type(factory).__name__}, not a function", where=spec)
        made = _called(path, f"{function}() failed", factory)
    model, inputs = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if isinstance(model, nn.Module):
        model.eval()
    elif not isinstance(model, ExportedProgram):
        raise PreconditionError(
            f"{function}() returned a {type(made).__name__}",
            where=spec,
            remedy="return a torch.nn.Module, or (module, example_inputs)",
        )
    given = example_inputs(inputs) if inputs is not None else None
    return ModelSource(spec, function, model, given, f"weights of {function}()")


def _public_names(path: Path) -> list[str]:
    """Functions and classes of a Python file, without running it."""
    if not path.is_file():
        raise PreconditionError("there is no such file", where=str(path), remedy=similar_file(path))
    try:
        body = ast.parse(path.read_bytes(), str(path)).body
    except (OSError, SyntaxError, ValueError) as error:
        line = getattr(error, "lineno", None)
        raise PreconditionError(
            f"the file cannot be read as Python: {first_line(error)}",
            where=f"{path}:{line}" if line else str(path),
            remedy="repair it",
        ) from error
    return [item.name for item in body if isinstance(item, (ast.FunctionDef, ast.ClassDef)) and item.name[0] != "_"]


def _import_file(path: Path) -> ModuleType:
    directory = str(path.resolve().parent)
    if directory not in sys.path:
        sys.path.insert(0, directory)  # as Python does for a script, for what lies beside the file
    spec = importlib.util.spec_from_file_location(f"_fxcompress_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    _called(path, "the file cannot be imported", partial(spec.loader.exec_module, module))
    return module


def _saved_graph(spec: str, path: Path) -> ModelSource:
    if not (path / MANIFEST).exists():
        hint = f"write hf:{spec}" if (path / "config.json").exists() else f"known forms: {SPEC_FORMS}"
        raise PreconditionError("this directory is no saved graph", where=str(path), remedy=hint)
    compiled = load(path)
    manifest = read_manifest(path)
    args, kwargs = manifest.input_structure.unflatten(random_inputs(manifest.inputs, batch=2))
    inputs = ExampleInputs(tuple(args), dict(kwargs))
    return ModelSource(spec, path.name, compiled, inputs, "weights of the saved graph")


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
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if Path(frame.filename).resolve() == path.resolve()]
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
    elif path.is_file():
        return OptionError("this file holds no model", where=spec, remedy=f"known forms: {SPEC_FORMS}")
    elif path.suffix or len(path.parts) > 1:
        return OptionError("there is no such file or directory", where=spec, remedy=similar_file(path))
    return OptionError(f"{spec!r} names no model", where="MODEL", remedy=f"known forms: {SPEC_FORMS}")
