"""Engines for CPUs, and whatever else ONNX Runtime has an execution provider for: graph → ONNX → ONNX Runtime."""

from __future__ import annotations

import tempfile
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeAlias, get_args

import numpy as np
import onnx
import onnxruntime
import torch
from torch import fx

from fxcompress.backends.base import BuildContext, Signature
from fxcompress.backends.bundle import Manifest
from fxcompress.backends.engine import Engine
from fxcompress.backends.onnx_backend import MODEL_FILE, OnnxBackend, shapes_agree, whole
from fxcompress.backends.onnx_parts import run_parts
from fxcompress.backends.onnx_weights import weights_file
from fxcompress.backends.onnxruntime_kernels import integer_share, is_quantized
from fxcompress.backends.tensors import Array, numpy_dtype
from fxcompress.errors import BackendError, nearest

__all__ = ["MODEL_FILE", "OnnxRuntime", "OnnxRuntimeEngine"]

Session: TypeAlias = onnxruntime.InferenceSession
OptimizationLevel = Literal["all", "extended", "basic", "disabled"]
_LEVELS = {
    "all": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL,
    "extended": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    "basic": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    "disabled": onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL,
}
_ERRORS_ONLY = 3
_HALF = (torch.float16, torch.bfloat16)
_IN_HALF = "weights_in_16_bits"
_DTYPES = {"float": "float32", "double": "float64"}  # ONNX Runtime's names where they differ from torch's


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
        return _open(path / MODEL_FILE, part, self, options, disabled)

    def session_options(self) -> onnxruntime.SessionOptions:
        """These options as ONNX Runtime takes them; warnings of the library are silenced, errors are raised."""
        options = onnxruntime.SessionOptions()
        options.log_severity_level = _ERRORS_ONLY
        options.graph_optimization_level = _LEVELS[self.optimization_level]
        if self.threads is not None:
            options.intra_op_num_threads = self.threads
        return options


