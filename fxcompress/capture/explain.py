"""What an exception out of tracing means for the user, and which of the user's lines it is about."""

from __future__ import annotations

import os
import re
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from fxcompress.errors import CaptureError

__all__ = ["explain", "first_line", "is_theirs", "lines_that_fix_sizes", "running_line", "user_line"]

# Frames under these are not the user's.
_NOT_THEIRS = (f"{Path(__file__).parents[1]}{os.sep}", f"{Path(torch.__file__).parent}{os.sep}", "<")


# What torch says of a dim that became a constant: the input, the dim, the constant.
_FIXED = re.compile(r"L\['(\w+)'\](.*?)\.size\(\)\[(\d+)\] as dynamic but .* to be a constant \((\d+)\)")


def explain(error: Exception, fixed_at: Mapping[int, set[str]] | None = None) -> CaptureError:
    """The typed error for an exception of ``torch.export``.

    Args:
        error: the exception.
        fixed_at: what :func:`lines_that_fix_sizes` saw.
    """
    text = str(error).strip() or repr(error)
    kind = type(error).__name__
    line = first_line(error)
    if "onstraint" in kind or "Constraints violated" in text or "specialized" in text:
        detail = next((part.strip(" -") for part in text.splitlines() if "specialized" in part or "- " in part), line)
        where, remedy = user_line(error), "leave this dim out of dynamic_shapes; dynamic_shapes=None fixes all sizes"
        if found := _FIXED.search(text):
            name, part, dim, size = found.groups()
            detail = f"dim {dim} of {name}{part} is always {size}"
            remedy = f"take the size from {name}{part}.shape[{dim}] where the code says {size}, or {remedy}"
            lines = (fixed_at or {}).get(int(size), set())
            where = next(iter(lines)) if len(lines) == 1 else where
        return CaptureError(
            f"the model fixes a size that should be dynamic: {detail}",
            where=where,
            remedy=remedy,
        )
    if "DataDependent" in kind or "data-dependent" in text or "data dependent" in text:
        return CaptureError(
            f"the model's control flow or shapes depend on the values of tensors: {line}",
            where=user_line(error),
            remedy="replace the Python 'if' or 'while' on a tensor by torch.where or torch.cond",
        )
    return CaptureError(
        f"torch.export cannot capture the model: {kind}: {line}",
        where=user_line(error),
        remedy="see the error above this one for the operation; simplify or replace it",
    )


@contextmanager
def lines_that_fix_sizes() -> Iterator[dict[int, set[str]]]:
    """Inside the block, the lines of the user's code that make a constant of a dynamic size, by that constant."""
    seen: dict[int, set[str]] = {}
    outside = len(traceback.extract_stack())  # of the block: these lines call the capture, not the model
    replace = getattr(ShapeEnv, "_set_replacement", None)
    if replace is None:  # a torch that does it elsewhere: errors then lack the line
        yield seen
        return

    def watched(self: ShapeEnv, symbol: Any, target: Any, *rest: Any, **named: Any) -> Any:
        if getattr(target, "is_Integer", False) and (line := running_line(outside)) is not None:
            seen.setdefault(int(target), set()).add(line)
        return replace(self, symbol, target, *rest, **named)

    ShapeEnv._set_replacement = watched  # type: ignore[method-assign, assignment]
    try:
        yield seen
    finally:
        ShapeEnv._set_replacement = replace  # type: ignore[method-assign]


def first_line(error: BaseException) -> str:
    """The first line of an exception's text that says something, or its class."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def user_line(error: BaseException) -> str | None:
    """The innermost line of the user's code that the error came through: ``"model.py:12, if x.sum() > 0:"``."""
    return _innermost(traceback.extract_tb(error.__traceback__))


def running_line(outside: int = 0) -> str | None:
    """The innermost line of the user's code that is running now, the ``outside`` outermost frames left out."""
    return _innermost(traceback.StackSummary.from_list(traceback.extract_stack()[outside:]))


def is_theirs(filename: str) -> bool:
    """Whether a frame of this file is the user's code, and not ours, torch's, or generated."""
    return not filename.startswith(_NOT_THEIRS)


def _innermost(frames: traceback.StackSummary) -> str | None:
    for frame in reversed(frames):
        if is_theirs(frame.filename):
            return f"{frame.filename}:{frame.lineno}, {frame.line}"
    return None
