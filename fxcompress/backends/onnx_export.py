"""A captured graph as an ONNX file: the road that every ONNX consumer shares.

graph ──lowering──▶ ExportedProgram ──torch.onnx──▶ ONNX ──clean up, onnxsim──▶ file

Nothing of it traces the model again, and the weights are not part of what is passed along: they stay the tensors that
the graph holds until they are written (:mod:`fxcompress.backends.onnx_weights`).
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import onnxscript
import torch
from torch import fx
from torch.export import ExportedProgram

from fxcompress.backends.onnx_cleanup import clean_up, resolve_casts
from fxcompress.backends.onnx_decompose import OnnxReadyProgram, RetracedProgram
from fxcompress.backends.onnx_simplify import simplify as simplify_model
from fxcompress.backends.onnx_translate import translation_table
from fxcompress.backends.onnx_weights import fold_weights, strip_weights, write_model
from fxcompress.backends.onnx_zero_points import separate_zero_points
from fxcompress.backends.signature import TensorSpec, signature_of
from fxcompress.errors import BackendError, FxCompressError
from fxcompress.graph.info import info
from fxcompress.graph.lowering import to_exported_program
from fxcompress.graph.shapes import no_guards, where
from fxcompress.quantization.depthwise import without_limits

__all__ = ["OnnxFile", "write_onnx"]


@dataclass(frozen=True)
class OnnxFile:
    """What was written.

    Attributes:
        path: the model.
        weights: the file of weights beside it; None where the model file holds them.
        inputs: in order; a dynamic size is its symbol.
        outputs: in order.
        opset: of the default domain.
        notes: sentences for the report.
        sources: name of an ONNX node → name of the node of the captured graph that it came from.
    """

    path: Path
    weights: Path | None
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    opset: int
    notes: tuple[str, ...] = ()
    sources: Mapping[str, str] = field(default_factory=dict)


def write_onnx(
    graph_module: fx.GraphModule,
    path: str | Path,
    *,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    opset: int | None = None,
    simplify: bool = True,
    onnxruntime_only: bool = False,
    progress: Callable[[str], None] | None = None,
) -> OnnxFile:
    """Write a captured graph as ONNX, with the dynamic sizes that it has.

    Args:
        graph_module: a captured graph in eval mode; it is not changed.
        path: of the ``.onnx`` file. More than 64 MiB of weights go to ``<path>.data``.
        input_names: None takes the names that the model's arguments have.
        output_names: None takes the keys of what the model returns, or ``output``, ``output_0`` …
        opset: None takes the exporter's default.
        simplify: run onnxsim and compute what depends on weights alone.
        onnxruntime_only: write operators that only ONNX Runtime has where that makes it faster.
        progress: called with a few words before each step.

    Raises:
        BackendError: an operation has no ONNX form (names it, the node and the source line), a dynamic size became a
            constant, the opset cannot be had, or the file cannot be written.
        GraphError: a layer cannot be lowered.
    """
    path, tell = Path(path), progress or (lambda _: None)
    graph_module = without_limits(graph_module)
    signature = signature_of(graph_module)
    inputs = _renamed(signature.inputs, input_names, "inputs")
    outputs = _renamed(signature.outputs, output_names, "outputs")
    tell("translate to ONNX")
    exported, notes = _export(graph_module, opset, onnxruntime_only)
    found = exported.opset_imports.get("", 0)
    if opset is not None and found != opset:
        raise BackendError(
            f"the exporter wrote ONNX opset {found}, not {opset}",
            where="opset",
            remedy=f"ask for opset {found}, or None",
        )
    names = [spec.name for spec in inputs], [spec.name for spec in outputs]
    sources = clean_up(exported, *names, info(graph_module).dim_names)
    weights = strip_weights(exported)
    model = resolve_casts(ir.to_proto(exported))
    _forget_sizes(model.graph.output)
    if simplify:
        tell("simplify ONNX")
        try:
            model = simplify_model(model)
        except (RuntimeError, TypeError, ValueError) as error:
            notes.append(f"onnxsim failed, so the ONNX file is not simplified: {_innermost(error)}")
        fold_weights(model.graph, weights)
    else:
        model = onnx.shape_inference.infer_shapes(model)
    if onnxruntime_only:
        separate_zero_points(model.graph, weights)
    _settle_sizes(model.graph.input, inputs)
    _settle_sizes(model.graph.output, outputs)
    tell("write ONNX")
    try:
        beside = write_model(model, weights, path)
    except OSError as error:
        raise BackendError(
            f"the ONNX file cannot be written: {error.strerror or error}",
            where=str(path),
            remedy="give a path in a writable directory, on a disk with room for it",
        ) from error
    return OnnxFile(path, beside, inputs, outputs, found, tuple(notes), sources)


def _renamed(specs: Sequence[TensorSpec], names: Sequence[str] | None, what: str) -> tuple[TensorSpec, ...]:
    if names is None:
        return tuple(specs)
    if len(names) != len(specs) or len(set(names)) != len(names):
        raise BackendError(
            f"{len(names)} names for {len(specs)} {what}: {', '.join(names)}",
            where=what,
            remedy="give one name for each",
        )
    return tuple(replace(spec, name=name) for spec, name in zip(specs, names, strict=True))


# --- translation -----------------------------------------------------------------------------------------------------


def _export(graph_module: fx.GraphModule, opset: int | None, onnxruntime_only: bool) -> tuple[ir.Model, list[str]]:
    program = OnnxReadyProgram.of(graph_module)
    # What the exporter asks about sizes must not become facts about the symbols, which are the graph's own.
    with no_guards(info(graph_module).fake_mode):
        try:
            table = translation_table(onnxscript.opset18, opset or 0, _contributed, onnxruntime_only=onnxruntime_only)
            return _translate(program, opset, table), []
        except torch.onnx.errors.OnnxExporterError as error:
            first = error
        # torch's own road: slow, for it traces the whole model again, but it may know something that ours does not.
        try:
            model = _translate(to_exported_program(graph_module, program_type=RetracedProgram), opset, None)
        except torch.onnx.errors.OnnxExporterError:
            raise _explain(first, program.decomposed) from first
    reason = _innermost(first)
    return model, [f"the exporter decomposed the whole model, since the quick way failed: {reason}"]


def _translate(program: ExportedProgram, opset: int | None, table: dict[Any, Any] | None) -> ir.Model:
    with warnings.catch_warnings(), _quiet("torch.onnx"):
        warnings.simplefilter("ignore")
        exported = torch.onnx.export(
            program,
            (),
            None,
            dynamo=True,
            verbose=False,
            optimize=False,
            opset_version=opset,
            custom_translation_table=table,
        )
    assert exported is not None
    return exported.model


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _causes(error: BaseException) -> list[BaseException]:
    chain: list[BaseException] = [error]
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    return chain


def _contributed(schema: onnx.defs.OpSchema) -> Callable[..., Any]:
    """A function that writes an operator of another domain than ONNX's own."""
    domain = onnxscript.values.Opset(schema.domain, schema.since_version)
    return onnxscript.values.Op(domain, schema.name, schema)


