"""The dependency graph: dimensions of values and weights, joined where one operation ties their indices together."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeAlias

import networkx as nx
import numpy as np
from numpy.typing import NDArray
from torch import fx, nn

from fxcompress.analysis.dependency.builder import Builder
from fxcompress.analysis.dependency.labels import PINNED, Solution, connected_components
from fxcompress.analysis.dependency.layout import Dim, blocks, is_live, size_of
from fxcompress.analysis.dependency.zeros import name as name_of

__all__ = ["Dimension", "DimensionGraph", "Equal", "dimension_graph", "layouts_of"]

Array = NDArray[np.int64]


class Dimension(NamedTuple):
    """A dimension of a tensor of the graph.

    Attributes:
        kind: ``value`` (what a node makes), ``parameter`` or ``buffer``.
        name: the node, or the path of the weight.
        dim: which dimension.
        item: which tensor, where a node makes several.
    """

    kind: Literal["value", "parameter", "buffer"]
    name: str
    dim: int
    item: int = 0

    def __str__(self) -> str:
        return f"{self.name}{f'#{self.item}' if self.item else ''}[{self.dim}]"


DimensionGraph: TypeAlias = "nx.MultiGraph[Dimension]"


@dataclass
class Equal:
    """The labels that one operation makes equal; all others stand for themselves."""

    left: Array
    right: Array
    _labels: Array = field(init=False)
    _least: Array = field(init=False)

    def __post_init__(self) -> None:
        self._labels, index = np.unique(np.concatenate([self.left, self.right]), return_inverse=True)
        half = len(self.left)
        self._least = self._labels[connected_components(len(self._labels), index[:half], index[half:])]

    def __call__(self, labels: Array) -> Array:
        """Each label's representative."""
        if not self._labels.size:
            return labels
        place = np.searchsorted(self._labels, labels).clip(max=len(self._labels) - 1)
        return np.where(self._labels[place] == labels, self._least[place], labels)


NONE_EQUAL = Equal(np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64))


@dataclass(frozen=True, eq=False)
class _End:
    """A dimension where an operation meets it, with the labels it carries there."""

    vertex: Dimension
    dim: Dim
    keys: Array  # sorted


def layouts_of(value: Any) -> list[Any]:
    """The layouts of all tensors of a value, in order."""
    if value is None:
        return []
    if isinstance(value, list):
        return [layout for item in value for layout in layouts_of(item)]
    return [value]


def dimension_graph(builder: Builder, solution: Solution) -> DimensionGraph:
    """One vertex per dimension, one edge per operation that ties two of them; loops where removal is stopped.

    Vertices carry ``size``, ``removable`` (whether any index can go) and ``dim`` (the layout). Edges are keyed by the
    node and carry ``node``, ``op`` and ``equal`` (the labels that the node made equal); a loop carries ``barrier``,
    the reason, and ``labels``, what it stops. Connected components are those of the indices that go together.
    """
    graph: DimensionGraph = nx.MultiGraph()
    joins = _Joins(builder, graph)
    for path, layout in builder.weights.items():
        _add(graph, solution, joins.weight_kind(path), path, 0, layout)
    for node in builder.graph_module.graph.nodes:
        for item, layout in enumerate(layouts_of(builder.values.get(node))):
            _add(graph, solution, "value", node.name, item, layout)
        joins.join(node)
    joins.join_tied()
    return graph


def _add(graph: DimensionGraph, solution: Solution, kind: Any, name: str, item: int, layout: Sequence[Dim]) -> None:
    for number, dim in enumerate(layout):
        removable = any(bool(solution.removable[solution.class_of[b.labels]].any()) for b in blocks(dim))
        graph.add_node(Dimension(kind, name, number, item), size=size_of(dim), removable=removable, dim=dim)