class OnnxRuntimeEngine(Engine):
    """A model in an ONNX Runtime session.

    Args:
        path: the bundle's directory, with ``model.onnx`` in it.
        manifest: of the bundle.
        backend: options of the session.
        later: open the session when it is first needed. :meth:`run_each` then goes without it.

    Attributes:
        backend: the options in force.

    Raises:
        BackendError: a provider is missing, ONNX Runtime refuses the model, or the model's inputs and outputs are
            not those of the manifest.
    """

    def __init__(self, path: Path, manifest: Manifest, backend: OnnxRuntime, *, later: bool = False) -> None:
        super().__init__(path, manifest)
        self.backend = backend
        self._outputs = [spec.name for spec in manifest.outputs]
        # numpy has no bfloat16, so a model with one at its door is fed through DLPack.
        specs = [*manifest.inputs, *manifest.outputs]
        self._through_numpy = all(numpy_dtype(spec.dtype) is not None for spec in specs)
        self._opening = threading.Lock()
        self._session: Session | None = None
        if not later:
            self.open()

    @property
    def session(self) -> Session:
        """The ``onnxruntime.InferenceSession``, for profiling and the like."""
        self.open()
        assert self._session is not None
        return self._session

    def open(self) -> None:
        if self._closed:
            raise self._cannot_run()
        with self._opening:
            if self._session is None:
                session = self.backend.open(self.path, self.manifest, self.backend.session_options())
                self._fed = self._check_against_manifest(session)
                self._all_fed = len(self._fed) == len(self.manifest.inputs)
                self._session = session

    def _execute(self, inputs: list[Array]) -> Sequence[Array]:
        session = self._session or self.session
        feed = dict(zip(self._names, inputs, strict=True))
        if not self._all_fed:
            feed = {name: feed[name] for name in self._fed}
        with self._failures():
            if self._through_numpy:
                outputs: Sequence[Array] = session.run(self._outputs, feed)
                return outputs
            values = {name: _ort_value(value) for name, value in feed.items()}
            results = session.run_with_ort_values(self._outputs, values)
            return [_array(result) for result in results]

    def _execute_each(self, sets: Sequence[list[Array]]) -> list[Sequence[Array]]:
        if self._session is not None:
            return super()._execute_each(sets)
        feeds = [{n: _ort_value(value) for n, value in zip(self._names, inputs, strict=True)} for inputs in sets]
        with self._failures():
            found = run_parts(self.path / MODEL_FILE, self._part_session, feeds)
        return [[_array(values[name]) for name in self._outputs] for values in found]

    def _part_session(self, model: bytes) -> Session:
        options = self.backend.session_options()
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(self.path))
        options.enable_cpu_mem_arena = False  # it keeps what it allocated once
        return self.backend.open(self.path, self.manifest, options, model)

    @contextmanager
    def _failures(self) -> Iterator[None]:
        try:
            yield
        except BackendError:
            raise
        except Exception as error:  # ONNX Runtime's errors share no base class
            raise BackendError(
                f"ONNX Runtime failed: {_first_line(error)}",
                where=str(self.path),
                remedy="the inputs' sizes may be too small for the model, or memory may be short",
            ) from error

    def _release(self) -> None:
        self._session = None

    def optimized_op_counts(self) -> dict[str, int]:
        """How often each ONNX operator occurs in the graph as ONNX Runtime runs it, most frequent first.

        This, not the exported file, shows whether quantization reached the integer kernels. Operators in the
        branches of ``If`` and ``Loop`` count too.

        Raises:
            BackendError: the engine is closed, or ONNX Runtime cannot write the optimized model.
        """
        return dict(Counter(_op_types(self.optimized_graph().node)).most_common())

    def optimized_graph(self) -> onnx.GraphProto:
        """The graph as ONNX Runtime runs it, without its larger weights.

        Raises:
            BackendError: the engine is closed, or ONNX Runtime cannot write the optimized model.
        """
        if self._closed:
            raise self._cannot_run()
        with tempfile.TemporaryDirectory() as directory:
            target = Path(directory) / "optimized.onnx"
            options = self.backend.session_options()
            options.optimized_model_filepath = str(target)
            # Weights go beside the graph, so that a model over 2 GB can be written, and need not be read.
            options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "weights.bin")
            options.add_session_config_entry("session.optimized_model_external_initializers_min_size_in_bytes", "1024")
            self.backend.open(self.path, self.manifest, options)
            return onnx.load(target, load_external_data=False).graph

    def _check_against_manifest(self, session: Session) -> list[str]:
        """The names of the inputs to feed; an input that nothing reads may have been dropped from the model."""
        where = str(self.path / MODEL_FILE)
        inputs, outputs = session.get_inputs(), session.get_outputs()
        for what, found, specs in (
            ("input", inputs, self.manifest.inputs),
            ("output", outputs, self.manifest.outputs),
        ):
            told = {spec.name: spec for spec in specs}
            names = [item.name for item in found]
            if not set(names) <= told.keys() or (what == "output" and set(names) != told.keys()):
                raise BackendError(
                    f"the model's {what}s are {names}, the manifest's {list(told)}", where=where, remedy="build it anew"
                )
            for item in found:
                spec, dtype = told[item.name], item.type.removeprefix("tensor(").removesuffix(")")
                if _DTYPES.get(dtype, dtype) != spec.dtype or not shapes_agree(item.shape, spec.shape):
                    raise BackendError(
                        f"the model's {what} {item.name!r} is {dtype}{item.shape}, the manifest's {spec}",
                        where=where,
                        remedy="a dynamic size was fixed, or a dtype changed, at export; report the model",
                    )
        return [item.name for item in inputs]


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
        raise BackendError(
            f"ONNX Runtime cannot open the model: {_first_line(error)}",
            where=str(model),
            remedy=f"this is onnxruntime {onnxruntime.__version__}; the model may need a newer one, or be built anew",
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


def _ort_value(value: Array) -> onnxruntime.OrtValue:
    if isinstance(value, torch.Tensor):
        return onnxruntime.OrtValue.from_dlpack(value.cpu().contiguous())
    return onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(value))


def _array(value: onnxruntime.OrtValue) -> Array:
    dtype = value.data_type().removeprefix("tensor(").removesuffix(")")
    return torch.from_dlpack(value) if numpy_dtype(_DTYPES.get(dtype, dtype)) is None else value.numpy()


def _op_types(nodes: Iterable[onnx.NodeProto]) -> Iterable[str]:
    for node in nodes:
        yield node.op_type
        for attribute in node.attribute:
            for graph in (attribute.g, *attribute.graphs):
                yield from _op_types(graph.node)


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), repr(error))
