"""What ``compile()`` gives back: a model that runs, trains, exports, saves, and tells what was done to it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import fx

from fxcompress.backends.base import Backend, BuildContext, Engine
from fxcompress.backends.base import PassRecord as ManifestPass
from fxcompress.backends.bundle import Manifest, read_manifest
from fxcompress.backends.bundle_writer import BundleWriter
from fxcompress.backends.registry import resolve_backend
from fxcompress.backends.signature import signature_of
from fxcompress.errors import BundleError, PreconditionError
from fxcompress.graph import serialize
from fxcompress.graph.ownership import own_weights, shared_weights
from fxcompress.graph.printer import format_graph
from fxcompress.proof import Proof
from fxcompress.reporting.model import EngineReport, Report

__all__ = ["Compiled", "load"]

_GRAPH, _WEIGHTS, _REPORT = "graph.json", "weights.safetensors", "report.json"


class Compiled:
    """A compiled model.

    Weights that no pass rewrote are shared with the user's model until :attr:`module` is asked for: then they are
    copied, for whoever asks may train them. Until then the model must keep its weights; a change is noticed.

    Attributes:
        report: what each step changed, skipped and cost.
        engine: the engine that ``backend=`` asked for, or None.
    """

    def __init__(
        self,
        module: fx.GraphModule,
        report: Report,
        *,
        example_inputs: Sequence[Any] | None = None,
        engine: Engine | None = None,
        shared_with: Sequence[torch.Tensor] = (),
    ) -> None:
        self._module = module
        self._shared = [(tensor, _version(tensor)) for tensor in shared_weights(module, shared_with)]
        self.report = report
        self.engine = engine
        self._example_inputs = example_inputs

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the graph in PyTorch, called and returning as the user's model did.

        Raises:
            PreconditionError: the user's model was trained or loaded since, and its weights are still shared.
        """
        return self._sound()(*args, **kwargs)

    @property
    def module(self) -> fx.GraphModule:
        """The rewritten graph: an ordinary trainable ``GraphModule`` with weights of its own.

        Raises:
            PreconditionError: as :meth:`__call__`.
        """
        graph_module = self._sound()
        if self._shared:
            own_weights(graph_module, [tensor for tensor, _ in self._shared])
            self._shared = []
        return graph_module

    def _sound(self) -> fx.GraphModule:
        """The graph, after making sure that weights it shares are those that were compiled."""
        if any(_version(tensor) != version for tensor, version in self._shared):
            raise PreconditionError(
                "the model's weights were changed after compile(), and the compiled model still shares them",
                remedy="compile the model again; or ask for compiled.module right after compile(), which copies them",
            )
        return self._module

    def __str__(self) -> str:
        return format_graph(self._module)

    def __repr__(self) -> str:
        engine = f", engine={self.engine!r}" if self.engine is not None else ""
        return f"<Compiled: {len(self._module.graph.nodes)} nodes, {len(self.report.passes)} passes{engine}>"

    def export(self, backend: str | Backend, output: str | Path | None = None, *, verify: bool = True) -> Engine:
        """Lower the graph to an engine.

        Args:
            backend: a name (``"onnxruntime"``) or an instance with options.
            output: directory of the bundle; None keeps it in a temporary directory while the engine lives.
            verify: run the engine against PyTorch on the example inputs, at two sizes of the dynamic dims.

        Raises:
            BackendError: the graph cannot be lowered.
            VerificationError: the engine computes something else; nothing is left on disk.
            BundleError: the output cannot be written.
        """
        return build_engine(
            self._sound(), resolve_backend(backend), output, self.report, self._example_inputs, verify=verify
        )

    def save(self, path: str | Path) -> Path:
        """Write the model to a directory that :func:`load` reads without the model's code and without pickle.

        Raises:
            BundleError: the path exists and is not empty, or cannot be written, or the graph holds what has no
                serial form.
        """
        graph_module = self._sound()
        signature = signature_of(graph_module, self._example_inputs)
        with BundleWriter(path) as writer:
            directory, weights = writer.directory, serialize.weights(graph_module)
            try:
                (directory / _GRAPH).write_text(json.dumps(serialize.graph_to_json(graph_module)), encoding="utf-8")
                save_file(weights, directory / _WEIGHTS)
                (directory / _REPORT).write_text(self.report.to_json(), encoding="utf-8")
            except (OSError, SafetensorError) as error:
                raise BundleError(
                    f"the graph cannot be saved: {getattr(error, 'strerror', None) or error}",
                    where=str(path),
                    remedy="make room on the disk, or choose another output",
                ) from error
            written, _ = writer.commit(
                Manifest(
                    "graph",
                    None,
                    signature.inputs,
                    signature.outputs,
                    signature.input_structure,
                    signature.output_structure,
                    passes=manifest_passes(self.report),
                )
            )
        return written


