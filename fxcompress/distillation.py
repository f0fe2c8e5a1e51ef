"""``distill()``: a model of one's own learns from another."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

from fxcompress.compiled import Compiled
from fxcompress.compiler import compile as compile_model
from fxcompress.errors import OptionError
from fxcompress.passes.distill import Distill
from fxcompress.passes.registry import make_pass

__all__ = ["distill"]


def distill(
    teacher: Any,
    student: Any,
    data: Iterable[Any],
    example_inputs: object = None,
    *,
    dynamic_shapes: object = "batch",
    progress: Literal["auto"] | bool | Callable[[int, int, str], None] = "auto",
    **options: Any,
) -> Compiled:
    """Train a student that is no part of the teacher: capture it, distil, and give it back compiled.

    Neither model is changed: the result is ``compiled.module``, and compiles further.

    Args:
        teacher: a module in eval mode, a captured graph, a compiled model, or several in a tuple.
        student: what ``compile`` takes, with inputs and outputs like the teacher's.
        data: batches: what the models take, with labels or without.
        example_inputs: as ``compile`` takes them.
        dynamic_shapes: as ``compile`` takes them.
        progress: as ``compile`` takes it.
        options: of the pass ``Distill``: ``epochs``, ``alpha``, ``features``, …

    Raises:
        OptionError: an unknown option; the nearest is suggested.
        PreconditionError: data, teacher or student cannot be used; says what to do.
        TrainingError: the loss is not finite.
    """
    if teacher is None:
        raise OptionError("there is no teacher", where="teacher", remedy="give a torch.nn.Module in eval mode")
    pass_ = make_pass(Distill, {"loader": data, "teacher": teacher, **options})
    return compile_model(student, [pass_], example_inputs, dynamic_shapes=dynamic_shapes, progress=progress)
