"""The public face of the dependency analysis: groups of channels, why one can or cannot go, and a picture."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np
from numpy.typing import NDArray
from torch import fx

from fxcompress.analysis.dependency.builder import Builder
from fxcompress.analysis.dependency.dimensions import Dimension, DimensionGraph, dimension_graph
from fxcompress.analysis.dependency.groups import find_groups
from fxcompress.analysis.dependency.index_map import IndexMap, index_map
from fxcompress.analysis.dependency.labels import Solution, connected_components
from fxcompress.analysis.dependency.layout import blocks, is_live
from fxcompress.analysis.dependency.settle import settle
from fxcompress.analysis.dependency.why import Why, why
from fxcompress.errors import OptionError, nearest
from fxcompress.graph.names import original_name
from fxcompress.graph.shapes import require_shapes

__all__ = ["Dependencies", "DependencyGroup", "dependencies"]


@dataclass(frozen=True)
class DependencyGroup:
    """Channels that are chosen among each other.

    Attributes:
        layers: that make them, under the user's names.
        width: channels of these layers.
        classes: numbers of the classes of indices that go together; each is one choice.
        multiplicity: channels of a layer that one class stands for: 64 where heads of 64 go whole.
        weights: every parameter and buffer that loses indices with them: name → dimensions.
    """

    layers: tuple[str, ...]
    width: int
    classes: NDArray[np.int64]
    multiplicity: int
    weights: dict[str, tuple[int, ...]]

    def __str__(self) -> str:
        each = f", {self.multiplicity} at a time" if self.multiplicity > 1 else ""
        fixed = self.width - len(self.classes) * self.multiplicity
        whole = f", {fixed} of them fixed" if fixed > 0 else ""
        return f"{', '.join(self.layers)}: {self.width} channels{each}{whole}; {len(self.weights)} weights"


def dependencies(graph_module: fx.GraphModule) -> Dependencies:
    """Which indices of which weights must be removed together. Linear in the graph; the graph is not changed.

    Args:
        graph_module: a captured graph with shapes.

    Raises:
        PreconditionError: the graph was captured without example inputs.
    """
    require_shapes(graph_module, "dependencies")
    builder, solution = settle(graph_module)
    return Dependencies(graph_module, builder, solution)


class Dependencies:
    """The dependencies of a graph. All but the solution is worked out when it is first asked for."""

    def __init__(self, graph_module: fx.GraphModule, builder: Builder, solution: Solution) -> None:
        self.graph_module = graph_module
        self._builder, self._solution = builder, solution

    @cached_property
    def graph(self) -> DimensionGraph:
        """A ``networkx.MultiGraph`` of dimensions.

        A vertex is a :class:`Dimension` ``(kind, name, dim, item)`` with ``size`` and ``removable``. An edge is one
        operation that ties indices of two dimensions, with ``node`` and ``op``; :meth:`index_map` tells which. A loop
        is an operation that stops removal there, with ``barrier``, the reason. Indices that must go together lie in
        one connected component.
        """
        return dimension_graph(self._builder, self._solution)

    @cached_property
    def groups(self) -> list[DependencyGroup]:
        """Channels that can be removed, in the order in which the graph makes them."""
        found = find_groups(self._builder, self._solution)
        group_of = np.full(len(self._solution.class_of), -1)
        for number, group in enumerate(found):
            group_of[group.classes] = number
        touched: list[dict[str, tuple[int, ...]]] = [{} for _ in found]
        for path, layout in self._builder.weights.items():
            name = original_name(self.graph_module, path)
            for number, dim in enumerate(layout):
                labels = [block.labels.reshape(-1) for block in blocks(dim)]
                if not labels:
                    continue
                for owner in np.unique(group_of[self._solution.class_of[np.concatenate(labels)]]).tolist():
                    if owner >= 0:
                        touched[owner][name] = (*touched[owner].get(name, ()), number)
        return [
            DependencyGroup(
                tuple(dict.fromkeys(self._layer_name(path) for path in group.layers)),
                group.width,
                group.classes,
                group.multiplicity,
                weights,
            )
            for group, weights in zip(found, touched, strict=True)
        ]

    def components(self) -> list[set[Dimension]]:
        """The connected components of :attr:`graph` that hold a dimension of a weight which other dimensions follow."""
        live = {item for item, facts in self.graph.nodes(data=True) if item.kind != "value" and is_live(facts["dim"])}
        return [found for found in nx.connected_components(self.graph) if not live.isdisjoint(found)]

    def why(self, layer: str, channel: int = 0, dim: int | None = None) -> Why:
        """Whether a channel can be removed and what goes with it, or what stands in the way.

        Args:
            layer: a layer (``"layer1.0.conv1"``) or a parameter or buffer (``"class_token"``), by the user's name.
            channel: index along the dimension.
            dim: of the weight; by default the one that counts what the layer makes.

        Raises:
            OptionError: no such layer, dimension or channel; tells the nearest name, or the range.
        """
        path, default = self._weight(layer)
        layout = self._builder.weights[path]
        place = default if dim is None else dim
        if not -len(layout) <= place < len(layout):
            raise OptionError(
                f"{path} has {len(layout)} dimensions, not a dimension {dim}", where="dim", remedy="give one it has"
            )
        place %= len(layout)
        start = Dimension("value", path, place)
        start = next(start._replace(kind=kind) for kind in ("parameter", "buffer") if self._is(kind, path, place))
        size = self.graph.nodes[start]["size"]
        if not 0 <= channel < size:
            raise OptionError(
                f"{path} has {size} channels along dimension {place}, not a channel {channel}",
                where="channel",
                remedy=f"give one from 0 to {size - 1}",
            )
        return why(self._builder, self._solution, self.graph, self._component, start, channel)

    def index_map(self, source: Dimension, target: Dimension, node: str | None = None) -> IndexMap:
        """Which index of ``source`` an operation ties to which of ``target``: both at the ends of an edge.

        Args:
            source: a vertex of :attr:`graph`.
            target: another.
            node: the operation, where several join the two; by default the first.

        Raises:
            OptionError: no operation joins the two, or the size of one is symbolic.
        """
        edges = self.graph.get_edge_data(source, target) or {}
        data: dict[str, Any] | None = next(iter(edges.values()), None) if node is None else edges.get(node)
        if data is None or "equal" not in data:
            raise OptionError(
                f"no operation ties {source} to {target}",
                where="index_map",
                remedy="give the two ends of an edge of graph",
            )
        left, right = (self.graph.nodes[end]["dim"] for end in (source, target))
        pairs = index_map(left, right, data["equal"])
        if pairs is None:
            raise OptionError(
                f"{source} or {target} has a symbolic size", where="index_map", remedy="capture with static shapes"
            )
        return IndexMap(*pairs, op=data["op"], node=data["node"])

    def draw(self, path: str | Path, layer: str | None = None) -> Path:
        """Write a picture: operations from top to bottom, one column per set of dimensions that hang together.

        Args:
            path: a file ending in ``.svg``, ``.html`` (the same in a page) or ``.dot`` (for Graphviz).
            layer: draw only what hangs together with this layer.

        Returns:
            the path.

        Raises:
            OptionError: another ending, or no such layer.
        """
        from fxcompress.analysis.dependency.draw import draw

        chosen = self.components()
        if layer is not None:
            found, _ = self._weight(layer)
            chosen = [part for part in chosen if any(item.name == found and item.kind != "value" for item in part)]
        return draw(self, chosen, Path(path))

    def __str__(self) -> str:
        lines = [f"{len(self.groups)} groups of channels that can be removed"]
        return "\n".join([*lines, *(f"  {group}" for group in self.groups)])

    # --- names --------------------------------------------------------------------------------------------------------

    @cached_property
    def _component(self) -> NDArray[np.int64]:
        """The class of each label, pins left aside."""
        pairs = list(self._builder.labels.equalities().values())
        empty = np.zeros(0, dtype=np.int64)
        left = np.concatenate([empty, *(pair[0] for pair in pairs)])
        right = np.concatenate([empty, *(pair[1] for pair in pairs)])
        return connected_components(len(self._solution.class_of), left, right)

    @cached_property
    def _names(self) -> dict[str, str]:
        """Every name that a user may give: a weight's, or a layer's for the weight that says what it makes."""
        names: dict[str, str] = {}
        makers = sorted(self._builder.weights, key=lambda path: path not in self._builder.makes)
        for path in makers:
            for name in (path, original_name(self.graph_module, path)):
                names.setdefault(name, path)
                names.setdefault(name.rpartition(".")[0], path)
        names.pop("", None)
        return names

    def _weight(self, name: str) -> tuple[str, int]:
        """The weight that a name means, and the dimension that counts what its layer makes."""
        if name not in self._names:
            known = {known for known in self._names if known not in self._builder.weights} or set(self._names)
            raise OptionError(
                f"no layer or weight of this graph is called {name!r}", where="layer", remedy=nearest(name, known)
            )
        path = self._names[name]
        return path, (self._builder.makes.get(path) or (0,))[0]

    def _layer_name(self, path: str) -> str:
        name = original_name(self.graph_module, path)
        return name.rpartition(".")[0] or name

    def _is(self, kind: str, path: str, place: int) -> bool:
        return Dimension(kind, path, place) in self.graph  # type: ignore[arg-type]
