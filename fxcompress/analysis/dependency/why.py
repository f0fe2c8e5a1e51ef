"""Why a channel can go, and with what; or why it cannot."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import numpy as np
from torch import fx

from fxcompress.analysis.dependency.builder import Builder
from fxcompress.analysis.dependency.dimensions import Dimension, DimensionGraph
from fxcompress.analysis.dependency.labels import Solution
from fxcompress.analysis.dependency.layout import Dim, blocks, spread
from fxcompress.graph.names import original_name
from fxcompress.graph.shapes import source_line

__all__ = ["Why", "why"]

_SHOWN = 8


@dataclass(frozen=True)
class Why:
    """The answer to one question; ``str()`` says it in a sentence.

    Attributes:
        weight: the weight asked about, under the user's name, with ``dim`` and ``channel``.
        removable: whether the channel can go.
        together: weight → dimension → indices that go with it, the channel itself among them. Also told of a channel
            that cannot go: what is tied to it.
        reason: why it cannot go; empty if it can.
        node: the node that stands in the way; empty if there is none.
        source: the user's line that made that node, where it is known.
        path: from the weight to the place where it is stopped.
    """

    weight: str
    dim: int
    channel: int
    removable: bool
    together: dict[str, dict[int, list[int]]]
    reason: str = ""
    node: str = ""
    source: str | None = None
    path: tuple[Dimension, ...] = field(default=())

    def __bool__(self) -> bool:
        return self.removable

    def __str__(self) -> str:
        name = f"channel {self.channel} of {self.weight}[{self.dim}]"
        if not self.removable:
            place = f" at {self.node}" if self.node else ""
            line = f" ({self.source})" if self.source else ""
            way = "" if len(self.path) < 2 else "; it is tied to that by " + " – ".join(map(str, self.path))
            return f"{name} cannot be removed: {self.reason}{place}{line}{way}"
        others = [
            f"{path}[{dim}] {_listed(indices)}"
            for path, dims in self.together.items()
            for dim, indices in dims.items()
            if (path, dim, indices) != (self.weight, self.dim, [self.channel])
        ]
        return f"{name} can be removed" + (f", together with {', '.join(others)}" if others else ", alone")


def why(
    builder: Builder, solution: Solution, graph: DimensionGraph, component: np.ndarray, start: Dimension, channel: int
) -> Why:
    """The answer for one index of a dimension of a weight.

    Args:
        builder: the walk over the graph.
        solution: its labels solved.
        graph: the dependency graph.
        component: class of each label, pins left aside.
        start: the dimension of the weight.
        channel: the index along it.
    """
    dim = builder.weights[start.name][start.dim]
    labels = _labels_at(dim, channel)
    module = builder.graph_module
    name = original_name(module, start.name)
    if not labels.size:
        reason = "no operation ties this dimension to channels that a layer makes"
        return Why(name, start.dim, channel, False, {}, reason)
    removable = [label for label in labels.tolist() if solution.removable[solution.class_of[label]]]
    label = removable[0] if removable else int(labels[0])
    together = _together(builder, component, int(component[label]))
    told = {original_name(module, path): dims for path, dims in together.items()}
    if removable:
        return Why(name, start.dim, channel, True, told)
    root = int(component[label])
    found = _nearest_stop(graph, component, start, root)
    if found is not None:
        path, node, reason = found
    else:
        path = (start,)
        node, reason = solution.reasons.get(root, ("", ""))
    if not reason:
        pinned = bool(solution.class_of[label] == 0)
        reason = "it is tied to an index that cannot go" if pinned else "no layer makes it"
    return Why(name, start.dim, channel, False, told, reason, node, _source(module, node), path)


def _labels_at(dim: Dim, index: int) -> np.ndarray:
    """The labels whose removal takes an index of a dimension with it."""
    place = np.unravel_index(index, tuple(factor.size for factor in dim))
    found = []
    for block in blocks(dim):
        axes = {factor.axis: int(place[number]) for number, factor in enumerate(dim) if factor.block is block}
        found.append(block.labels[tuple(axes.get(axis, 0) for axis in range(block.labels.ndim))])
    return np.array(found, dtype=np.int64)


def _together(builder: Builder, component: np.ndarray, root: int) -> dict[str, dict[int, list[int]]]:
    found: dict[str, dict[int, list[int]]] = {}
    for path, layout in builder.weights.items():
        for number, dim in enumerate(layout):
            if not any((component[block.labels] == root).any() for block in blocks(dim)):
                continue
            indices = _indices(dim, component, root)
            found.setdefault(path, {})[number] = indices.tolist()
    return found


def _indices(dim: Dim, component: np.ndarray, root: int) -> np.ndarray:
    one = spread(dim)
    if one is not None:
        return np.flatnonzero(component[one[0]] == root)
    gone = np.zeros(tuple(factor.size for factor in dim), dtype=bool)
    for block in blocks(dim):
        axes = [factor.axis for factor in dim if factor.block is block]
        hit = (component[block.labels] == root).transpose(axes)
        gone |= hit.reshape(tuple(factor.size if factor.block is block else 1 for factor in dim))
    return np.flatnonzero(gone)


def _nearest_stop(
    graph: DimensionGraph, component: np.ndarray, start: Dimension, root: int
) -> tuple[tuple[Dimension, ...], str, str] | None:
    """Breadth first along the dimensions that hold the class: the way to the first that is stopped, node and reason."""
    before: dict[Dimension, Dimension | None] = {start: None}
    queue = deque([start])
    while queue:
        vertex = queue.popleft()
        for _, data in (graph.get_edge_data(vertex, vertex) or {}).items():
            if (component[data["labels"]] == root).any():
                return _way(before, vertex), data["node"], data["barrier"]
        for other in graph.neighbors(vertex):
            if other not in before and _holds(graph.nodes[other]["dim"], component, root):
                before[other] = vertex
                queue.append(other)
    return None


def _holds(dim: Dim, component: np.ndarray, root: int) -> bool:
    return any(bool((component[block.labels] == root).any()) for block in blocks(dim))


def _way(before: dict[Dimension, Dimension | None], last: Dimension | None) -> tuple[Dimension, ...]:
    way: list[Dimension] = []
    while last is not None:
        way.append(last)
        last = before[last]
    return tuple(reversed(way))


def _source(graph_module: fx.GraphModule, name: str) -> str | None:
    node = next((node for node in graph_module.graph.nodes if node.name == name), None)
    return source_line(node) if node is not None else None


def _listed(indices: list[int]) -> str:
    if len(indices) > 2 and indices == list(range(indices[0], indices[-1] + 1)):
        return f"{indices[0]}–{indices[-1]}"
    shown = ", ".join(map(str, indices[:_SHOWN]))
    return shown + (f" and {len(indices) - _SHOWN} more" if len(indices) > _SHOWN else "")
