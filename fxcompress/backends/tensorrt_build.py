"""ONNX file → TensorRT engine: parse, set up, build; what the library says becomes an error that names the layer."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx

from fxcompress.backends.signature import TensorSpec
from fxcompress.backends.tensorrt_graph import layer_of
from fxcompress.backends.tensorrt_library import Library, LogEntry
from fxcompress.backends.tensorrt_origin import Origins
from fxcompress.backends.tensorrt_profiles import Profile
from fxcompress.errors import BackendError

if TYPE_CHECKING:
    import tensorrt as trt

__all__ = ["Plan", "Settings", "build_plan"]

_SHOWN = 5  # errors in one message
_DTYPES = {
    "FLOAT": "float32",
    "HALF": "float16",
    "BF16": "bfloat16",
    "INT32": "int32",
    "INT64": "int64",
    "INT8": "int8",
    "UINT8": "uint8",
    "BOOL": "bool",
    "FP8": "float8_e4m3fn",
}


@dataclass(frozen=True)
class Settings:
    """How to build; see :class:`fxcompress.backends.tensorrt.TensorRT` for what each field means."""

    compute_capabilities: tuple[str, ...] = ()
    tf32: bool = False
    sparse_weights: bool = False
    version_compatible: bool = False
    hardware_compatibility: str = "none"
    refit: bool = False
    strip_plan: bool = False
    timing_cache: str | None = None
    workspace_bytes: int | None = None
    optimization_level: int | None = None


@dataclass(frozen=True)
class Plan:
    """What was built.

    Attributes:
        bytes: size of the serialized engine.
        seconds: that parsing and building took.
        layers: of the network, before the builder fused any.
        warnings: that the library gave, each once.
    """

    bytes: int
    seconds: float
    layers: int
    warnings: tuple[str, ...]


def build_plan(
    library: Library,
    model: Path,
    output: Path | None,
    settings: Settings,
    profiles: Sequence[Profile],
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    origins: Origins,
) -> Plan:
    """Build an engine from an ONNX file.

    Args:
        output: of the serialized engine; None parses only.
        inputs: that the model must have, and ``outputs`` likewise; another dtype would be another model.

    Raises:
        BackendError: the library refuses a node, an option or the whole; names the ONNX nodes and the layers.
    """
    started = time.perf_counter()
    with library.log() as entries:
        module = library.module
        builder: trt.Builder = module.Builder(library.logger())
        network: trt.INetworkDefinition = builder.create_network(_network_flags(module))
        parser: trt.OnnxParser = module.OnnxParser(network, library.logger())
        if not parser.parse_from_file(str(model)):
            raise _parse_error(library, parser, entries, origins)
        _check_ends(network, inputs, outputs)
        layers, size = int(network.num_layers), 0
        if output is not None:
            config: trt.IBuilderConfig = builder.create_builder_config()
            _configure(library, config, settings)
            _add_profiles(builder, config, network, profiles)
            cache = _timing_cache(config, settings.timing_cache)
            plan = builder.build_serialized_network(network, config)
            if plan is None:
                raise _build_error(library, entries, origins, settings)
            with output.open("wb") as file:
                size = file.write(plan)  # type: ignore[arg-type,unused-ignore]  # a buffer, which the stubs leave out
            if cache is not None and settings.timing_cache is not None:
                Path(settings.timing_cache).write_bytes(config.get_timing_cache().serialize())
        warnings = tuple(dict.fromkeys(entry.text for entry in entries if entry.severity == "WARNING"))
    return Plan(size, time.perf_counter() - started, layers, warnings)


def _network_flags(module: Any) -> int:
    """Types are those that the ONNX file says. Where all networks are so (TensorRT 11), the flag may be gone."""
    flag = getattr(module.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return 0 if flag is None else 1 << int(flag)


def _configure(library: Library, config: trt.IBuilderConfig, settings: Settings) -> None:
    """Set every option; one that this library lacks is an error, never ignored."""
    module = library.module
    flags = {
        "SPARSE_WEIGHTS": settings.sparse_weights,
        "VERSION_COMPATIBLE": settings.version_compatible,
        "REFIT": settings.refit,
        "STRIP_PLAN": settings.strip_plan,
    }
    for name, wanted in flags.items():
        if wanted:
            flag = getattr(module.BuilderFlag, name, None)
            if flag is None:
                raise _lacks(library, name.lower())
            config.set_flag(flag)
    tf32 = getattr(module.BuilderFlag, "TF32", None)
    if tf32 is not None:
        (config.set_flag if settings.tf32 else config.clear_flag)(tf32)
    if settings.hardware_compatibility != "none":
        level = getattr(module.HardwareCompatibilityLevel, settings.hardware_compatibility.upper(), None)
        if level is None:
            raise _lacks(library, "hardware_compatibility")
        config.hardware_compatibility_level = level
    if settings.workspace_bytes is not None:
        config.set_memory_pool_limit(module.MemoryPoolType.WORKSPACE, settings.workspace_bytes)
    if settings.optimization_level is not None:
        config.builder_optimization_level = settings.optimization_level
    # Layer names in the engine are what profilers and errors on the device can name.
    config.profiling_verbosity = module.ProfilingVerbosity.LAYER_NAMES_ONLY
    if settings.compute_capabilities:
        if not library.capabilities:
            raise _lacks(library, "compute_capabilities")
        _set_capabilities(module, config, settings.compute_capabilities)


def _set_capabilities(module: Any, config: Any, wanted: Sequence[str]) -> None:
    # Any: the stubs are of a TensorRT that could not build for other devices.
    config.num_compute_capabilities = len(wanted)
    for index, name in enumerate(wanted):
        if not config.set_compute_capability(getattr(module.ComputeCapability, name.upper()), index):
            raise BackendError(f"the library refuses compute capability {name}", where="TensorRT.compute_capabilities")


def _timing_cache(config: trt.IBuilderConfig, path: str | None) -> Any:
    if path is None:
        return None
    held = Path(path).read_bytes() if Path(path).exists() else b""
    cache = config.create_timing_cache(held)
    if not config.set_timing_cache(cache, ignore_mismatch=False):
        raise BackendError(
            "the timing cache was made on another device or by another version",
            where=path,
            remedy="give another file, or delete this one",
        )
    return cache


def _add_profiles(
    builder: trt.Builder, config: trt.IBuilderConfig, network: trt.INetworkDefinition, profiles: Sequence[Profile]
) -> None:
    for told in profiles:
        profile: trt.IOptimizationProfile = builder.create_optimization_profile()
        for index in range(network.num_inputs):
            tensor = network.get_input(index)
            if tensor.is_shape_tensor:
                raise BackendError(
                    "the values of this input are sizes of others, which needs a range of values",
                    where=f"input {tensor.name!r}",
                    remedy="make it a plain number when the model is captured",
                )
            if tensor.name in told.shapes:
                profile.set_shape(tensor.name, *told.shapes[tensor.name])  # type: ignore[arg-type,unused-ignore]
        if not profile or config.add_optimization_profile(profile) < 0:
            raise BackendError(f"TensorRT refuses the profile {told}", where="TensorRT.profiles")


def _check_ends(network: trt.INetworkDefinition, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> None:
    for what, count, get, specs in (
        ("input", network.num_inputs, network.get_input, inputs),
        ("output", network.num_outputs, network.get_output, outputs),
    ):
        told = {spec.name: spec for spec in specs}
        for index in range(count):
            tensor = get(index)
            spec = told.get(tensor.name)
            found = _DTYPES.get(tensor.dtype.name, tensor.dtype.name)
            shape: Any = tensor.shape
            if spec is None or spec.dtype != found or len(shape) != len(spec.shape):
                raise BackendError(
                    f"TensorRT makes of {what} {tensor.name!r} {found}{list(shape)}, the model has {spec}",
                    where=f"{what} {tensor.name!r}",
                    remedy="convert the model to float32 or half precision before it is compiled",
                )


# --- errors ----------------------------------------------------------------------------------------------------------


def _parse_error(
    library: Library, parser: trt.OnnxParser, entries: Sequence[LogEntry], origins: Origins
) -> BackendError:
    problems, places = [], []
    for index in range(min(parser.num_errors, _SHOWN)):
        error = parser.get_error(index)
        op = error.node_operator() or _operator_of(error.func())
        names = [name for name in (error.node_name(), origins.name_at(error.node(), op)) if name][:1]
        names = names or origins.named_after(op)[:_SHOWN]  # of some operators the parser does not say which node it is
        named = " or ".join(map(repr, names))
        problems.append(f"{op or 'the graph'}{f' {named}' if named else ''}: {_reason(error.desc(), op)}")
        if op and not names:
            places.append(f"ONNX node {op} of {origins.tell('', op)}")
        places += [f"ONNX node {name!r} ({op}) of {origins.tell(name, op)}" for name in names]
    problems = problems or [entry.text for entry in entries if entry.is_error][:_SHOWN]
    more = parser.num_errors - _SHOWN
    return BackendError(
        f"{library.name} {library.version} cannot import the model: {'; '.join(problems) or 'it says no more'}"
        + (f"; and {more} more" if more > 0 else ""),
        where="; ".join(dict.fromkeys(places)) or None,
        remedy="write that layer with other operations, or leave it outside of the engine",
    )


def _operator_of(function: str) -> str:
    """The operator that a function of the parser is for: ``importScatterElements``."""
    for prefix in ("import", "check"):
        name = function.removeprefix(prefix)
        if name != function and onnx.defs.has(name):
            return name
    return ""


def _reason(text: str, op: str) -> str:
    """The telling line of what the parser says; of an operator without importer it says only "false"."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    lines = [line for line in lines if not line.startswith("Invalid Node") and "catchCudaError" not in line]
    if not lines or lines[0] == "false":
        return f"there is no importer for {op}" if op else "no reason given"
    return lines[0].removeprefix("Assertion failed: ")


