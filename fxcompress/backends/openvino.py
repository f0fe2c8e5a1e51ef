"""Engines for Intel and other CPUs: graph → ONNX → OpenVINO.

The bundle holds the ONNX file itself. OpenVINO reads it as it is, Q/DQ included; its own form (IR) was no smaller and
no faster to load where both were measured, and would be a second file to keep true.
"""

from __future__ import annotations

import re
import threading
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import numpy as np
import torch
from torch import fx

from fxcompress.backends.base import BuildContext, Signature
from fxcompress.backends.bundle import Manifest
from fxcompress.backends.byte_products import in_openvino, widest_weight
from fxcompress.backends.engine import Engine
from fxcompress.backends.onnx_backend import MODEL_FILE, OnnxBackend, shapes_agree, whole
from fxcompress.backends.openvino_lowering import lower_operators
from fxcompress.backends.signature import dtype_name
from fxcompress.backends.tensors import Array, numpy_dtype
from fxcompress.errors import BackendError, PreconditionError, nearest

__all__ = ["MODEL_FILE", "OpenVINO", "OpenVINOEngine"]

Mode = Literal["latency", "throughput"]
Precision = Literal["f32", "bf16", "f16"]
_DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16}
# OpenVINO's names of element types, and torch's.
_NAMES = {"boolean": "bool", "f16": "float16", "f32": "float32", "f64": "float64", "bf16": "bfloat16"}
_NAMES |= {
    f"{short}{bits}": f"{long}{bits}" for short, long in (("i", "int"), ("u", "uint")) for bits in (8, 16, 32, 64)
}
_SHORT = {long: short for short, long in _NAMES.items()}
_INT32 = np.iinfo(np.int32)


