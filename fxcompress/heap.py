"""The C library's heap: what was freed goes back to the system.

glibc keeps freed blocks for later. After a model has run once that is as much as its activations, and nothing of what
compilation does next is shaped like them: the peak of the process would count them twice.
"""

from __future__ import annotations

import ctypes

__all__ = ["give_back"]


def give_back() -> None:
    """Return freed memory to the system, where the C library can (glibc); elsewhere nothing happens."""
    if _trim is not None:
        _trim(0)


def _find() -> ctypes._NamedFuncPointer | None:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # another C library; Windows takes no None
        return None


_trim = _find()