def _build_error(library: Library, entries: Sequence[LogEntry], origins: Origins, settings: Settings) -> BackendError:
    said = list(dict.fromkeys(entry.text.strip() for entry in entries if entry.is_error))
    if not said:  # what was left out may be the reason: a build for this machine's own GPU needs one
        said = list(dict.fromkeys(entry.text.strip() for entry in entries if entry.severity != "INFO"))
    names = list(dict.fromkeys(name for text in said if (name := origins.named_in(text))))
    layer = "the layer that is named" if names else "the model"
    remedy = f"simplify {layer}, or ask for fewer options; the builder's own words are above"
    if any("Turing" in text for text in said):
        remedy = "leave sm75 out of compute_capabilities, or use ConvertPrecision to float16"
    elif settings.workspace_bytes is not None and any("workspace" in text for text in said):
        remedy = f"raise workspace_bytes, now {settings.workspace_bytes}, or leave it out"
    elif any(name in text.lower() for text in said for name in ("bf16", "bfloat16")):
        kept = "".join(f"{layer_of(name)!r}, " for name in names if layer_of(name))
        keep = (
            f", or keep {layer} in float32: ConvertPrecision(dtype='bfloat16', keep=({kept.rstrip()}))" if kept else ""
        )
        remedy = f"use float16{keep}"
    elif settings.refit or settings.strip_plan:
        remedy = "leave out refit and strip_plan: TensorRT for RTX needs a GPU to build with them, and one capability"
    told = f"ONNX node {', '.join(map(repr, names))} of {origins.tell_all(names)}" if names else None
    target = f" for {', '.join(settings.compute_capabilities)}" if settings.compute_capabilities else ""
    return BackendError(
        f"{library.name} {library.version} cannot build the engine{target}: {' / '.join(said[:_SHOWN]) or 'no reason'}",
        where=told,
        remedy=remedy,
    )


def _lacks(library: Library, option: str) -> BackendError:
    return BackendError(
        f"{library.name} {library.version} has no {option}", where=f"TensorRT.{option}", remedy="leave the option out"
    )
