"""``compile()``: capture, passes, engine, report; readable from top to bottom."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import fx, nn
from torch.export import ExportedProgram

from fxcompress.backends.base import Backend
from fxcompress.backends.bundle_writer import check_output
from fxcompress.backends.registry import resolve_backend
from fxcompress.capture import capture
from fxcompress.capture.check import CaptureCheck, check_capture
from fxcompress.capture.inputs import example_inputs as as_inputs
from fxcompress.compiled import Compiled, build_engine, latency_on
from fxcompress.errors import OptionError
from fxcompress.graph.running import flat_inputs
from fxcompress.passes.base import Pass, PassContext
from fxcompress.passes.manager import PassManager
from fxcompress.passes.registry import resolve_passes
from fxcompress.reporting.model import CaptureReport, PassReport, Report
from fxcompress.reporting.progress import Progress

__all__ = ["compile"]


def compile(
    model: nn.Module | ExportedProgram | fx.GraphModule | Compiled,
    passes: Sequence[Pass | str] = (),
    example_inputs: object = None,
    *,
    dynamic_shapes: object = "batch",
    backend: str | Backend | None = None,
    output: str | Path | None = None,
    verify: bool = True,
    progress: Literal["auto"] | bool | Callable[[int, int, str], None] = "auto",
) -> Compiled:
    """Capture a model, rewrite it with passes, and lower it to an engine. The model itself is never changed.

    Args:
        model: an ``nn.Module`` in eval mode, an ``ExportedProgram``, a ``GraphModule``, or a compiled model.
        passes: instances, or names with options (``"prune_channels(ratio=0.5)"``), run in this order. With none the
            model is captured and lowered as it is.
        example_inputs: positional arguments as a tuple, or keyword arguments as a dict. Needed for shapes, for the
            proof of each pass, and for engines.
        dynamic_shapes: ``"batch"`` keeps the first dim free; None fixes all sizes; or per argument and dim,
            ``{"x": {0: "batch", 2: "height"}}``.
        backend: name or instance of the backend that builds the engine; None builds none.
        output: directory of the engine's bundle, or of the saved graph if there is no backend. It must not exist,
            or be empty. None keeps the engine in a temporary directory for as long as it lives.
        verify: compare the captured graph with the model, the graph before and after each pass, and the engine with
            PyTorch, at two sizes of the dynamic dims.
        progress: ``"auto"`` shows a bar on a terminal; or True, False, or a function of ``(done, total, what)``.

    Raises:
        PreconditionError: the model, its inputs, a pass or an option is not usable; says what to do.
        CaptureError: the model has no functional graph.
        PassError: a pass failed. VerificationError: outputs moved further than they may.
        BackendError: the engine cannot be built. BundleError: the output cannot be written.
    """
    steps = resolve_passes(passes)
    lowering = resolve_backend(backend) if backend is not None else None
    if output is not None:
        check_output(output)
    if lowering is not None and example_inputs is None and not isinstance(model, (ExportedProgram, Compiled)):
        raise OptionError(
            f"the backend {lowering.name!r} needs shapes",
            where="example_inputs",
            remedy="give example_inputs, such as (torch.randn(2, 3, 224, 224),)",
        )
    with Progress(progress, total=len(steps) + 2 + (lowering is not None)) as bar:
        bar.step("capture")
        source = model.module if isinstance(model, Compiled) else model
        started = time.perf_counter()
        captured = capture(source, example_inputs, dynamic_shapes=dynamic_shapes)
        seconds = time.perf_counter() - started
        leaves = _leaves(model, captured, example_inputs)
        check = None
        if verify and leaves is not None:
            bar.detail("compare with the model")
            check = check_capture(source, captured, leaves)
        manager = PassManager(steps, prove=verify)
        latency = latency_on(leaves, lowering) if leaves is not None else None
        context = PassContext(
            example_inputs=leaves,
            original=captured,
            progress=bar.part,
            latency=latency,
            check_backend=resolve_backend,
        )
        run = manager.run(
            captured,
            context,
            outputs=check.outputs if check is not None else None,
            on_step=lambda _, pass_: bar.step(str(pass_)),
        )
        bar.step("report")
        graph_module = run.graph_module
        report = _report(model, captured, seconds, check, run.records)
        report.describe(graph_module)
        compiled = Compiled(graph_module, report, example_inputs=leaves, shared_with=_tensors(source))
        if lowering is not None:
            bar.step(f"build {lowering.name} engine")
            compiled.engine = build_engine(
                graph_module,
                lowering,
                output,
                report,
                leaves,
                verify=verify,
                outputs=run.outputs,
                progress=bar.detail,
            )
        elif output is not None:
            compiled.save(output)
    return compiled


def _leaves(model: object, captured: fx.GraphModule, example_inputs: object) -> list[Any] | None:
    """Flat example inputs: the user's, or those that the model came with."""
    if example_inputs is not None:
        inputs = as_inputs(example_inputs)
        return flat_inputs(captured, inputs.args, inputs.kwargs)
    if isinstance(model, Compiled):
        return list(model._example_inputs) if model._example_inputs is not None else None
    if isinstance(model, ExportedProgram) and model.example_inputs is not None:
        args, kwargs = model.example_inputs
        return flat_inputs(captured, args, kwargs)
    return None


def _tensors(model: object) -> list[torch.Tensor]:
    if isinstance(model, ExportedProgram):
        held = [*model.state_dict.values(), *model.constants.values()]
        return [tensor for tensor in held if isinstance(tensor, torch.Tensor)]
    assert isinstance(model, nn.Module)
    held = [*model.parameters(), *model.buffers()]
    # Tensors that are plain attributes become constants of the graph.
    held += [value for module in model.modules() for value in vars(module).values() if isinstance(value, torch.Tensor)]
    return held


def _report(
    model: object, captured: fx.GraphModule, seconds: float, check: CaptureCheck | None, records: Sequence[Any]
) -> Report:
    from fxcompress.graph.info import info

    notes = [*info(captured).notes, *(check.notes if check is not None else ())]
    if not records:
        notes.append("no passes were given: the model is as captured")
    return Report(
        model=type(model).__name__,
        capture=CaptureReport(
            seconds=seconds,
            nodes=len(captured.graph.nodes),
            errors=check.errors if check is not None else {},
            notes=notes,
        ),
        passes=[PassReport.from_record(record) for record in records],
    )
