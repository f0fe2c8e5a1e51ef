"""The engine of ONNX Runtime: a session over a bundle's model, opened at once or when it is first needed."""

from __future__ import annotations

import copy
import tempfile
import threading
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import onnx
import onnxruntime
import torch

from fxcompress.backends.bundle import Manifest
from fxcompress.backends.engine import Engine
from fxcompress.backends.onnx_backend import MODEL_FILE, shapes_agree
from fxcompress.backends.onnx_parts import run_parts
from fxcompress.backends.reference import REFERENCE_FILE, replay
from fxcompress.backends.tensors import Array, numpy_dtype
from fxcompress.errors import BackendError

if TYPE_CHECKING:
    from fxcompress.backends.onnxruntime import OnnxRuntime

__all__ = ["OnnxRuntimeEngine", "first_line"]

Session: TypeAlias = onnxruntime.InferenceSession
_DTYPES = {"float": "float32", "double": "float64"}  # ONNX Runtime's names where they differ from torch's


class OnnxRuntimeEngine(Engine):
    """A model in an ONNX Runtime session.

    Args:
        path: the bundle's directory, with ``model.onnx`` in it.
        manifest: of the bundle.
        backend: options of the session.
        later: open the session when it is first needed, and hold it against the bundle's reference data before
            anything runs on it. Until then :meth:`run_each` runs the model part by part.

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
        self._later = later
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
                if self._later and (self.path / REFERENCE_FILE).exists():
                    self._prove(session)
                self._session = session

    def _prove(self, session: Session) -> None:
        """Its parts gave the right outputs, but optimizers see more in the whole: compare that with PyTorch too."""
        opened = copy.copy(self)  # so that nobody runs on this session before it is proven
        opened._session = session
        replay(opened)

    def _execute(self, inputs: list[Array]) -> Sequence[Array]:
        session = self._session or self.session
        feed = dict(zip(self._names, inputs, strict=True))
        if not self._all_fed:
            feed = {name: feed[name] for name in self._fed}
        try:
            if self._through_numpy:
                outputs: Sequence[Array] = session.run(self._outputs, feed)
                return outputs
            values = {name: _ort_value(value) for name, value in feed.items()}
            results = session.run_with_ort_values(self._outputs, values)
            return [_array(result) for result in results]
        except Exception as error:  # ONNX Runtime's errors share no base class
            raise self._failed(error) from error

    def _execute_each(self, sets: Sequence[list[Array]]) -> list[Sequence[Array]]:
        if self._session is not None:
            return super()._execute_each(sets)
        feeds = [{n: _ort_value(value) for n, value in zip(self._names, inputs, strict=True)} for inputs in sets]
        try:
            found = run_parts(self.path / MODEL_FILE, self._part_session, feeds)
        except BackendError:
            raise
        except Exception as error:
            raise self._failed(error) from error
        return [[_array(values[name]) for name in self._outputs] for values in found]

    def _part_session(self, model: bytes) -> Session:
        options = self.backend.session_options()
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(self.path))
        options.enable_cpu_mem_arena = False  # it keeps what it allocated once
        return self.backend.open(self.path, self.manifest, options, model)

    def _failed(self, error: Exception) -> BackendError:
        return BackendError(
            f"ONNX Runtime failed: {first_line(error)}",
            where=str(self.path),
            remedy="the inputs' sizes may be too small for the model, or memory may be short",
        )

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


def first_line(error: Exception) -> str:
    """The line of ONNX Runtime's message that says something; the rest is often a stack."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), repr(error))