class _Joins:
    """Adds the edges of node after node."""

    def __init__(self, builder: Builder, graph: DimensionGraph) -> None:
        self.builder, self.graph = builder, graph
        self.equalities = {site: Equal(*pair) for site, pair in builder.labels.equalities().items()}
        self.pins = builder.labels.pins()
        self.parameters = dict(builder.graph_module.named_parameters(remove_duplicate=False))
        self.owned: dict[str, list[str]] = {}
        for path in builder.weights:
            self.owned.setdefault(path.rpartition(".")[0], []).append(path)
        self._unique: dict[int, Array] = {}

    def weight_kind(self, path: str) -> Literal["parameter", "buffer"]:
        return "parameter" if isinstance(self.parameters.get(path), nn.Parameter) else "buffer"

    def join(self, node: fx.Node) -> None:
        """The edges of one node: what it reads, its weights and what it makes."""
        equal = self.equalities.get(node.name, NONE_EQUAL)
        read = [end for source in dict.fromkeys(node.all_input_nodes) for end in self._ends_of(source, equal)]
        made = list(self._ends_of(node, equal))
        weights = self._weights(node, equal)
        op = self._op(node)
        if node.op == "call_module" and any(end.vertex.name in self.builder.makes for end in weights):
            read, made = self._join_layer(node, op, equal, read, weights, made)
            weights = []
        loose = [end for end in (*read, *weights) if not self._link_all(node, op, equal, [end], made)]
        # What is summed away ties what it read to each other.
        for index, end in enumerate(loose):
            self._link_first(node, op, equal, end, loose[index + 1 :])
        if node.name in self.pins:
            self._stop(node, op, [*self._ends_of_all(node), *self._weights(node, NONE_EQUAL)])

    def _join_layer(
        self, node: fx.Node, op: str, equal: Equal, read: list[_End], weights: list[_End], made: list[_End]
    ) -> tuple[list[_End], list[_End]]:
        """A layer ties what it reads to one side of its weights and what it makes to the other; returns the rest."""
        path = str(node.target)
        crossed = path in self.builder.groups or hasattr(self.builder.graph_module.get_submodule(path), "hidden_size")
        sides = {end.vertex: end.vertex.dim in self.builder.makes.get(end.vertex.name, ()) for end in weights}
        vectors = {end.vertex for end in weights if end.vertex.name not in self.builder.makes}
        reading = [end for end in weights if (crossed or not sides[end.vertex]) and end.vertex not in vectors]
        making = [end for end in weights if crossed or sides[end.vertex] or end.vertex in vectors]
        taken = [end for end in read if self._link_all(node, op, equal, [end], reading)]
        given = [end for end in made if self._link_all(node, op, equal, making, [end])]
        return [e for e in read if e not in taken], [e for e in made if e not in given]

    def join_tied(self) -> None:
        """A weight under several names is one tensor."""
        first: dict[int, str] = {}
        for path, layout in self.builder.weights.items():
            owner = first.setdefault(id(layout), path)
            if owner != path:
                for number, dim in enumerate(layout):
                    if is_live(dim):
                        mine, theirs = (Dimension(self.weight_kind(name), name, number) for name in (owner, path))
                        self.graph.add_edge(mine, theirs, key="tied", node="", op="tied", equal=NONE_EQUAL)

    # --- one edge -------------------------------------------------------------------------------------------------

    def _link_all(self, node: fx.Node, op: str, equal: Equal, ends: list[_End], others: list[_End]) -> bool:
        linked = False
        for end, other in itertools.product(ends, others):
            linked |= self._link(node, op, equal, end, other)
        return linked

    def _link_first(self, node: fx.Node, op: str, equal: Equal, end: _End, others: list[_End]) -> None:
        for other in others:
            if self._link(node, op, equal, end, other):
                return

    def _link(self, node: fx.Node, op: str, equal: Equal, end: _End, other: _End) -> bool:
        if end.vertex == other.vertex or not _meet(end.keys, other.keys):
            return False
        self.graph.add_edge(end.vertex, other.vertex, key=node.name, node=node.name, op=op, equal=equal)
        return True

    def _stop(self, node: fx.Node, op: str, ends: list[_End]) -> None:
        for labels, reason in self.pins[node.name]:
            for end in ends:
                if _meet(end.keys, labels):
                    self.graph.add_edge(
                        end.vertex, end.vertex, key=node.name, node=node.name, op=op, barrier=reason, labels=labels
                    )

    # --- ends -----------------------------------------------------------------------------------------------------

    def _ends_of(self, node: fx.Node, equal: Equal) -> Iterator[_End]:
        for item, layout in enumerate(layouts_of(self.builder.values.get(node))):
            yield from self._ends("value", node.name, item, layout, equal)

    def _ends_of_all(self, node: fx.Node) -> Iterator[_End]:
        for source in dict.fromkeys([*node.all_input_nodes, node]):
            yield from self._ends_of(source, NONE_EQUAL)

    def _weights(self, node: fx.Node, equal: Equal) -> list[_End]:
        if node.op == "call_module":
            paths = self.owned.get(str(node.target), [])
        elif node.op == "get_attr":
            paths = [str(node.target)] if str(node.target) in self.builder.weights else []
        else:
            paths = []
        weights = self.builder.weights
        return [end for path in paths for end in self._ends(self.weight_kind(path), path, 0, weights[path], equal)]

    def _ends(self, kind: Any, name: str, item: int, layout: Sequence[Dim], equal: Equal) -> Iterator[_End]:
        for number, dim in enumerate(layout):
            if is_live(dim):
                yield _End(Dimension(kind, name, number, item), dim, self._keys(dim, equal))

    def _keys(self, dim: Dim, equal: Equal) -> Array:
        """The distinct labels of a dimension, sorted."""
        parts = []
        for block in blocks(dim):
            if id(block.labels) not in self._unique:
                self._unique[id(block.labels)] = np.unique(block.labels)
            parts.append(self._unique[id(block.labels)])
        if len(parts) == 1 and equal is NONE_EQUAL:
            return parts[0]
        return np.unique(equal(np.concatenate(parts)))

    def _op(self, node: fx.Node) -> str:
        if node.op == "call_module":
            return type(self.builder.graph_module.get_submodule(str(node.target))).__name__
        return node.op if node.op in ("get_attr", "output", "placeholder") else name_of(node)


def _meet(left: Array, right: Array) -> bool:
    """Whether two sorted arrays of distinct labels have one in common that can be followed."""
    if not left.size or not right.size or left[0] > right[-1] or right[0] > left[-1]:
        return False
    small, large = (left, right) if len(left) <= len(right) else (right, left)
    place = np.searchsorted(large, small).clip(max=len(large) - 1)
    return bool(((large[place] == small) & (small != PINNED)).any())
