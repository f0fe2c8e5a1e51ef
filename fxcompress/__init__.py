"""fxcompress: a graph-level compiler that makes PyTorch models smaller and faster, and says what it did.

::

    import fxcompress as fxc

    compiled = fxc.compile(model, passes=[fxc.passes.FuseModules()], example_inputs=(x,), backend="onnxruntime")
    compiled.engine(x)
    print(compiled.report)
"""

from importlib.metadata import PackageNotFoundError, version

from fxcompress import backends, errors, passes
from fxcompress.backends.registry import load_engine
from fxcompress.compiled import Compiled, load
from fxcompress.compiler import compile  # noqa: A004
from fxcompress.distillation import distill
from fxcompress.lottery import lottery_ticket
from fxcompress.reporting.model import Report

try:
    __version__ = version("fxcompress")
except PackageNotFoundError:  # running from a source tree that is not installed
    __version__ = "0+unknown"

__all__ = [
    "Compiled",
    "Report",
    "__version__",
    "backends",
    "compile",
    "distill",
    "errors",
    "load",
    "load_engine",
    "lottery_ticket",
    "passes",
]
