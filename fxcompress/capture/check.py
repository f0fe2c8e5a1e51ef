"""Proof that a captured graph computes what the user's model does."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram

from fxcompress.capture.explain import first_line, user_line
from fxcompress.capture.preserve import preserved
from fxcompress.errors import PreconditionError, VerificationError
from fxcompress.graph.info import info
from fxcompress.graph.running import dynamic_sizes, max_relative_error, nested_inputs, outputs_of, resized

__all__ = ["CaptureCheck", "check_capture"]

# Capture repeats the user's operations one for one; only kernels chosen by layout may round otherwise.
_ALLOWED = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class CaptureCheck:
    """What the comparison of a captured graph with the model found.

    Attributes:
        errors: largest relative error by sizes of the dynamic dims: ``{"batch=2": 0.0, "batch=1": 0.0}``.
        outputs: flat outputs of the graph on the example inputs.
        notes: what could not be compared, and why.
    """

    errors: dict[str, float]
    outputs: list[Any]
    notes: list[str] = field(default_factory=list)


def check_capture(
    model: nn.Module | ExportedProgram, graph_module: fx.GraphModule, leaves: Sequence[Any]
) -> CaptureCheck:
    """Run model and graph on the example inputs, and again at other sizes of the dynamic dims.

    Args:
        model: the user's; it is left as it was.
        graph_module: what :func:`~fxcompress.capture.capture` made of it.
        leaves: flat example inputs.

    Raises:
        PreconditionError: the model fails on its example inputs.
        VerificationError: the graph computes something else.
    """
    if isinstance(model, ExportedProgram):
        model = model.module(check_guards=False)
    errors: dict[str, float] = {}
    outputs: list[Any] = []
    notes: list[str] = []
    for index, inputs in enumerate(chain([leaves], other_sizes(graph_module, leaves))):
        sizes = _told(graph_module, inputs)
        args, kwargs = nested_inputs(graph_module, inputs)
        try:
            with preserved(model):
                theirs = outputs_of(model, *_fresh(args, kwargs))
        except Exception as error:
            if index == 0:
                raise PreconditionError(
                    f"the model does not take these example inputs: {type(error).__name__}: {first_line(error)}",
                    where=user_line(error) or "example_inputs",
                    remedy="give inputs of the shapes, dtypes and values that the model takes",
                ) from error
            notes.append(f"the model itself fails at {sizes}: {type(error).__name__}: {error}".splitlines()[0])
            continue
        try:
            ours = outputs_of(graph_module, args, kwargs)
        except Exception as error:
            raise VerificationError(
                f"the captured graph fails at {sizes}, where the model runs: {type(error).__name__}: "
                f"{first_line(error)}",
                remedy="fix the sizes that the model does not take free, by dynamic_shapes, and report this",
            ) from error
        if index == 0:
            outputs = ours
            notes += _unproved(theirs)
        error_, output = max_relative_error(theirs, ours)
        errors[sizes] = error_
        dtypes = [leaf.dtype for leaf in theirs if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()]
        allowed = max((_ALLOWED.get(dtype, 5e-2) for dtype in dtypes), default=0.0)
        if not error_ <= allowed:
            raise VerificationError(
                f"the captured graph differs from the model: output {output} by {error_:.3g} relative to its largest "
                f"value at {sizes}; {allowed:.3g} is allowed",
                remedy="the forward pass depends on something that tracing does not see: global state, random numbers "
                "of another library, or a Python branch on a size; verify=False skips this check",
            )
        if index > 0:
            break
    return CaptureCheck(errors, outputs, notes)


def _unproved(outputs: Sequence[Any]) -> list[str]:
    """A note for each output that says nothing, because no value of it is finite."""
    return [
        f"output {index} has no finite value on the example inputs: nothing about it is proved or measured"
        for index, leaf in enumerate(outputs)
        if isinstance(leaf, torch.Tensor) and leaf.numel() > 0 and leaf.is_floating_point()
        if not bool(torch.isfinite(leaf).any())
    ]


def other_sizes(graph_module: fx.GraphModule, leaves: Sequence[Any]) -> Iterator[list[Any]]:
    """The example inputs at other sizes, the first choice first; none where nothing is dynamic.

    The batch becomes 1 (or 2, if it is 1): the size that engines mostly run at, and the cheapest; every other dynamic
    dim one longer. A model that does not run at these may need even sizes: then every size twice as large.
    """
    sizes = dynamic_sizes(graph_module, leaves)
    if not sizes:
        return
    names = info(graph_module).dim_names
    other = {s: (2 if size == 1 else 1) if names.get(s) == "batch" else size + 1 for s, size in sizes.items()}
    for wanted in (other, {symbol: 2 * size for symbol, size in sizes.items()}):
        if (found := resized(graph_module, leaves, wanted)) is not None:
            yield found


def _told(graph_module: fx.GraphModule, leaves: Sequence[Any]) -> str:
    names = info(graph_module).dim_names
    sizes = dynamic_sizes(graph_module, leaves)
    told = {names.get(symbol, symbol): size for symbol, size in sizes.items()}  # several symbols may be one batch
    return ", ".join(f"{name}={size}" for name, size in told.items()) or "fixed sizes"


def _fresh(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    # A model may write into its inputs; the user's example tensors are not ours to let it write into.
    from torch.utils import _pytree as pytree

    copied = pytree.tree_map_only(torch.Tensor, torch.Tensor.clone, (args, kwargs))
    return copied[0], copied[1]
