"""Lower a graph to a deployable engine and its bundle, one file per backend."""

from typing import TYPE_CHECKING, Any

from fxcompress.backends.base import Backend, Engine

if TYPE_CHECKING:
    from fxcompress.backends.onnxruntime import OnnxRuntime

__all__ = ["Backend", "Engine", "OnnxRuntime"]


def __getattr__(name: str) -> Any:
    # An engine's library is imported when its backend is first named, not with the package.
    if name == "OnnxRuntime":
        from fxcompress.backends.onnxruntime import OnnxRuntime

        return OnnxRuntime
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
