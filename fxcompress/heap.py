"""Memory: what was freed goes back to the system; no garbage is looked for where none is made.

glibc keeps freed blocks for later. After a model has run once that is as much as its activations, and nothing of what
compilation does next is shaped like them: the peak of the process would count them twice.
"""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["give_back", "without_collections"]


def give_back() -> None:
    """Return freed memory to the system, where the C library can (glibc); elsewhere nothing happens."""
    if _trim is not None:
        _trim(0)


@contextmanager
def without_collections() -> Iterator[None]:
    """No garbage collection inside the block, which makes many small objects that all live.

    A tenth of an export is looking for cycles among its nodes. Not for loops that drop graphs: those are cycles.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _find() -> ctypes._NamedFuncPointer | None:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # another C library; Windows takes no None
        return None


_trim = _find()
