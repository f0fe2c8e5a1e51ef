"""What an exception out of tracing means for the user, and which of the user's lines it is about."""

from __future__ import annotations

import os
import traceback
from pathlib import Path

import torch

from fxcompress.errors import CaptureError

__all__ = ["explain", "first_line", "is_theirs", "running_line", "user_line"]

# Frames under these are not the user's.
_NOT_THEIRS = (f"{Path(__file__).parents[1]}{os.sep}", f"{Path(torch.__file__).parent}{os.sep}", "<")


def explain(error: Exception) -> CaptureError:
    """The typed error for an exception of ``torch.export``."""
    text = str(error).strip() or repr(error)
    kind = type(error).__name__
    line = first_line(error)
    if "onstraint" in kind or "Constraints violated" in text or "specialized" in text:
        detail = next((part.strip() for part in text.splitlines() if "specialized" in part or "- " in part), line)
        return CaptureError(
            f"the model fixes a size that should be dynamic: {detail}",
            where=user_line(error),
            remedy="mark fewer dims in dynamic_shapes, or dynamic_shapes=None for fixed sizes",
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


def first_line(error: BaseException) -> str:
    """The first line of an exception's text that says something, or its class."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def user_line(error: BaseException) -> str | None:
    """The innermost line of the user's code that the error came through: ``"model.py:12, if x.sum() > 0:"``."""
    return _innermost(traceback.extract_tb(error.__traceback__))


def running_line() -> str | None:
    """The innermost line of the user's code that is running now."""
    return _innermost(traceback.extract_stack())


def is_theirs(filename: str) -> bool:
    """Whether a frame of this file is the user's code, and not ours, torch's, or generated."""
    return not filename.startswith(_NOT_THEIRS)


def _innermost(frames: traceback.StackSummary) -> str | None:
    for frame in reversed(frames):
        if is_theirs(frame.filename):
            return f"{frame.filename}:{frame.lineno}, {frame.line}"
    return None