@dataclass(frozen=True)
class OpenVINO(OnnxBackend):
    """Lower to ONNX and run with OpenVINO.

    Attributes:
        threads: of one inference, no more than there are cores; None leaves it to OpenVINO: one per physical core.
        mode: ``"latency"`` gives one inference all threads; ``"throughput"`` runs several calls, from several threads
            of the caller, side by side.
        precision: that OpenVINO may compute in: ``"f32"``, or ``"bf16"`` and ``"f16"``, which round and are verified
            to that much. One that the processor lacks is an error; OpenVINO itself would take ``"f32"``.
        device: of OpenVINO: ``"CPU"``, ``"GPU"``, ``"NPU"``.
        opset: of the ONNX file; None takes the exporter's default.
        simplify: run onnxsim over the ONNX file.

    Raises:
        OptionError: an option is of the wrong type, unknown, or outside its range.
    """

    name: ClassVar[str] = "openvino"
    packages: ClassVar[tuple[str, ...]] = ("torch", "onnx", "onnxscript", "onnxsim", "openvino")

    threads: int | None = None
    mode: Mode = "latency"
    precision: Precision = "f32"
    device: str = "CPU"

    def __post_init__(self) -> None:
        super().__post_init__()
        fits = self.threads is None or whole(self.threads, 1)
        self._require(fits, "threads", self.threads, "give 1 or more, or None")
        self._require(self.mode in get_args(Mode), "mode", self.mode, nearest(str(self.mode), get_args(Mode)))
        known = get_args(Precision)
        self._require(self.precision in known, "precision", self.precision, nearest(str(self.precision), known))
        named = isinstance(self.device, str) and bool(self.device)
        self._require(named, "device", self.device, "name one, such as 'CPU'")

    @property
    def computes_in(self) -> torch.dtype | None:
        return _DTYPES.get(self.precision)

    def write(self, graph_module: fx.GraphModule, directory: Path, signature: Signature, context: BuildContext) -> None:
        _library()  # before the work, not after it
        _refuse_doubles(graph_module, signature)
        super().write(graph_module, directory, signature, context)
        context.note(in_openvino(widest_weight(graph_module)))
        lower_operators(directory / MODEL_FILE)

    @classmethod
    def load(cls, path: Path, manifest: Manifest, **overrides: Any) -> OpenVINOEngine:
        return OpenVINOEngine(path, manifest, cls.from_manifest(manifest, overrides))

    def properties(self) -> dict[str, Any]:
        """These options as OpenVINO takes them."""
        told: dict[str, Any] = {"PERFORMANCE_HINT": self.mode.upper(), "INFERENCE_PRECISION_HINT": self.precision}
        if self.threads is not None:
            told["INFERENCE_NUM_THREADS"] = self.threads
        if self.device == "CPU":
            # Else layers with integer weights round their inputs to integers, whatever the precision says.
            told["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = 0
        return told


class OpenVINOEngine(Engine):
    """A model compiled by OpenVINO. May be called from several threads at once.

    Args:
        path: the bundle's directory, with ``model.onnx`` in it.
        manifest: of the bundle.
        backend: the options in force.

    Attributes:
        compiled: the ``openvino.CompiledModel``.
        backend: the options in force.

    Raises:
        BackendError: OpenVINO is not installed, lacks the device or the precision, refuses the model, or the model's
            inputs and outputs are not those of the manifest.
    """

    def __init__(self, path: Path, manifest: Manifest, backend: OpenVINO) -> None:
        super().__init__(path, manifest)
        self.backend = backend
        self._openvino = _library()
        self._wrap = self._openvino.Tensor
        self.compiled = self._open()
        self._requests = threading.local()  # a request runs one inference at a time
        inputs, outputs = self._check_against_manifest()
        self._fed = [(index, inputs[spec.name]) for index, spec in enumerate(manifest.inputs) if spec.name in inputs]
        self._given = [(outputs[spec.name], numpy_dtype(spec.dtype) is None) for spec in manifest.outputs]
        # Integers of 64 bits are computed in 32: what does not fit is refused.
        self._narrowed = [index for index, spec in enumerate(manifest.inputs) if spec.dtype in ("int64", "uint64")]

    def _execute(self, inputs: list[Array]) -> list[Array]:
        try:
            request = self._requests.own
        except AttributeError:
            request = self._requests.own = self.compiled.create_infer_request()
        for index in self._narrowed:
            self._check_range(index, inputs[index])
        # OpenVINO's tensors point to this memory and do not keep it.
        given = [_dense(value) for value in inputs]
        try:
            for index, port in self._fed:
                value = given[index]
                wrapped = self._wrap(value, True) if isinstance(value, np.ndarray) else self._tensor(value)
                request.set_input_tensor(port, wrapped)
            request.infer()
            # The request writes its next outputs into the same memory, so these are copies.
            made = []
            for port, wide in self._given:
                tensor = request.get_output_tensor(port)
                made.append(self._wide(tensor) if wide else tensor.data.copy())
            return made
        except Exception as error:
            raise BackendError(
                f"OpenVINO failed: {_reason(error)}",
                where=str(self.path),
                remedy="the inputs' sizes may be too small for the model, or memory may be short",
            ) from error

    def _release(self) -> None:
        del self.compiled, self._requests

    def when_wrong(self) -> str:
        integers = any({"u8", "i8"} & kinds.keys() for kinds in self.executed_precisions().values())
        told = "on x64 processors without VNNI 8-bit products overflow in OpenVINO: Quantize(…, weight_bits=7) does not"
        return told if integers else ""

    def executed_precisions(self) -> dict[str, dict[str, int]]:
        """How many layers of each type run in each precision, as OpenVINO executes the model.

        This, not the exported file, shows whether quantization reached the integer kernels:
        ``{"Convolution": {"i8": 20}, "Eltwise": {"i8": 8}, "FullyConnected": {"i8": 1}, "Input": {"f32": 1}}``.

        Raises:
            BackendError: the engine is closed.
        """
        if self._closed:
            raise self._cannot_run()
        found: dict[str, Counter[str]] = {}
        for operation in self.compiled.get_runtime_model().get_ordered_ops():
            facts = operation.get_rt_info()
            kind, precision = (facts[key].astype(str) for key in ("layerType", "runtimePrecision"))
            if kind not in ("Const", "Output"):
                found.setdefault(kind, Counter())[precision] += 1
        return {kind: dict(counts.most_common()) for kind, counts in sorted(found.items())}

    # --- private -----------------------------------------------------------------------------------------------

    def _open(self) -> Any:
        backend, model = self.backend, self.path / MODEL_FILE
        core = self._openvino.Core()
        available = core.available_devices
        if backend.device.partition(":")[0].partition(".")[0] not in {name.partition(".")[0] for name in available}:
            raise BackendError(
                f"OpenVINO has no device {backend.device!r} here",
                where="device",
                remedy=f"load with device='CPU'; there is: {', '.join(available)}",
            )
        try:
            compiled = core.compile_model(core.read_model(str(model)), backend.device, backend.properties())
        except Exception as error:
            raise BackendError(
                f"OpenVINO cannot open the model: {_reason(error)}",
                where=str(model),
                remedy=f"this is openvino {self._openvino.__version__}; the backend onnxruntime may take the model",
            ) from error
        taken = _precision_of(compiled)
        if taken not in (None, backend.precision):
            raise BackendError(
                f"this {backend.device} has no {backend.precision}: OpenVINO would compute in {taken} without a word",
                where="precision",
                remedy=f"give precision={taken!r} here; where there is {backend.precision}, the same bundle can be "
                f"loaded with precision={backend.precision!r}",
            )
        return compiled

    def _check_against_manifest(self) -> tuple[dict[str, int], dict[str, int]]:
        """Ports by the manifest's names; an input that nothing reads may have been dropped from the model."""
        places: list[dict[str, int]] = []
        for what, ports, specs in (
            ("input", self.compiled.inputs, self.manifest.inputs),
            ("output", self.compiled.outputs, self.manifest.outputs),
        ):
            found: dict[str, int] = {}
            for spec in specs:
                port = next((index for index, port in enumerate(ports) if spec.name in port.names), None)
                if port is None:
                    if what == "output":
                        raise self._differs(f"the model has no output {spec.name!r}")
                    continue
                shape = [size.get_length() if size.is_static else None for size in ports[port].partial_shape]
                dtype = ports[port].element_type.to_string()
                if _NAMES.get(dtype) != spec.dtype or not shapes_agree(shape, spec.shape):
                    raise self._differs(f"the model's {what} {spec.name!r} is {dtype}{shape}, the manifest's {spec}")
                found[spec.name] = port
            if what == "input" and len(set(found.values())) != len(ports):
                raise self._differs(f"the model's inputs are not {[spec.name for spec in specs]}")
            places.append(found)
        return places[0], places[1]

    def _differs(self, problem: str) -> BackendError:
        return BackendError(
            problem,
            where=str(self.path / MODEL_FILE),
            remedy="a dynamic size was fixed, or a dtype changed, at export; report the model",
        )

    def _check_range(self, index: int, value: Array) -> None:
        if isinstance(value, np.ndarray) and value.size:
            low, high = int(value.min()), int(value.max())
            if low < _INT32.min or high > _INT32.max:
                raise PreconditionError(
                    f"OpenVINO computes integers in 32 bits, and this input goes from {low} to {high}",
                    where=f"input {self._names[index]!r}",
                    remedy="use a backend that computes in 64 bits: onnxruntime, torchscript, torch_export",
                )

    def _tensor(self, value: torch.Tensor) -> Any:
        """An OpenVINO tensor on the same memory, of a dtype that numpy lacks."""
        bits = value.view(torch.int16 if value.element_size() == 2 else torch.int8).numpy()
        type_ = getattr(self._openvino.Type, _SHORT[dtype_name(value.dtype)])
        return self._wrap(bits, self._openvino.Shape(value.shape), type_)

    def _wide(self, tensor: Any) -> torch.Tensor:
        """An output of a dtype that numpy lacks."""
        dtype = getattr(torch, _NAMES[tensor.element_type.to_string()])
        bits = np.frombuffer(tensor.data.tobytes(), np.int16 if dtype.itemsize == 2 else np.int8)
        return torch.from_numpy(bits.copy()).view(dtype).reshape(list(tensor.shape))


def _refuse_doubles(graph_module: fx.GraphModule, signature: Signature) -> None:
    """OpenVINO takes float64 and computes in float32."""
    held = [(spec.name, spec.dtype) for spec in (*signature.inputs, *signature.outputs)]
    held += [(name, dtype_name(tensor.dtype)) for name, tensor in graph_module.state_dict(keep_vars=True).items()]
    doubles = [name for name, dtype in held if dtype in ("float64", "complex128")]
    if doubles:
        raise BackendError(
            f"OpenVINO computes float64 in 32 bits, and {doubles[0]!r} is of it",
            where="OpenVINO",
            remedy="convert the model with .float(), or use onnxruntime, torchscript or torch_export",
        )


def _precision_of(compiled: Any) -> str | None:
    """What a compiled model computes in where nothing else is said; None of a device that does not tell."""
    if "INFERENCE_PRECISION_HINT" not in compiled.get_property("SUPPORTED_PROPERTIES"):
        return None
    told: str = compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
    return told


def _library() -> Any:
    try:
        import openvino
    except ImportError as error:
        raise BackendError(
            f"the backend openvino needs its library: {error}",
            where="OpenVINO",
            remedy="pip install 'fxcompress[openvino]'",
        ) from error
    return openvino


def _dense(value: Array) -> Array:
    """``value``, or a copy where OpenVINO could not read its memory as it is."""
    if isinstance(value, torch.Tensor):
        return value.cpu().contiguous()
    flags = value.flags
    return value if flags.c_contiguous and flags.writeable else np.array(value, order="C")


def _reason(error: Exception) -> str:
    """OpenVINO tells first which of its source lines failed, and then what is wrong, of a model node by node."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    nodes = re.split(
        r"^-- (\S+?)-\d+ with a message:$", "\n".join(lines).partition("\nSummary:")[0], flags=re.MULTILINE
    )
    if len(nodes) > 1:
        told = zip(nodes[1::2], nodes[2::2], strict=True)
        return "; ".join(f"{operator}: {message.strip().splitlines()[-1]}" for operator, message in told)
    told_lines = [line for line in lines if not line.startswith(("Exception from src", "Check '"))]
    return (told_lines or lines or [repr(error)])[0]
