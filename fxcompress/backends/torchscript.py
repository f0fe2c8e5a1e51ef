"""Engines that run PyTorch's own operations from one file, in Python or C++: graph → TorchScript."""

from __future__ import annotations

import re
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import fx

from fxcompress.backends.base import Backend, BuildContext, Signature
from fxcompress.backends.bundle import Manifest
from fxcompress.backends.engine import Engine
from fxcompress.backends.flat_program import flat_program
from fxcompress.backends.tensors import Array, Native
from fxcompress.backends.torchscript_graph import script_graph
from fxcompress.errors import BackendError, BundleError, OptionError

__all__ = ["MODEL_FILE", "TorchScript", "TorchScriptEngine"]

MODEL_FILE = "model.ts"

# What a program of operations on tensors has no need of: code that runs while it is loaded, and the file system.
_SUSPECT = re.compile(rb"__setstate__|\bfrom_file\b|\btorch\.save\b|\bops\.(?!aten\.|prim\.NumToTensor\b)[\w.]+")


@dataclass(frozen=True)
class TorchScript(Backend):
    """Lower to TorchScript, which loads with ``torch.jit.load`` without the model's code, in Python and in C++.

    Attributes:
        freeze: when the engine is loaded, fold what depends on weights alone: batch norm into convolutions, say. The
            file stays as it is, so weights that are stored as small integers stay small.
        optimize: run ``torch.jit.optimize_for_inference`` when the engine is loaded: operators fused and weights laid
            out for this machine's processor.

    Raises:
        OptionError: an option is of the wrong type, or ``optimize`` without ``freeze``.
    """

    name: ClassVar[str] = "torchscript"
    packages: ClassVar[tuple[str, ...]] = ("torch",)

    freeze: bool = True
    optimize: bool = False

    def __post_init__(self) -> None:
        for option in ("freeze", "optimize"):
            value = getattr(self, option)
            if not isinstance(value, bool):
                raise OptionError(
                    f"option {option} is {value!r}", where=f"TorchScript.{option}", remedy="give True or False"
                )
        if self.optimize and not self.freeze:
            raise OptionError(
                "optimize_for_inference works on frozen programs only",
                where="TorchScript.optimize",
                remedy="leave freeze at True",
            )

    def write(self, graph_module: fx.GraphModule, directory: Path, signature: Signature, context: BuildContext) -> None:
        context.progress("translate to TorchScript")
        graph = script_graph(flat_program(graph_module))
        with _without_deprecation():
            function: Any = torch._C._create_function_from_graph("forward", graph)
            program = function.save_to_buffer()  # its save() aborts Python where the disk is full
        (directory / MODEL_FILE).write_bytes(program)

    @classmethod
    def load(cls, path: Path, manifest: Manifest, **overrides: Any) -> TorchScriptEngine:
        return TorchScriptEngine(path, manifest, cls.from_manifest(manifest, overrides))


class TorchScriptEngine(Engine):
    """A model as a TorchScript module, run on the CPU.

    Args:
        path: the bundle's directory, with ``model.ts`` in it.
        manifest: of the bundle.
        backend: the options in force.

    Attributes:
        module: the ``torch.jit.ScriptModule``; called with flat tensors, it gives a tuple.
        backend: the options in force.

    Raises:
        BundleError: the program asks for more than operations on tensors.
        BackendError: torch refuses the file.
    """

    native: ClassVar[Native] = "torch"

    def __init__(self, path: Path, manifest: Manifest, backend: TorchScript) -> None:
        super().__init__(path, manifest)
        self.backend = backend
        file = self.path / MODEL_FILE
        _check_program(file)
        try:
            with _without_deprecation():
                self.module = torch.jit.load(str(file), map_location="cpu").eval()
                if backend.freeze:
                    self.module = torch.jit.freeze(self.module)
                if backend.optimize:
                    self.module = torch.jit.optimize_for_inference(self.module)
        except (RuntimeError, ValueError, OSError) as error:
            raise BackendError(
                f"torch cannot load the TorchScript program: {_last_line(error)}",
                where=str(file),
                remedy=f"this is torch {torch.__version__}; the program may need a newer one, or be built anew",
            ) from error
        self._constant = _constant_outputs(self.module.graph)

    def _execute(self, inputs: list[Array]) -> Sequence[Array]:
        try:
            with torch.no_grad():
                outputs = list(self.module(*inputs))
                for index in self._constant:
                    outputs[index] = outputs[index].clone()
                return outputs
        except (RuntimeError, IndexError, ValueError) as error:
            raise BackendError(
                f"TorchScript failed: {_last_line(error)}",
                where=str(self.path),
                remedy="the inputs' sizes may be too small for the model, or memory may be short",
            ) from error

    def _release(self) -> None:
        del self.module


def _constant_outputs(graph: Any) -> list[int]:
    """Outputs that are constants of the program, where freezing has made one of a copy: the caller gets copies."""
    (result,) = graph.outputs()
    if result.node().kind() == "prim::Constant":
        return list(range(len(result.type().elements())))
    return [index for index, part in enumerate(result.node().inputs()) if part.node().kind() == "prim::Constant"]


def _check_program(file: Path) -> None:
    """Refuse a program that could do more than compute: TorchScript has operations that write files."""
    try:
        with zipfile.ZipFile(file) as archive:
            texts = {name: archive.read(name) for name in archive.namelist() if name.endswith(".py")}
    except (zipfile.BadZipFile, OSError, KeyError) as error:
        raise BackendError(
            f"this is no TorchScript program: {error}", where=str(file), remedy="build the bundle anew"
        ) from error
    for name, text in texts.items():
        found = _SUSPECT.search(text)
        if found is not None:
            raise BundleError(
                f"the program uses {found[0].decode()!r} in {name}, which a model has no need of",
                where=str(file),
                remedy="do not use this bundle unless you know who made it, and then load it with torch.jit.load",
            )


@contextmanager
def _without_deprecation() -> Iterator[None]:
    """Torch tells at each step that TorchScript is deprecated; who chose this backend knows."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"`torch\.jit\.\w+` is deprecated", DeprecationWarning)
        yield


def _last_line(error: Exception) -> str:
    """TorchScript prints its own trace first, and then what is wrong."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else repr(error)
