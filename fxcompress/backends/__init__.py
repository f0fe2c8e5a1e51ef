"""Lower a graph to a deployable engine and its bundle, one file per backend."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fxcompress.backends.base import Backend, Engine

if TYPE_CHECKING:
    from fxcompress.backends.onnxruntime import OnnxRuntime
    from fxcompress.backends.openvino import OpenVINO
    from fxcompress.backends.tensorrt import TensorRT
    from fxcompress.backends.torch_export import TorchExport
    from fxcompress.backends.torchscript import TorchScript

__all__ = ["Backend", "Engine", "OnnxRuntime", "OpenVINO", "TensorRT", "TorchExport", "TorchScript"]

# An engine's library is imported when its backend is first named, not with the package.
_MODULES = {
    "OnnxRuntime": "fxcompress.backends.onnxruntime",
    "OpenVINO": "fxcompress.backends.openvino",
    "TensorRT": "fxcompress.backends.tensorrt",
    "TorchExport": "fxcompress.backends.torch_export",
    "TorchScript": "fxcompress.backends.torchscript",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(_MODULES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
