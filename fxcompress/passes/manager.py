"""Runs passes one after another: on a working copy, verified, proved or measured on the example inputs, recorded."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import fx

from fxcompress.analysis.cost import Cost, cost
from fxcompress.errors import (
    FxCompressError,
    GraphError,
    PassError,
    PreconditionError,
    TrainingError,
    VerificationError,
)
from fxcompress.graph.casting import cast_graph, cast_leaves
from fxcompress.graph.edit import copy_graph
from fxcompress.graph.printer import format_graph
from fxcompress.graph.running import max_relative_error, nested_inputs, outputs_of
from fxcompress.graph.shapes import source_line
from fxcompress.graph.verify import verify
from fxcompress.passes.base import Numerics, Pass, PassContext, PassResult

__all__ = ["PassManager", "PassRecord", "PassRun", "tolerance"]

# Largest |difference| relative to the largest |output| that rounding alone explains, by dtype of the output.
_REASSOCIATED = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


@dataclass(frozen=True)
class PassRecord:
    """What one pass did, and what it cost.

    Attributes:
        seconds: run time of the pass alone.
        error: largest relative error of the outputs against those before the pass; None without example inputs.
        tolerance: what ``error`` had to stay within; None for a LOSSY pass, whose error is only reported. Where the
            model itself amplifies rounding, both are of the same pass run on the model in float64.
    """

    pass_: Pass
    result: PassResult
    seconds: float
    before: Cost
    after: Cost
    error: float | None
    tolerance: float | None


@dataclass(frozen=True)
class PassRun:
    """The graph after all passes, the account of each, and its outputs on the example inputs (if it was run)."""

    graph_module: fx.GraphModule
    records: tuple[PassRecord, ...]
    outputs: list[Any] | None


def tolerance(numerics: Numerics, outputs: Sequence[Any]) -> float | None:
    """The relative error that a numerics class allows for these outputs; None where any is allowed."""
    if numerics is Numerics.LOSSY:
        return None
    if numerics is Numerics.EXACT:
        return 0.0
    dtypes = {leaf.dtype for leaf in outputs if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()}
    return max((_REASSOCIATED.get(dtype, 1e-1) for dtype in dtypes), default=0.0)


class PassManager:
    """A list of passes and how to run it.

    Args:
        passes: run in this order.
        prove: run the graph on the example inputs before and after each pass. Without it shapes and invariants
            are still verified.
    """

    def __init__(self, passes: Sequence[Pass], *, prove: bool = True) -> None:
        self.passes = tuple(passes)
        self.prove = prove

    def run(
        self,
        graph_module: fx.GraphModule,
        context: PassContext,
        *,
        outputs: list[Any] | None = None,
        on_step: Callable[[int, Pass], None] | None = None,
    ) -> PassRun:
        """Run all passes; ``graph_module`` itself is left as it is.

        Args:
            graph_module: a captured graph.
            context: example inputs, seed, and what else passes may know.
            outputs: of ``graph_module`` on the example inputs, where they are known already.
            on_step: called with the index of each pass before it runs.

        Raises:
            PassError: a pass failed, or returned a graph that breaks an invariant; names the pass, the node with its
                source line, and a file with the graph that the pass was given.
            VerificationError: a pass that promises equal outputs changed them; names the pass and the output.
        """
        context = replace(context, prove=self.prove)
        records: list[PassRecord] = []
        current, before = graph_module, cost(graph_module)
        if outputs is None or not self.prove:
            outputs = self._outputs(current, context)
        for index, pass_ in enumerate(self.passes):
            if on_step is not None:
                on_step(index, pass_)
            if pass_.needs_inputs and context.example_inputs is None:
                raise PreconditionError(
                    f"the pass {pass_.name!r} needs example inputs", remedy="give example_inputs to compile()"
                )
            start = time.perf_counter()
            result = _run(pass_, current, context)
            seconds = time.perf_counter() - start
            after, error, allowed = before, 0.0 if outputs is not None else None, None
            if result.changed:
                after = cost(result.graph_module)
                if outputs is not None:
                    try:
                        fresh = self._outputs(result.graph_module, context)
                    except Exception as failure:
                        raise _failed(pass_, current, failure, "left a graph that does not run") from failure
                    assert fresh is not None
                    error, allowed = self._prove(pass_, current, context, outputs, fresh)
                    outputs = fresh
                current = result.graph_module
            records.append(PassRecord(pass_, result, seconds, before, after, error, allowed))
            before = after
        return PassRun(current, tuple(records), outputs)

    def _prove(
        self,
        pass_: Pass,
        graph_module: fx.GraphModule,
        context: PassContext,
        before: list[Any],
        after: list[Any],
    ) -> tuple[float, float | None]:
        error, index = max_relative_error(before, after)
        allowed = tolerance(pass_.numerics, before)
        if allowed is None or error <= allowed:
            return error, allowed
        if pass_.numerics is Numerics.REASSOCIATED:
            # A deep model may amplify rounding beyond any fixed bound. In float64 a right rewrite still agrees.
            precise = self._error_in_float64(pass_, graph_module, context)
            bound = _REASSOCIATED[torch.float64]
            if precise is not None and precise <= bound:
                return precise, bound
        raise VerificationError(
            f"the pass {pass_} promises {pass_.numerics.value} outputs, but output {index} of {len(before)} "
            f"moved by {error:.3g} relative to its largest value; {allowed:.3g} is allowed",
            where=pass_.name,
            remedy="leave the pass out and report this; your model is as it was",
        )

    def _error_in_float64(self, pass_: Pass, graph_module: fx.GraphModule, context: PassContext) -> float | None:
        """The error of the pass on a float64 copy of the graph; None where the graph cannot run in float64."""
        assert context.example_inputs is not None
        wide = replace(context, example_inputs=cast_leaves(list(context.example_inputs), torch.float64))
        try:
            copied = cast_graph(graph_module, torch.float64)
            before = self._outputs(copied, wide)
            after = self._outputs(_run(pass_, copied, wide).graph_module, wide)
        except (FxCompressError, RuntimeError, TypeError):
            return None
        assert before is not None and after is not None
        return max_relative_error(before, after)[0]

    def _outputs(self, graph_module: fx.GraphModule, context: PassContext) -> list[Any] | None:
        if not self.prove or not self.passes or context.example_inputs is None:
            return None
        args, kwargs = nested_inputs(graph_module, context.example_inputs)
        return outputs_of(graph_module, args, kwargs, context.seed)


def _run(pass_: Pass, graph_module: fx.GraphModule, context: PassContext) -> PassResult:
    try:
        result = pass_.run(copy_graph(graph_module), context)
        if not isinstance(result, PassResult):
            raise GraphError(f"run() returned a {type(result).__name__}", remedy="return a PassResult")
        verify(result.graph_module)
        return result
    except (PreconditionError, TrainingError):
        raise
    except Exception as error:
        raise _failed(pass_, graph_module, error, "failed") from error


def _failed(pass_: Pass, graph_module: fx.GraphModule, error: Exception, how: str) -> PassError:
    problem = error.problem if isinstance(error, FxCompressError) else f"{type(error).__name__}: {error}"
    place = error.where if isinstance(error, FxCompressError) else _node_in_traceback(error)
    return PassError(
        f"the pass {pass_} {how}: {problem}",
        where=place,
        remedy=f"the graph it was given is in {_dump(pass_, graph_module)}; your model is as it was",
    )


def _node_in_traceback(error: BaseException) -> str | None:
    """The last graph node that a failing pass had in a local variable, with the user's line."""
    trace, found = error.__traceback__, None
    while trace is not None:
        for value in trace.tb_frame.f_locals.values():
            if isinstance(value, fx.Node):
                line = source_line(value)
                found = f"node {value.name!r}" + (f" ({line})" if line else "")
        trace = trace.tb_next
    return found


def _dump(pass_: Pass, graph_module: fx.GraphModule) -> Path:
    with tempfile.NamedTemporaryFile(
        "w", prefix=f"fxcompress-{pass_.name}-", suffix=".txt", delete=False, encoding="utf-8"
    ) as file:
        file.write(format_graph(graph_module))
    return Path(file.name)