def _innermost(error: BaseException) -> str:
    lines = str(_causes(error)[-1]).strip().splitlines()
    return lines[0] if lines else repr(error)


def _explain(error: Exception, decomposed: ExportedProgram | None) -> BackendError:
    ours = next((cause for cause in _causes(error) if isinstance(cause, FxCompressError)), None)
    if ours is not None:
        return BackendError(ours.problem, where=ours.where, remedy=ours.remedy)
    found = next((m for e in _causes(error) if (m := re.search(r"translating node %(\w+)", str(e)))), None)
    nodes = {node.name: node for node in (decomposed.graph.nodes if decomposed else ())}
    node = nodes.get(found[1]) if found else None
    if node is None:
        return BackendError(
            f"the graph cannot be translated to ONNX: {_innermost(error)}", remedy="see the error above this one"
        )
    reason = _innermost(error)
    lacking = "No ONNX function" in reason
    operation = node.meta.get("origin") or node.target
    problem = f"ONNX has no form for {operation}" if lacking else f"{operation} cannot be translated: {reason}"
    return BackendError(
        problem,
        where=where(node),
        remedy="write that line of the model with other operations, or use a backend that runs PyTorch's own graph",
    )


# --- sizes -----------------------------------------------------------------------------------------------------------


def _forget_sizes(values: Any) -> None:
    """What the graph makes of its inputs is to be seen from its nodes, not from what the exporter said."""
    for value in values:
        for size in value.type.tensor_type.shape.dim:
            size.Clear()


def _settle_sizes(values: Any, specs: Sequence[TensorSpec]) -> None:
    """Check that each size is dynamic where the captured graph has it dynamic, and constant where not; then name it."""
    found = {value.name: value for value in values}
    for spec in specs:
        if spec.name not in found:
            raise BackendError(f"the ONNX graph has no {spec.name!r}", remedy="report this as a bug of fxcompress")
        shape = found[spec.name].type.tensor_type.shape
        if len(shape.dim) != len(spec.shape):
            _wrong(spec, f"has {len(shape.dim)} dims")
        for index, (size, wanted) in enumerate(zip(shape.dim, spec.shape, strict=True)):
            constant = size.dim_value if size.HasField("dim_value") else None
            if isinstance(wanted, str):
                if constant is not None:
                    _wrong(spec, f"has a fixed size of {constant} in dim {index}, which shall be {wanted!r}")
                size.dim_param = wanted
            else:
                if constant not in (None, wanted):
                    _wrong(spec, f"has a size of {constant} in dim {index} instead of {wanted}")
                size.dim_value = wanted


def _wrong(spec: TensorSpec, what: str) -> None:
    raise BackendError(
        f"in the ONNX graph {spec.name!r} {what}",
        where=str(spec),
        remedy="a pass or the model fixed the size, in the shape of a reshape say; compute it from the input's size",
    )
