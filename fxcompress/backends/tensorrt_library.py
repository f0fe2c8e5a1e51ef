"""Which TensorRT is installed, what it can do, and its one log.

Two libraries have one API. *TensorRT for RTX* (``tensorrt_rtx``) builds engines ahead of time, without a GPU, for
chosen compute capabilities. *TensorRT* itself (``tensorrt``, 10.12 or newer) builds on the device that the engine is
for. What only one of them has is asked of the library, never of its version.
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from fxcompress.errors import BackendError

__all__ = ["LIBRARIES", "PORTABLE", "RTX_CAPABILITIES", "Library", "LibraryName", "LogEntry", "find_library"]

LibraryName = Literal["tensorrt_rtx", "tensorrt"]
LIBRARIES: tuple[LibraryName, ...] = ("tensorrt_rtx", "tensorrt")
RTX_CAPABILITIES = ("sm75", "sm80", "sm86", "sm89", "sm120", "sm121")  # of TensorRT for RTX 1.7
PORTABLE = RTX_CAPABILITIES[1:]  # Turing has no fp32 matrix product there, so few models build for it

_INSTALL = {
    "tensorrt_rtx": "pip install 'fxcompress[tensorrt]'",
    "tensorrt": "pip install tensorrt, or take NVIDIA's packages (on Jetson: JetPack)",
}
_LEAST = (10, 12)
_ERRORS = ("ERROR", "INTERNAL_ERROR")


@dataclass(frozen=True)
class LogEntry:
    """One line of the builder's log."""

    severity: str
    text: str

    @property
    def is_error(self) -> bool:
        """Whether the library called it an error. What it says of a missing driver is none: building needs no GPU."""
        return self.severity in _ERRORS and "CUDA driver version is insufficient" not in self.text


@dataclass(frozen=True)
class Library:
    """A TensorRT library that was imported.

    Attributes:
        name: of the Python module.
        version: as it tells it.
        module: the module itself.
    """

    name: LibraryName
    version: str
    module: Any

    @property
    def is_rtx(self) -> bool:
        """Whether this is TensorRT for RTX."""
        return self.name == "tensorrt_rtx"

    @property
    def capabilities(self) -> tuple[str, ...]:
        """What it can build for ahead of time: ``("sm75", …)``; nothing where engines are made on the device."""
        known = getattr(self.module, "ComputeCapability", None)
        names = getattr(known, "__members__", {})
        return tuple(sorted((n.lower() for n in names if n.startswith("SM")), key=lambda name: int(name[2:])))

    def logger(self) -> Any:
        """The library's ``ILogger``; it keeps only one per process, so there is one."""
        return _logger(self.name)

    @contextmanager
    def log(self) -> Iterator[list[LogEntry]]:
        """What the library says meanwhile. One build at a time: the library has a single log."""
        logger = self.logger()
        with _one_at_a_time:
            entries: list[LogEntry] = []
            logger.entries = entries
            try:
                yield entries
            finally:
                logger.entries = []


_one_at_a_time = threading.RLock()


def find_library(name: LibraryName | Literal["auto"] = "auto") -> Library:
    """Import a TensorRT library.

    Args:
        name: which; ``"auto"`` takes TensorRT for RTX where it is installed, for it needs no GPU to build.

    Raises:
        BackendError: it is not installed, too old, or cannot be loaded; tells how to install it.
    """
    if name != "auto":
        return _load(name)
    problems = []
    for candidate in LIBRARIES:
        try:
            return _load(candidate)
        except BackendError as error:
            problems.append(error.problem)
    raise BackendError("; ".join(problems), where="library", remedy=f"{_INSTALL['tensorrt_rtx']} (258 MB)")


@cache
def _load(name: LibraryName) -> Library:
    try:
        module = importlib.import_module(name)
    except (ImportError, OSError) as error:
        absent = isinstance(error, ModuleNotFoundError) and error.name == name
        reason = "is not installed" if absent else f"cannot be loaded: {error}"
        raise BackendError(f"{name} {reason}", where="library", remedy=_INSTALL[name]) from error
    version = str(getattr(module, "__version__", ""))
    if not hasattr(module, "Builder") or not version:  # a directory of that name, of type stubs say
        raise BackendError(f"{name} is not installed", where="library", remedy=_INSTALL[name])
    numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    if name == "tensorrt" and numbers < _LEAST:
        raise BackendError(
            f"TensorRT {version} is too old: strongly typed networks as built here need 10.12",
            where="library",
            remedy="update TensorRT, or use build_on='device' and a device with a newer one",
        )
    return Library(name, version, module)


@cache
def _logger(name: LibraryName) -> Any:
    base: Any = _load(name).module.ILogger

    class Log(base):
        def __init__(self) -> None:
            base.__init__(self)
            self.entries: list[LogEntry] = []

        def log(self, severity: Any, message: str) -> None:
            if severity.name != "VERBOSE":
                self.entries.append(LogEntry(severity.name, message))

    return Log()
