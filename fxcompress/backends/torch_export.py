"""Engines that are PyTorch's own exported programs, or native code made of them: graph → ``.pt2``."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import fx

from fxcompress.backends.base import Backend, BuildContext, Signature
from fxcompress.backends.bundle import Manifest
from fxcompress.backends.engine import Engine
from fxcompress.backends.flat_program import flat_program
from fxcompress.backends.pt2_check import check_pt2
from fxcompress.backends.tensors import Array, Native
from fxcompress.errors import BackendError, OptionError

__all__ = ["AOT_FILE", "MODEL_FILE", "TorchExport", "TorchExportEngine"]

MODEL_FILE = "model.pt2"
AOT_FILE = "model.aot.pt2"


@dataclass(frozen=True)
class TorchExport(Backend):
    """Lower to an exported program, which ``torch.export.load`` reads; or to native code with AOTInductor.

    Attributes:
        aot_inductor: compile to native code for this machine's processor, which needs a C++ compiler here, and the
            same processor features where it is loaded. Such a bundle is code: it is loaded only with
            ``load_engine(path, trust_native_code=True)``.

    Raises:
        OptionError: an option is of the wrong type.
    """

    name: ClassVar[str] = "torch_export"
    packages: ClassVar[tuple[str, ...]] = ("torch",)

    built_in: ClassVar[tuple[str, ...]] = ("aot_inductor",)

    aot_inductor: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.aot_inductor, bool):
            raise OptionError(
                f"option aot_inductor is {self.aot_inductor!r}",
                where="TorchExport.aot_inductor",
                remedy="give True or False",
            )

    def write(self, graph_module: fx.GraphModule, directory: Path, signature: Signature, context: BuildContext) -> None:
        if self.aot_inductor:
            context.progress("compile with AOTInductor")
            _compile(graph_module, context.example_inputs, directory / AOT_FILE)
            return
        program = flat_program(graph_module)
        context.progress("write exported program")
        for node in program.graph.nodes:  # source lines name folders of this machine
            node.meta = {key: value for key, value in node.meta.items() if key == "val"}
        program._guards_code = []  # Python code; the engine checks its inputs itself
        with _Patient(io.FileIO(directory / MODEL_FILE, "w")) as file:
            torch.export.save(program, file)
            if file.error is not None:
                raise file.error

    @classmethod
    def load(
        cls, path: Path, manifest: Manifest, *, trust_native_code: bool = False, **overrides: Any
    ) -> TorchExportEngine:
        backend = cls.from_manifest(manifest, overrides)
        if backend.aot_inductor and trust_native_code is not True:
            raise BackendError(
                "this bundle is native code, which can do anything once it is loaded",
                where=str(path / AOT_FILE),
                remedy="if you know who made it: load_engine(path, trust_native_code=True), on the command line "
                "-B trust_native_code=true",
            )
        return TorchExportEngine(path, manifest, backend)

    def load_built(self, path: Path, manifest: Manifest) -> TorchExportEngine:
        return type(self).load(path, manifest, trust_native_code=True)


class _Patient(io.BufferedWriter):
    """A file that keeps its first failure: one that torch's writer meets, on a full disk say, aborts Python."""

    error: OSError | None = None

    def write(self, data: Any) -> int:
        if self.error is None:
            try:
                return super().write(data)
            except OSError as error:
                self.error = error
        return memoryview(data).nbytes

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return super().seek(offset, whence) if self.error is None else offset

    def flush(self) -> None:
        if self.error is None:
            super().flush()


class TorchExportEngine(Engine):
    """A model as an exported program, run operation by operation, or as native code.

    Args:
        path: the bundle's directory, with ``model.pt2`` or ``model.aot.pt2`` in it.
        manifest: of the bundle.
        backend: the options in force.

    Attributes:
        backend: the options in force.

    Raises:
        BundleError: the program could run code when it is loaded.
        BackendError: torch refuses the file.
    """

    native: ClassVar[Native] = "torch"

    def __init__(self, path: Path, manifest: Manifest, backend: TorchExport) -> None:
        super().__init__(path, manifest)
        self.backend = backend
        file = self.path / (AOT_FILE if backend.aot_inductor else MODEL_FILE)
        try:
            self._call = _load_native(file) if backend.aot_inductor else _load_program(file)
        except (RuntimeError, ValueError, OSError, AssertionError, KeyError, TypeError, AttributeError) as error:
            raise BackendError(
                f"torch cannot load the program: {_first_line(error)}",
                where=str(file),
                remedy=f"this is torch {torch.__version__}; the program may need another one, or be built anew",
            ) from error

    def _execute(self, inputs: list[Array]) -> Sequence[Array]:
        if self.backend.aot_inductor:  # compiled for the strides of contiguous tensors, and does not look
            inputs = [value.contiguous() for value in inputs]  # type: ignore[union-attr]
        try:
            with torch.no_grad():
                outputs = self._call(*inputs)
        except (RuntimeError, IndexError, ValueError, TypeError) as error:
            raise BackendError(
                f"torch failed: {_first_line(error)}",
                where=str(self.path),
                remedy="the inputs' sizes may be too small for the model, or memory may be short",
            ) from error
        return [value if isinstance(value, torch.Tensor) else torch.tensor(value) for value in outputs]

    def _release(self) -> None:
        del self._call


def _load_program(file: Path) -> Callable[..., Any]:
    check_pt2(file)
    module: Callable[..., Any] = torch.export.load(file).module(check_guards=False)
    return module


def _load_native(file: Path) -> Callable[..., Any]:
    loaded: Callable[..., Any] = torch._inductor.aoti_load_package(str(file))
    return loaded


def _compile(graph_module: fx.GraphModule, example_inputs: Sequence[Any] | None, file: Path) -> None:
    from torch._inductor import cpp_builder
    from torch._inductor.exc import InductorError, InvalidCxxCompiler

    try:
        cpp_builder.get_cpp_compiler()
    except (InvalidCxxCompiler, RuntimeError, OSError) as error:
        raise BackendError(
            "AOTInductor needs a C++ compiler, and there is none here",
            where="TorchExport.aot_inductor",
            remedy="install g++ or clang++ (or name one in CXX), or leave aot_inductor at False",
        ) from error
    if example_inputs is None:
        raise BackendError(
            "AOTInductor needs example inputs", where="TorchExport.aot_inductor", remedy="compile with example_inputs"
        )
    program = flat_program(graph_module, [value for value in example_inputs if isinstance(value, torch.Tensor)])
    for node in program.graph.find_nodes(op="placeholder"):
        value = node.meta["val"]
        if isinstance(value, torch.Tensor) and not value.is_contiguous():
            raise BackendError(
                f"AOTInductor compiles for the memory layout of the example, and {node.name!r} is not contiguous",
                where="TorchExport.aot_inductor",
                remedy="call .contiguous() on the example input, and on weights in another memory format",
            )
    options = {"cpp.dynamic_threads": True}  # as many as torch has where it runs, not where it was compiled
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the compiler's own workings
            torch._inductor.aoti_compile_and_package(program, package_path=str(file), inductor_configs=options)
    except (InductorError, RuntimeError, NotImplementedError, AssertionError, ValueError) as error:
        raise BackendError(
            f"AOTInductor cannot compile the graph: {_first_line(error)}",
            where="TorchExport.aot_inductor",
            remedy="leave aot_inductor at False, or see the error above this one",
        ) from error


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), repr(error))
