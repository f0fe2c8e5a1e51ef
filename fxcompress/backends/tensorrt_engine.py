"""An engine in a TensorRT runtime, on torch tensors that are on the GPU; and what it tells where there is none."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fxcompress.backends.bundle import Manifest
from fxcompress.backends.engine import Engine
from fxcompress.backends.onnx_backend import MODEL_FILE
from fxcompress.backends.tensorrt_library import Library, find_library
from fxcompress.backends.tensors import Array, torch_dtype
from fxcompress.errors import BackendError, BundleError, PreconditionError

if TYPE_CHECKING:
    import tensorrt as trt

__all__ = ["FACTS_FILE", "PLAN_FILE", "Facts", "TensorRTEngine"]

PLAN_FILE, FACTS_FILE = "model.engine", "tensorrt.json"

Shapes = dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]


@dataclass(frozen=True)
class Facts:
    """What ``tensorrt.json`` says of the engine beside it.

    Attributes:
        build_on: ``"here"``: there is an engine; ``"device"``: there is an ONNX file to make it of.
        library: that made the engine, or that the device is expected to have.
        version: of the library.
        compute_capabilities: that the engine is for; empty for the GPU that it was built on.
        shapes: of each profile: least, usual and greatest shape of each input with a dynamic dim.
        profiles: the same in words.
        bytes: size of the engine.
        stripped: whether the weights have to be put back from the ONNX file.
        needs: libraries that the device may have, and the oldest version of each.
    """

    build_on: str
    library: str
    version: str
    compute_capabilities: tuple[str, ...]
    shapes: tuple[Shapes, ...]
    profiles: tuple[str, ...]
    bytes: int
    stripped: bool = False
    needs: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> Facts:
        """From a bundle.

        Raises:
            BundleError: the file is missing or says something else.
        """
        try:
            told = json.loads((path / FACTS_FILE).read_text(encoding="utf-8"))
            profiles = told["profiles"]
            return cls(
                str(told["build_on"]),
                str(told["library"]),
                str(told["version"]),
                tuple(map(str, told["compute_capabilities"])),
                tuple({n: _bounds(b) for n, b in profile["shapes"].items()} for profile in profiles),
                tuple(_in_words(profile["sizes"]) for profile in profiles),
                int(told["bytes"]),
                bool(told["options"]["strip_plan"]),
                {str(name): str(least) for name, least in told["needs"].items()},
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise BundleError(
                f"the facts about the TensorRT engine cannot be read: {error}",
                where=str(path / FACTS_FILE),
                remedy="build the bundle anew",
            ) from error


def _bounds(told: Any) -> Any:
    low, best, high = (tuple(int(size) for size in shape) for shape in told)
    return low, best, high


def _in_words(sizes: Mapping[str, Sequence[int]]) -> str:
    return ", ".join(f"{name} {low} to {high} (tuned for {best})" for name, (low, best, high) in sizes.items())


class TensorRTEngine(Engine):
    """A TensorRT engine.

    Inputs on the GPU are read where they lie, on torch's current stream, and outputs are written there: nothing is
    copied and nothing waits. Inputs on the CPU are copied to the GPU; outputs then come back to the CPU.

    Args:
        path: the bundle's directory.
        manifest: of the bundle.

    Attributes:
        facts: what the engine holds; known also where it cannot run.

    Raises:
        BundleError: the bundle lacks a file of ours.
    """

    native = "torch"

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.facts = Facts.read(path)
        self._engine: trt.ICudaEngine | None = None
        self._runtime: Any = None
        self._contexts: dict[int, trt.IExecutionContext] = {}
        self._bound: set[str] = set()
        self._device = torch.device("cuda")
        super().__init__(path, manifest, unavailable=self._open(path))
        self._dtypes = [torch_dtype(spec.dtype) for spec in manifest.outputs]

    def holds(self) -> str:
        """What is in the bundle, in a sentence."""
        facts = self.facts
        targets = ", ".join(facts.compute_capabilities) or "the GPU that it is built on"
        if facts.build_on == "device":
            libraries = " or ".join(f"{name} {least} or newer" for name, least in facts.needs.items())
            what = f"an ONNX file to build an engine of, with {libraries}"
            if facts.version:
                what += f" (read by {facts.library} {facts.version} when it was made)"
        else:
            what = f"an engine of {facts.bytes:,} bytes for {targets}, built by {facts.library} {facts.version}"
        sizes = " or ".join(facts.profiles) or "fixed sizes"
        inputs = ", ".join(str(spec) for spec in self.manifest.inputs)
        outputs = ", ".join(str(spec) for spec in self.manifest.outputs)
        return f"{what}; {sizes}; in {inputs}; out {outputs}"

    # -- opening -----------------------------------------------------------------------------------------------

    def _open(self, path: Path) -> str | None:
        """Deserialize; gives the reason where that cannot be done on this machine."""
        if self.facts.build_on == "device":
            return "it is to be built on the device, by the build_engine.py and run_engine.py of the bundle"
        if not torch.cuda.is_available():
            build = "this machine has no CUDA device" if torch.version.cuda else "this PyTorch is built without CUDA"
            return f"a TensorRT engine runs on a GPU only, and {build}"
        try:
            library = find_library(self.facts.library)  # type: ignore[arg-type]  # refused where it is neither
        except BackendError as error:
            return error.problem
        major, minor = torch.cuda.get_device_capability()
        here, targets = f"sm{major}{minor}", self.facts.compute_capabilities
        if targets and here not in targets:
            return f"the engine is for {', '.join(targets)}, and this GPU is {here}"
        return self._deserialize(library, path)

    def _deserialize(self, library: Library, path: Path) -> str | None:
        with library.log() as entries:
            self._runtime = library.module.Runtime(library.logger())
            engine = self._runtime.deserialize_cuda_engine((path / PLAN_FILE).read_bytes())
            if engine is None:
                said = " / ".join(entry.text for entry in entries if entry.is_error)
                return (
                    f"{library.name} {library.version} refuses the engine, "
                    f"which {self.facts.library} {self.facts.version} built: {said or 'it says no more'}"
                )
            if self.facts.stripped:
                _refit(library, engine, path / MODEL_FILE)
        self._engine = engine
        self._device = _current_device()
        self._bound = {engine.get_tensor_name(index) for index in range(engine.num_io_tensors)}
        return None

    def _release(self) -> None:
        self._contexts.clear()
        self._engine = self._runtime = None

    def _cannot_run(self) -> BackendError:
        error = super()._cannot_run()
        if self._closed:
            return error
        remedy = "copy the bundle to a device that fits, and load it there"
        if self.facts.build_on == "device":
            remedy = "on the device: python build_engine.py, then python run_engine.py, in the bundle's directory"
        return BackendError(f"{error.problem}. The bundle holds {self.holds()}", where=error.where, remedy=remedy)

    # -- running -----------------------------------------------------------------------------------------------

    def _execute(self, inputs: list[Array]) -> Sequence[Array]:
        assert self._engine is not None
        device, stream = self._device, self._stream()
        stays = any(isinstance(value, torch.Tensor) and value.device.type == device.type for value in inputs)
        # A copy or a strided input becomes a new tensor, which must live until it is enqueued: hence the list.
        given = [torch.as_tensor(value).to(device, non_blocking=True).contiguous() for value in inputs]
        shapes = {name: tuple(value.shape) for name, value in zip(self._names, given, strict=True)}
        context = self._context(self._profile(shapes), stream)
        for name, value in zip(self._names, given, strict=True):
            # An input that nothing reads is not in the engine.
            if name in self._bound and not (
                context.set_input_shape(name, tuple(value.shape)) and context.set_tensor_address(name, value.data_ptr())
            ):
                raise BackendError(f"TensorRT refuses the shape {tuple(value.shape)}", where=f"input {name!r}")
        outputs = [
            torch.empty(self._shape_of(context, spec.name), dtype=dtype, device=device)
            for spec, dtype in zip(self.manifest.outputs, self._dtypes, strict=True)
        ]
        for spec, output in zip(self.manifest.outputs, outputs, strict=True):
            context.set_tensor_address(spec.name, output.data_ptr())
        if not context.execute_async_v3(stream):
            raise BackendError("TensorRT could not run the engine", where=str(self.path))
        return outputs if stays else [output.cpu() for output in outputs]

    def _stream(self) -> int:
        """The handle of torch's current stream: what it was given to do is done first, and the engine's part next."""
        return int(torch.cuda.current_stream(self._device).cuda_stream)

    def _context(self, profile: int, stream: int) -> trt.IExecutionContext:
        """One per profile: switching costs more than the memory."""
        context = self._contexts.get(profile)
        if context is None:
            assert self._engine is not None
            context = self._engine.create_execution_context()
            if context is None or not context.set_optimization_profile_async(profile, stream):
                raise BackendError(
                    "TensorRT could not make an execution context",
                    where=str(self.path),
                    remedy="free GPU memory, or build with profiles of smaller greatest sizes",
                )
            self._contexts[profile] = context
        return context

    def _profile(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        """The profile that takes these shapes and is tuned closest to them."""
        if not self.facts.shapes:
            return 0
        fitting = [
            (_distance(profile, shapes), index)
            for index, profile in enumerate(self.facts.shapes)
            if all(_inside(shapes[name], bounds) for name, bounds in profile.items())
        ]
        if fitting:
            return min(fitting)[1]
        told = ", ".join(f"{name}{list(shape)}" for name, shape in shapes.items())
        raise PreconditionError(
            f"the engine was not built for these sizes: {told}",
            where=f"profiles: {' or '.join(self.facts.profiles)}",
            remedy="stay within a profile, or build with TensorRT(profiles=…) that cover these sizes",
        )

    def _shape_of(self, context: trt.IExecutionContext, name: str) -> tuple[int, ...]:
        dims: Any = context.get_tensor_shape(name)
        shape = tuple(dims)
        if any(size < 0 for size in shape):
            raise BackendError(
                "the size of this output depends on the data, so that no memory can be set aside for it",
                where=f"output {name!r}",
                remedy="leave that step outside of the engine",
            )
        return shape


def _current_device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


def _inside(shape: Sequence[int], bounds: Sequence[Sequence[int]]) -> bool:
    low, _, high = bounds
    return len(shape) == len(low) and all(a <= size <= b for a, size, b in zip(low, shape, high, strict=True))


def _distance(profile: Shapes, shapes: Mapping[str, tuple[int, ...]]) -> int:
    pairs = (zip(bounds[1], shapes[name], strict=True) for name, bounds in profile.items())
    return sum(abs(best - size) for pair in pairs for best, size in pair)


def _refit(library: Library, engine: Any, model: Path) -> None:
    """Put the weights back into an engine that was built without them."""
    refitter = library.module.Refitter(engine, library.logger())
    parser = library.module.OnnxParserRefitter(refitter, library.logger())
    if not (parser.refit_from_file(str(model)) and refitter.refit_cuda_engine()):
        raise BackendError("the weights could not be put into the engine", where=str(model), remedy="build it anew")
