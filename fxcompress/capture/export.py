"""The front end: ``torch.export`` (non-strict, pre-dispatch ATen) of the user's model."""

from __future__ import annotations

import inspect
import io
import logging
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, redirect_stderr
from typing import Any, TextIO

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.overrides import TorchFunctionMode

from fxcompress.capture.dynamic import Marks, at_least_two, attempts, export_shapes
from fxcompress.capture.explain import explain, first_line, lines_that_fix_sizes, user_line
from fxcompress.capture.inputs import ExampleInputs, register_dataclasses
from fxcompress.capture.lean import lean_export
from fxcompress.capture.preserve import preserved
from fxcompress.errors import PreconditionError
from fxcompress.graph.recurrent import KnownShapes

__all__ = ["export_program"]

_GET_DATA = torch.Tensor.data.__get__  # type: ignore[attr-defined]


def export_program(model: nn.Module, inputs: ExampleInputs, marks: Marks, wanted: object) -> ExportedProgram:
    """``torch.export`` of the user's model, which is left as it was.

    Args:
        model: in eval mode.
        inputs: one call, keywords in the order of ``forward``'s parameters.
        marks: the dynamic dims of each input.
        wanted: what the user asked for as ``dynamic_shapes``.

    Raises:
        CaptureError: data-dependent control flow, a batch size that the model bakes in, an unsupported operation.
        PreconditionError: the model itself does not take these inputs.
    """
    _refuse_empty(inputs)
    errors: list[Exception] = []
    with lines_that_fix_sizes() as fixed_at:
        for number, attempt in enumerate(attempts(marks, wanted)):
            try:
                program = _export(model, at_least_two(inputs, marks), attempt)
            except Exception as error:  # noqa: BLE001  (tracing runs the user's code: it may raise anything)
                errors.append(error)
            else:
                # Only the first tensor's batch is certain: an input that merely is as long may be fixed.
                if number == 0 or wanted != "batch" or _first_batch_is_dynamic(program):
                    return program
    _refuse_unfit(model, inputs)
    raise explain(errors[0], fixed_at) from errors[0]


def _export(model: nn.Module, inputs: ExampleInputs, marks: Marks) -> ExportedProgram:
    positional, keywords = export_shapes(inputs, marks)
    with ExitStack() as stack:
        stack.enter_context(preserved(model))
        stack.enter_context(warnings.catch_warnings(action="ignore"))
        stack.enter_context(redirect_stderr(_WithoutGraphs(sys.stderr)))
        stack.enter_context(_without_guesses())
        if any(isinstance(module, nn.RNNBase) for module in model.modules()):
            stack.enter_context(KnownShapes())
        stack.enter_context(_DataIsDetached())
        stack.enter_context(lean_export())
        model.register_forward_hook(lambda module, args, output: register_dataclasses(output))
        signature = _name_keywords(model, inputs)
        shapes = dict(signature.bind(*positional, **keywords).arguments)
        return torch.export.export(model, inputs.args, inputs.kwargs, dynamic_shapes=shapes, strict=False)


def _name_keywords(model: nn.Module, inputs: ExampleInputs) -> inspect.Signature:
    """The signature of ``forward`` with what ``**kwargs`` takes spelled out: torch gives those no dynamic shapes."""
    forward = model.forward
    signature = inspect.signature(forward)
    known = {name: p for name, p in signature.parameters.items() if p.kind is not inspect.Parameter.VAR_KEYWORD}
    extra = [name for name in inputs.kwargs if name not in known]
    if not extra:
        return signature
    named = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in extra]
    spelled = inspect.Signature([*known.values(), *named])

    def explicit(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    explicit.__signature__ = spelled  # type: ignore[attr-defined]
    model.forward = explicit  # the caller restores it
    return spelled


@contextmanager
def _without_guesses() -> Iterator[None]:
    """Without torch's warning that it cannot tell whose code failed: the error that follows tells."""

    def keep(record: logging.LogRecord) -> bool:
        return "Unable to find user code" not in record.getMessage()

    logger = logging.getLogger("torch.fx.experimental.symbolic_shapes")
    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)


class _DataIsDetached(TorchFunctionMode):
    """``x.data`` is what export cannot trace; ``x.detach()`` is the same without gradients."""

    def __torch_function__(
        self,
        func: Any,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func == _GET_DATA:
            return args[0].detach()
        return func(*args, **(kwargs or {}))


def _first_batch_is_dynamic(program: ExportedProgram) -> bool:
    for node in program.graph.nodes:
        if node.op == "placeholder" and node.name in program.graph_signature.user_inputs:
            value = node.meta["val"]
            if isinstance(value, torch.Tensor) and value.dim() > 0:
                return isinstance(value.shape[0], torch.SymInt)
    return False


def _refuse_empty(inputs: ExampleInputs) -> None:
    """Of a size of 0 neither a dynamic size nor a proof can be had.

    Raises:
        PreconditionError: an example input holds no element.
    """
    for leaf in inputs.leaves:
        if isinstance(leaf, torch.Tensor) and leaf.numel() == 0:
            raise PreconditionError(
                f"an example input of shape {list(leaf.shape)} is empty",
                where="example_inputs",
                remedy="give inputs with at least one element, such as a batch of 2",
            )


def _refuse_unfit(model: nn.Module, inputs: ExampleInputs) -> None:
    """Inputs that the model itself does not take are the reason why it was not captured.

    Raises:
        PreconditionError: the model fails on its example inputs.
    """
    try:
        with preserved(model), torch.no_grad():
            model(*inputs.args, **inputs.kwargs)
    except Exception as error:
        raise PreconditionError(
            f"the model does not take these example inputs: {type(error).__name__}: {first_line(error)}",
            where=user_line(error) or "example_inputs",
            remedy="give inputs of the shapes and dtypes that the model takes",
        ) from error


class _WithoutGraphs(io.TextIOBase):
    """Standard error without the half-made graph, and the blank lines after it, that torch prints on a failure."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._after_graph = False

    def write(self, text: str) -> int:
        self._after_graph = "def forward(self" in text or (self._after_graph and text.isspace())
        return len(text) if self._after_graph else self._stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
