"""What the benchmarks of low rank share."""

from __future__ import annotations

import importlib.metadata
import time
from pathlib import Path

from torch import fx

from fxcompress.graph.edit import copy_graph
from fxcompress.passes import Pass, PassContext


def packaged(package: str, ending: str) -> Path:
    """A file of an installed package."""
    files = importlib.metadata.files(package) or []
    return Path(str(next(file for file in files if str(file).endswith(ending)).locate()))


def applied(graph_module: fx.GraphModule, pass_: Pass) -> tuple[fx.GraphModule, float]:
    """The graph after a pass, and the seconds that the pass took."""
    start = time.perf_counter()
    made = pass_.run(copy_graph(graph_module), PassContext()).graph_module
    return made, time.perf_counter() - start