def load(path: str | Path) -> Compiled:
    """Load what :meth:`Compiled.save` wrote: it runs, trains, exports, and compiles further.

    Raises:
        BundleError: the bundle is missing, damaged, altered, of a newer format, or holds an engine
            (:func:`fxcompress.load_engine` loads those).
    """
    read_manifest(path, kind="graph")
    directory = Path(path)
    try:
        document = json.loads((directory / _GRAPH).read_text(encoding="utf-8"))
        weights = load_file(directory / _WEIGHTS)
        report = Report.from_dict(json.loads((directory / _REPORT).read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise BundleError(
            f"the saved graph cannot be read: {error}", where=str(directory), remedy="save the model again"
        ) from error
    return Compiled(serialize.load_graph(document, weights), report)


def build_engine(
    graph_module: fx.GraphModule,
    backend: Backend,
    output: str | Path | None,
    report: Report,
    example_inputs: Sequence[Any] | None,
    *,
    verify: bool,
    outputs: list[Any] | None = None,
    progress: Callable[[str], None] | None = None,
) -> Engine:
    """Build, verify (where there are example inputs) and account for an engine; ``report.engine`` is filled in."""
    context = BuildContext(passes=manifest_passes(report), example_inputs=example_inputs)
    if progress is not None:
        context.progress = progress
    if verify and example_inputs is not None:
        proof = Proof(graph_module, example_inputs, outputs, backend.computes_in)
        context.verify, context.reference = proof.of, proof.reference
    engine = backend.build(graph_module, output, context)
    report.engine = EngineReport.from_engine(engine, report.passes)
    return engine


def latency_on(leaves: Sequence[Any], backend: Backend | None, *, repetitions: int = 30) -> Callable[..., float]:
    """For passes with a latency target: median milliseconds of a graph on a backend, by building and timing it.

    What it returns is called with a graph, the name of a backend, and flat inputs where the graph is not the model.

    Args:
        leaves: flat example inputs; their batch size is the one measured.
        backend: that the model is compiled for; a pass that names it gets its options.
        repetitions: calls measured, after five that are not.
    """

    def latency(graph_module: fx.GraphModule, name: str, own: Sequence[Any] | None = None) -> float:
        given = leaves if own is None else own
        tensors = [leaf for leaf in given if isinstance(leaf, torch.Tensor)]
        chosen = backend if backend is not None and backend.name == name else resolve_backend(name)
        with chosen.build(graph_module, None, BuildContext(example_inputs=given)) as engine:
            args, kwargs = engine.manifest.input_structure.unflatten(tensors)
            inputs = {**kwargs} if kwargs and not args else tuple(args)
            return float(engine.benchmark(inputs, repetitions=repetitions).median_ms)

    return latency


def manifest_passes(report: Report) -> tuple[ManifestPass, ...]:
    """The passes of a report as a manifest lists them."""
    return tuple(ManifestPass(item.name, dict(item.options)) for item in report.passes)


def _version(tensor: torch.Tensor) -> int:
    """How often a tensor was written in place; tensors made in inference mode do not count that."""
    return 0 if tensor.is_inference() else tensor._version
