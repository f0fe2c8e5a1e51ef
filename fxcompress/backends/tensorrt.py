"""Engines for NVIDIA GPUs: graph → ONNX → TensorRT, built ahead of time, or by the device from its bundle."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import fx

from fxcompress.analysis.sparsity import sparse_layers
from fxcompress.backends.base import BuildContext, Signature
from fxcompress.backends.bundle import Manifest
from fxcompress.backends.onnx_backend import MODEL_FILE, OnnxBackend
from fxcompress.backends.reference import write_reference
from fxcompress.backends.tensorrt_build import Settings, build_plan
from fxcompress.backends.tensorrt_check import check_onnx
from fxcompress.backends.tensorrt_device import (
    NEEDS,
    default_tolerance,
    device_reference,
    write_facts,
    write_scripts,
)
from fxcompress.backends.tensorrt_engine import FACTS_FILE, PLAN_FILE, TensorRTEngine
from fxcompress.backends.tensorrt_library import PORTABLE, RTX_CAPABILITIES, Library, find_library
from fxcompress.backends.tensorrt_lowering import lower_operators
from fxcompress.backends.tensorrt_onnx import node_names, refuse, verify_inside, verify_onnx
from fxcompress.backends.tensorrt_origin import Origins
from fxcompress.backends.tensorrt_profiles import cover_examples, ranges_of, settle_profiles
from fxcompress.backends.tensorrt_scales import move_scales_to_weights
from fxcompress.backends.tensorrt_weights import spread_block_weights
from fxcompress.errors import BackendError, OptionError, nearest
from fxcompress.options import check_types

__all__ = ["TensorRT", "TensorRTEngine"]

_JETSONS = ("sm53", "sm62", "sm72", "sm87", "sm101", "sm110")


@dataclass(frozen=True)
class TensorRT(OnnxBackend):
    """Lower to ONNX and build a TensorRT engine.

    With TensorRT for RTX (``pip install 'fxcompress[tensorrt]'``) the engine is built here, GPU or not, for the compute
    capabilities that are asked for. With TensorRT itself it is built for the GPU of this machine. With
    ``build_on="device"`` nothing is built: the bundle has the model, scripts that build and check the engine on the
    device with TensorRT and numpy alone, and reference data.

    Types are those of the graph: float32, or what ``ConvertPrecision`` and ``Quantize(scheme="tensorrt")`` made of it.

    Attributes:
        compute_capabilities: GPUs that one engine is for: ``("sm86", "sm89")``. None takes all that run float32 models,
            sm80 and newer, which costs no size; TensorRT itself knows the GPU of this machine only.
        build_on: ``"here"``, or ``"device"`` for a bundle that is built on the device.
        library: ``"tensorrt_rtx"``, ``"tensorrt"``, or ``"auto"``: the first of them that is installed.
        profiles: ranges of the dynamic sizes, each tuned on its own: ``({"batch": (1, 1, 4)}, {"batch": (4, 32, 64)})``
            are least, usual and greatest. A size left out takes its default: the example's, up to four times that.
        tf32: let float32 products round their inputs to 10 bits of mantissa.
        sparse_weights: use the kernels for 2:4 sparsity where weights have it. None does where ``SparsifyWeights`` made
            a weight so.
        version_compatible: let newer TensorRT versions load the engine (TensorRT itself).
        hardware_compatibility: ``"ampere_plus"`` or ``"same_compute_capability"``: let other GPUs load the engine
            (TensorRT itself).
        refit: let weights be replaced in the engine.
        strip_plan: leave the weights out of the engine; they are put back from the ONNX file when it is loaded.
        timing_cache: file of measured kernels, read before a build and written after it (TensorRT itself).
        workspace_bytes: most scratch memory that a layer may use; None leaves it to the library.
        optimization_level: 0 (quickest build) to 5; None is the library's default.
        keep_onnx: keep the ONNX file beside the engine.
        opset: of the ONNX file; None takes the exporter's default.
        simplify: run onnxsim over the ONNX file.

    Raises:
        OptionError: an option is of the wrong type, unknown, or outside its range.
    """

    name: ClassVar[str] = "tensorrt"
    packages: ClassVar[tuple[str, ...]] = ("torch", "onnx", "onnxscript", "onnxsim", "tensorrt-rtx", "tensorrt")

    compute_capabilities: tuple[str, ...] | None = None
    build_on: Literal["here", "device"] = "here"
    library: Literal["auto", "tensorrt_rtx", "tensorrt"] = "auto"
    profiles: tuple[dict[str, tuple[int, int, int]], ...] = ()
    tf32: bool = False
    sparse_weights: bool | None = None
    version_compatible: bool = False
    hardware_compatibility: Literal["none", "ampere_plus", "same_compute_capability"] = "none"
    refit: bool = False
    strip_plan: bool = False
    timing_cache: str | None = None
    workspace_bytes: int | None = None
    optimization_level: int | None = None
    keep_onnx: bool = False

    def __post_init__(self) -> None:
        for name in ("compute_capabilities", "profiles"):
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        if isinstance(self.profiles, tuple):  # a manifest has lists
            object.__setattr__(self, "profiles", tuple(map(self._profile, self.profiles)))
        check_types(self)
        super().__post_init__()
        self._check_capabilities()
        self._require(
            self.optimization_level is None or 0 <= self.optimization_level <= 5,
            "optimization_level",
            self.optimization_level,
            "give 0 to 5, or None",
        )
        self._require(
            self.workspace_bytes is None or self.workspace_bytes > 0,
            "workspace_bytes",
            self.workspace_bytes,
            "give 1 or more, or None",
        )
        self._require(
            not (self.strip_plan and self.build_on == "device") and not (self.refit and self.build_on == "device"),
            "refit" if self.refit else "strip_plan",
            True,
            "leave it out with build_on='device': the model lies in the bundle as it is",
        )

    def _profile(self, told: Any) -> Any:
        if not isinstance(told, Mapping):
            return told
        made = {name: tuple(bounds) if isinstance(bounds, list) else bounds for name, bounds in told.items()}
        for name, bounds in made.items():
            right = isinstance(bounds, tuple) and len(bounds) == 3 and all(isinstance(size, int) for size in bounds)
            self._require(
                right and 1 <= bounds[0] <= bounds[1] <= bounds[2],
                "profiles",
                {name: bounds},
                "give the least, the usual and the greatest size, in this order: {'batch': (1, 8, 32)}",
            )
        return made

    def _check_capabilities(self) -> None:
        told = self.compute_capabilities
        if told is None:
            return
        for name in told:
            remedy = nearest(str(name), RTX_CAPABILITIES)
            if name in _JETSONS:
                remedy = f"{name} is a Jetson, which builds its own engine: TensorRT(build_on='device')"
            self._require(name in RTX_CAPABILITIES, "compute_capabilities", name, remedy)
        self._require(bool(told), "compute_capabilities", told, "name one, or None")
        self._require(len(set(told)) == len(told), "compute_capabilities", told, "name each once")
        self._require(
            self.build_on == "here", "compute_capabilities", told, "leave it out: the device builds for its own GPU"
        )
        self._require(
            self.library != "tensorrt", "compute_capabilities", told, "use TensorRT for RTX, or build_on='device'"
        )
        refits = self.refit or self.strip_plan
        self._require(
            len(told) == 1 or not refits, "compute_capabilities", told, "refit and strip_plan take one at a time"
        )

    # -- building ----------------------------------------------------------------------------------------------

    def write(self, graph_module: fx.GraphModule, directory: Path, signature: Signature, context: BuildContext) -> None:
        library = self._library()
        capabilities = self._capabilities(library)
        sparse = sparse_layers(graph_module, 2, 4)
        profiles = settle_profiles(signature.inputs, self.profiles, ranges_of(graph_module))
        on_device = self.build_on == "device"
        with ExitStack() as stack:
            beside = on_device or self.keep_onnx or self.strip_plan
            place = directory if beside else Path(stack.enter_context(tempfile.TemporaryDirectory()))
            super().write(graph_module, place, signature, context)
            spread_block_weights(place / MODEL_FILE)
            lower_operators(place / MODEL_FILE)
            shares_kernels = library is not None and library.is_rtx and not on_device
            moved = move_scales_to_weights(place / MODEL_FILE) if shares_kernels else 0
            context.progress("check the ONNX file")
            origins = Origins(graph_module, node_names(place / MODEL_FILE))
            refuse(check_onnx(place / MODEL_FILE), origins)
            inside = cover_examples(profiles, signature.inputs)
            if context.verify is not None and (on_device or not inside or not torch.cuda.is_available()):
                context.progress("verify the ONNX file")
                verify_onnx(place, signature, context)
                if not inside:
                    verify_inside(graph_module, signature, profiles, context)
            facts: dict[str, Any] = {"bytes": 0}
            if library is not None:
                context.progress("parse with TensorRT" if on_device else "build with TensorRT")
                plan = build_plan(
                    library,
                    place / MODEL_FILE,
                    None if on_device else directory / PLAN_FILE,
                    self._settings(capabilities, sparse),
                    profiles,
                    signature.inputs,
                    signature.outputs,
                    origins,
                )
                facts = dataclasses.asdict(plan)
        context.measurements["tensorrt"] = {
            **facts,
            "profiles": [profile.sizes for profile in profiles],
            "compute_capabilities": capabilities,
            "sparse_2_4": sparse,
            "scales_in_weights": moved,
        }
        if on_device:
            context.progress("write the device bundle")
            write_scripts(directory)
            tolerance = context.measurements.get("onnx_verification", {}).get("tolerance")
            reference = device_reference(
                graph_module, signature, profiles, context.example_inputs, tolerance or default_tolerance(graph_module)
            )
            problem = write_reference(directory, reference, whatever_size=True)
            if problem:
                raise BackendError(f"a device cannot check its engine: the reference data was {problem}")
        write_facts(
            directory / FACTS_FILE,
            signature,
            profiles,
            {
                "build_on": self.build_on,
                "library": library.name if library is not None else "tensorrt",
                "version": library.version if library is not None else "",
                "needs": NEEDS if on_device else {},
                "compute_capabilities": capabilities,
                "bytes": int(facts["bytes"]),
                "options": dataclasses.asdict(self._settings((), sparse)),
            },
        )

    @classmethod
    def load(cls, path: Path, manifest: Manifest, **overrides: Any) -> TensorRTEngine:
        cls.from_manifest(manifest, overrides)  # all of them are built in
        return TensorRTEngine(path, manifest)

    def _library(self) -> Library | None:
        """The library; None where only a device needs one, and this machine has none to parse the model with."""
        try:
            library = find_library(self.library)
        except BackendError:
            if self.build_on == "device":
                return None
            raise
        if self.build_on == "here" and library.is_rtx:
            for option in ("version_compatible", "timing_cache"):
                if getattr(self, option):
                    raise _not_in_rtx(option)
            if self.hardware_compatibility != "none":
                raise _not_in_rtx("hardware_compatibility")
        return library

    def _capabilities(self, library: Library | None) -> tuple[str, ...]:
        if self.build_on == "device" or library is None:
            return ()
        known = library.capabilities
        if self.compute_capabilities is None:
            portable = tuple(name for name in PORTABLE if name in known)
            return portable[:1] if self.refit or self.strip_plan else portable
        for name in self.compute_capabilities:
            self._require(
                name in known, "compute_capabilities", name, f"{library.name} {library.version}: {', '.join(known)}"
            )
        return self.compute_capabilities

    def _settings(self, capabilities: tuple[str, ...], sparse: list[str]) -> Settings:
        named = {item.name: getattr(self, item.name) for item in dataclasses.fields(Settings)}
        if self.sparse_weights is None:
            named["sparse_weights"] = bool(sparse)
        return Settings(**{**named, "compute_capabilities": capabilities})


TensorRT.built_in = tuple(item.name for item in dataclasses.fields(TensorRT))  # an engine is compiled with all of them


def _not_in_rtx(option: str) -> OptionError:
    return OptionError(
        f"TensorRT for RTX has no {option}",
        where=f"TensorRT.{option}",
        remedy="leave it out, or use library='tensorrt' or build_on='device'",
    )
