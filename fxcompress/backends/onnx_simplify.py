"""onnxsim, without what it says on standard error about constants that it leaves as they are."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

import onnx
import onnxsim

__all__ = ["simplify"]

_STDERR = 2


def simplify(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model as onnxsim makes it.

    A constant that onnxsim cannot compute, such as a cast to bfloat16, stays an operator. It tells of each with a
    traceback; that goes to this module's logger, as debugging output.

    Raises:
        RuntimeError, TypeError, ValueError: what onnxsim raises; then standard error has all that it wrote.
    """
    with _held_back():
        simplified, _ = onnxsim.simplify(model)
    return simplified


@contextmanager
def _held_back() -> Iterator[None]:
    """Keep what is written to standard error inside the block for the log, or for standard error if it fails.

    onnxsim is C++: it writes to the file itself, where Python's ``redirect_stderr`` does not reach.
    """
    try:
        kept = os.dup(_STDERR)
    except OSError:  # a service without standard error
        yield
        return
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), _STDERR)
        failed = True
        try:
            yield
            failed = False
        finally:
            os.dup2(kept, _STDERR)
            os.close(kept)
            held.seek(0)
            told = held.read()
            if failed:
                os.write(_STDERR, told)
            elif told:
                logging.getLogger(__name__).debug("onnxsim: %s", told.decode(errors="replace"))
