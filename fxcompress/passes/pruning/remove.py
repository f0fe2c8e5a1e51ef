"""The removal itself: constants rewritten, weights cut, and what every node produces told anew."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from torch import fx

from fxcompress.analysis.dependency.removal import Removal
from fxcompress.graph.edit import GraphEditor
from fxcompress.heap import without_collections
from fxcompress.passes.pruning.plan import Plan
from fxcompress.passes.pruning.resize import resize_constants
from fxcompress.passes.pruning.shrink import shrink_weights
from fxcompress.passes.pruning.values import values_after

__all__ = ["remove"]


def remove(
    graph_module: fx.GraphModule, plan: Plan, classes: NDArray[np.int64]
) -> tuple[Removal, dict[str, dict[int, list[int]]]]:
    """Remove ``classes`` from the graph that ``plan`` is of.

    Returns:
        the removal, and for each weight that changed: dimension → indices kept.
    """
    removal = Removal.of_classes(plan.builder, plan.solution, classes)
    with without_collections(), GraphEditor(graph_module) as editor:
        resize_constants(graph_module, removal, editor)
        kept = shrink_weights(graph_module, removal, editor)
        editor.set_values(values_after(graph_module, removal))
    return removal, kept
