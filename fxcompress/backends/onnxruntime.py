"""Engines for CPUs, and whatever else ONNX Runtime has an execution provider for: graph → ONNX → ONNX Runtime."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import onnx
import onnxruntime
import torch
from torch import fx

from fxcompress.backends.base import BuildContext, Signature
from fxcompress.backends.bundle import Manifest
from fxcompress.backends.byte_products import in_onnxruntime, widest_weight
from fxcompress.backends.engine import Engine
from fxcompress.backends.onnx_backend import MODEL_FILE, OnnxBackend, whole
from fxcompress.backends.onnx_weights import weights_file
from fxcompress.backends.onnxruntime_engine import OnnxRuntimeEngine, Session, first_line
from fxcompress.backends.onnxruntime_kernels import integer_share, is_quantized
from fxcompress.errors import BackendError, nearest

__all__ = ["MODEL_FILE", "OnnxRuntime", "OnnxRuntimeEngine"]

OptimizationLevel = Literal["all", "extended", "basic", "disabled"]
_LEVELS = {
    "all": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL,
    "extended": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    "basic": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    "disabled": onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL,
}
_ERRORS_ONLY = 3
_HALF = (torch.float16, torch.bfloat16)
_IN_HALF, _IN_BYTES = "weights_in_16_bits", "weights_in_8_bits"


@dataclass(frozen=True)
class OnnxRuntime(OnnxBackend):
    """Lower to ONNX and run with ONNX Runtime.

    Attributes:
        threads: that share one operator (intra-op); None leaves it to ONNX Runtime: one per physical core.
        providers: execution providers in order of preference, ``"CUDAExecutionProvider"`` say. All must be there:
            ONNX Runtime's silent fall back to the CPU is an error here.
        optimization_level: of ONNX Runtime's graph optimizer: ``"all"``, ``"extended"``, ``"basic"``, ``"disabled"``.
        opset: of the ONNX file; None takes the exporter's default.
        simplify: run onnxsim over the ONNX file.

    Raises:
        OptionError: an option is of the wrong type, unknown, or outside its range.
    """

    name: ClassVar[str] = "onnxruntime"
    packages: ClassVar[tuple[str, ...]] = ("torch", "onnx", "onnxscript", "onnxsim", "onnxruntime")

    threads: int | None = None
    providers: tuple[str, ...] = ("CPUExecutionProvider",)
    optimization_level: OptimizationLevel = "all"

    def __post_init__(self) -> None:
        if isinstance(self.providers, list):
            object.__setattr__(self, "providers", tuple(self.providers))
        super().__post_init__()
        fits = self.threads is None or whole(self.threads, 1)
        self._require(fits, "threads", self.threads, "give 1 or more, or None")
        known = onnxruntime.get_all_providers()
        named = isinstance(self.providers, tuple) and bool(self.providers)
        self._require(named, "providers", self.providers, "name one")
        for provider in self.providers:
            self._require(provider in known, "providers", provider, nearest(str(provider), known))
        level = self.optimization_level
        self._require(level in get_args(OptimizationLevel), "optimization_level", level, nearest(str(level), _LEVELS))

    def write(self, graph_module: fx.GraphModule, directory: Path, signature: Signature, context: BuildContext) -> None:
        super().write(graph_module, directory, signature, context)
        if any(tensor.dtype in _HALF for tensor in graph_module.state_dict().values()):
            context.measurements[_IN_HALF] = True
        bits = widest_weight(graph_module)
        context.note(in_onnxruntime(bits))
        if bits == 8:
            context.measurements[_IN_BYTES] = True

    def onnxruntime_only(self, graph_module: fx.GraphModule) -> bool:
        """Quantized graphs use operators that other engines lack; the file of any other graph is for everybody."""
        return is_quantized(graph_module)

    def examine(self, engine: Engine, graph_module: fx.GraphModule, context: BuildContext) -> Mapping[str, Any]:
        """What runs in integers, where anything should; see :mod:`fxcompress.backends.onnxruntime_kernels`."""
        if not is_quantized(graph_module):
            return {}
        assert isinstance(engine, OnnxRuntimeEngine)
        exported = onnx.load(engine.path / MODEL_FILE, load_external_data=False)
        nodes = exported.graph.node, engine.optimized_graph().node
        return {"integer_share": integer_share(graph_module, *nodes, context.sources)}

    @classmethod
    def load(cls, path: Path, manifest: Manifest, **overrides: Any) -> OnnxRuntimeEngine:
        return OnnxRuntimeEngine(path, manifest, cls.from_manifest(manifest, overrides))

    def load_built(self, path: Path, manifest: Manifest) -> OnnxRuntimeEngine:
        # Much weight is a file of its own. It shall not be held beside the model's while that is being compiled.
        return OnnxRuntimeEngine(path, manifest, self, later=weights_file(path / MODEL_FILE).exists())

    def open(
        self, path: Path, manifest: Manifest, options: onnxruntime.SessionOptions, part: bytes | None = None
    ) -> Session:
        """A session of the bundle at ``path``, or of ``part`` of its model.

        Raises:
            BackendError: a provider is missing, or ONNX Runtime refuses the model.
        """
        # Its rewrite to blocked layouts ends in a segmentation fault where a transposed value meets 16-bit weights.
        disabled = ["NchwcTransformer"] if manifest.measurements.get(_IN_HALF) else []
        if manifest.measurements.get(_IN_BYTES):
            # Where sums of byte products would overflow, exact kernels; elsewhere nothing changes. Equal zero points
            # must not become one for that: see onnx_zero_points.
            options.add_session_config_entry("session.x64quantprecision", "1")
            disabled.append("ConstantSharing")
        return _open(path / MODEL_FILE, part, self, options, disabled)

    def session_options(self) -> onnxruntime.SessionOptions:
        """These options as ONNX Runtime takes them; warnings of the library are silenced, errors are raised."""
        options = onnxruntime.SessionOptions()
        options.log_severity_level = _ERRORS_ONLY
        options.graph_optimization_level = _LEVELS[self.optimization_level]
        if self.threads is not None:
            options.intra_op_num_threads = self.threads
        return options


def _open(
    model: Path,
    part: bytes | None,
    backend: OnnxRuntime,
    options: onnxruntime.SessionOptions,
    disabled_optimizers: list[str],
) -> Session:
    available = onnxruntime.get_available_providers()
    missing = [provider for provider in backend.providers if provider not in available]
    if missing:
        raise BackendError(
            f"this ONNX Runtime has no {', '.join(missing)}",
            where="providers",
            remedy=f"install a build of onnxruntime that has it, or use: {', '.join(available)}",
        )
    try:
        session = onnxruntime.InferenceSession(
            part or str(model), options, providers=list(backend.providers), disabled_optimizers=disabled_optimizers
        )
    except Exception as error:  # ONNX Runtime's errors share no base class
        remedy = f"this is onnxruntime {onnxruntime.__version__}; the model may need a newer one, or be built anew"
        if "NOT_IMPLEMENTED" in str(error) or "bfloat16" in str(error):
            remedy = (
                "it has no kernel for this type on these providers, for bfloat16 on the CPU say: leave the layer in "
                "float32 or float16, or use openvino, torchscript or torch_export"
            )
        raise BackendError(
            f"ONNX Runtime cannot open the model: {first_line(error)}", where=str(model), remedy=remedy
        ) from error
    session.disable_fallback()
    refused = [provider for provider in backend.providers if provider not in session.get_providers()]
    if refused:
        raise BackendError(
            f"ONNX Runtime could not start {', '.join(refused)}",
            where="providers",
            remedy="check the provider's driver and libraries, or load with providers=('CPUExecutionProvider',)",
        )
    return session
