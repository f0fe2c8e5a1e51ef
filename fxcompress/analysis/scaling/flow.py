"""The walk over a graph that finds which channels share a factor, and the groups that result.

Every channel that a layer makes carries a label; a value carries a tensor of labels that broadcasts to its shape. What
an operation makes equal and what it fixes at 1 is collected, and solved once with a vectorised union-find.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import fx, nn
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from fxcompress.analysis.dependency.labels import connected_components
from fxcompress.analysis.scaling.rules import RULES, layer_rule
from fxcompress.graph.queries import GraphIndex
from fxcompress.graph.shapes import require_shapes

__all__ = ["Flow", "Group", "Maker", "Reader", "Scaling", "scaling"]

FIXED = 0
"""The label of what keeps its scale."""


@dataclass(frozen=True)
class Maker:
    """A layer, or a vector of the graph, that makes channels. ``classes``: of each channel, int64."""

    path: str
    classes: torch.Tensor


@dataclass(frozen=True)
class Reader:
    """A layer that reads channels and can multiply them. ``classes``: of each input channel, int64."""

    path: str
    classes: torch.Tensor


@dataclass(frozen=True)
class Group:
    """Channels whose factors are chosen together.

    Attributes:
        classes: numbers of the factors, ascending.
        makers: that divide by them.
        readers: that multiply by them.
        clips: nodes between them that clip, and need other limits.
    """

    classes: torch.Tensor
    makers: tuple[Maker, ...]
    readers: tuple[Reader, ...]
    clips: tuple[fx.Node, ...] = ()


@dataclass
class Scaling:
    """What :func:`scaling` found.

    Attributes:
        count: number of classes; class 0 keeps its scale.
        groups: in the order of the graph.
        makers: every layer that could make scaled channels → their classes.
        readers: likewise for what it reads.
        clips: nodes that clip scaled channels → classes, broadcasting to the node's value.
        norms: paths of the makers that are norms.
        fixed: layers no channel of which can be scaled → reason and the node that fixes them.
    """

    count: int
    groups: list[Group]
    makers: dict[str, torch.Tensor]
    readers: dict[str, torch.Tensor]
    clips: dict[fx.Node, torch.Tensor]
    norms: set[str]
    fixed: dict[str, tuple[str, str]] = field(default_factory=dict)


def scaling(graph_module: fx.GraphModule, *, clips: bool = False) -> Scaling:
    """Which channels can trade a factor. Linear in the graph; the graph is not changed.

    Args:
        graph_module: a captured graph with shapes.
        clips: let clips with an upper limit pass, to be given limits of their own for each channel.

    Raises:
        PreconditionError: the graph was captured without example inputs.
    """
    require_shapes(graph_module, "scaling")
    first = _walk(graph_module, clips, frozenset())
    # What a product does to a parameter depends on whether its other factor is scaled, which is known by now.
    fixed = frozenset(path for path in first.fixed if path in first.readers or path in first.norms)
    again = fixed and any(node.op == "get_attr" for node in graph_module.graph.nodes)
    return _walk(graph_module, clips, fixed) if again else first


def _walk(graph_module: fx.GraphModule, clips: bool, fixed: frozenset[str]) -> Scaling:
    flow = Flow(graph_module, clips, fixed)
    for node in graph_module.graph.nodes:
        flow.step(node)
    return flow.solve()


class Flow:
    """Labels of the values of one graph, as far as it was walked."""

    def __init__(self, graph_module: fx.GraphModule, clips: bool, fixed: frozenset[str]) -> None:
        self.graph_module, self.through_clips, self.fixed = graph_module, clips, fixed
        self.index = GraphIndex(graph_module)
        self.labels: dict[fx.Node, Any] = {}  # a tensor, None where fixed, or a list of those
        self.makers: dict[str, torch.Tensor] = {}
        self.readers: dict[str, torch.Tensor] = {}
        self.clips: dict[fx.Node, torch.Tensor] = {}
        self._count = 1
        self._left: list[torch.Tensor] = []
        self._right: list[torch.Tensor] = []
        self._pins: list[tuple[torch.Tensor, str, str]] = []

    def step(self, node: fx.Node) -> None:
        """Take in one node."""
        if node.op == "call_module":
            labels = layer_rule(self, node, self.graph_module.get_submodule(str(node.target)))
            if str(node.target) in self.fixed:
                self.pin(labels, node, "what it makes keeps its scale")
                labels = None
            self.labels[node] = labels
        elif node.op == "get_attr":
            self.labels[node] = self._vector(node)
        elif node.op == "call_function" and node.target in RULES:
            self.labels[node] = RULES[node.target](self, node)
        else:
            self.pin_inputs(node)
            self.labels[node] = None

    # --- for the rules -------------------------------------------------------------------------------------------

    def fresh(self, count: int) -> torch.Tensor:
        """New labels."""
        made = torch.arange(self._count, self._count + count)
        self._count += count
        return made

    def of(self, item: Any) -> torch.Tensor | None:
        """Labels of an argument; None where its scale is fixed."""
        found = self.labels.get(item) if isinstance(item, fx.Node) else None
        return found if isinstance(found, torch.Tensor) else None

    def union(self, left: torch.Tensor, right: torch.Tensor) -> None:
        """The same factor at both, index by index."""
        left, right = torch.broadcast_tensors(left, right)
        self._left.append(left.reshape(-1))
        self._right.append(right.reshape(-1))

    def pin(self, labels: torch.Tensor | None, node: fx.Node, reason: str = "") -> None:
        """These keep their scale, because of ``node``."""
        if labels is not None:
            text = reason or f"{_named(node, self.graph_module)} is not scale-equivariant"
            self._pins.append((labels.reshape(-1), text, node.name))

    def pin_inputs(self, node: fx.Node) -> None:
        """All that ``node`` reads keeps its scale."""
        reason = "it is an output of the model" if node.op == "output" else ""
        for item in node.all_input_nodes:
            for found in pytree.tree_leaves(self.labels.get(item)):
                self.pin(found, node, reason)

    def moved(self, node: fx.Node, run: Callable[..., Any]) -> Any:
        """Labels after an operation that only moves values: the operation itself, run on the labels."""
        shapes: list[torch.Tensor] = []

        def concrete(item: fx.Node) -> Any:
            value = item.meta.get("val")
            if isinstance(value, (list, tuple)):
                found = self.labels.get(item) or [None] * len(value)
                return [self._expanded(part, one) for part, one in zip(found, value, strict=True)]
            if isinstance(value, torch.Tensor):
                shapes.append(value)
                return self._expanded(self.of(item), value)
            return hint(value)

        try:
            args, kwargs = map_arg((node.args, node.kwargs), concrete)
            args, kwargs = pytree.tree_map(hint, (args, kwargs))
            found = run(*args, **kwargs)
        except (RuntimeError, TypeError, IndexError, ValueError):
            self.pin_inputs(node)
            return None
        return pytree.tree_map_only(torch.Tensor, compressed, found)

    def _expanded(self, labels: torch.Tensor | None, value: Any) -> torch.Tensor:
        shape = [hint(size) for size in value.shape]
        return (labels if labels is not None else torch.zeros([1] * len(shape), dtype=torch.int64)).expand(shape)

    def _vector(self, node: fx.Node) -> torch.Tensor | None:
        """A parameter with one dimension that counts: the weight of a norm written out, a bias."""
        value = node.meta.get("val")
        path = str(node.target)
        if not isinstance(value, torch.Tensor) or not value.is_floating_point() or value.numel() < 2:
            return None
        owner, _, name = path.rpartition(".")
        held = getattr(self.graph_module.get_submodule(owner), name)
        if not isinstance(held, nn.Parameter) or self.index.is_tied(held) or max(value.shape) != value.numel():
            return None
        if path not in self.makers:
            self.makers[path] = self.fresh(value.numel())
        return self.makers[path].reshape(value.shape)

    # --- the end -------------------------------------------------------------------------------------------------

    def solve(self) -> Scaling:
        """Labels solved into classes, and those into groups."""
        empty = torch.zeros(0, dtype=torch.int64)
        left, right = torch.cat([empty, *self._left]).numpy(), torch.cat([empty, *self._right]).numpy()
        component = connected_components(self._count, left, right)
        why: dict[int, tuple[str, str]] = {}
        pinned = np.zeros(self._count, dtype=bool)
        pinned[component[FIXED]] = True
        for labels, reason, node in reversed(self._pins):
            fixed = component[labels.numpy()]
            pinned[fixed] = True
            why.update(dict.fromkeys(np.unique(fixed).tolist(), (reason, node)))
        numbers, class_of = np.unique(np.where(pinned[component], FIXED, component), return_inverse=True)
        classes = torch.from_numpy(class_of)
        makers = {path: classes[labels] for path, labels in self.makers.items()}
        readers = {path: classes[labels] for path, labels in self.readers.items()}
        clips = {node: classes[labels] for node, labels in self.clips.items()}
        norms = set(makers) - set(readers) - {str(n.target) for n in self.labels if n.op == "get_attr"}
        made = Scaling(len(numbers), _groups(makers, readers, clips, len(numbers)), makers, readers, clips, norms)
        for path, labels in self.makers.items():
            if not bool(makers[path].any()):
                made.fixed[path] = why.get(int(component[labels[0]]), ("it is tied to what keeps its scale", ""))
        return made


def _groups(
    makers: dict[str, torch.Tensor],
    readers: dict[str, torch.Tensor],
    clips: dict[fx.Node, torch.Tensor],
    count: int,
) -> list[Group]:
    """Classes that a layer makes or reads together are one group."""
    sides: list[torch.Tensor] = [free[free > 0] for free in (*makers.values(), *readers.values())]
    chains = [part for part in sides if len(part) > 1]
    empty = torch.zeros(0, dtype=torch.int64)
    left = torch.cat([empty, *(part[:-1] for part in chains)])
    right = torch.cat([empty, *(part[1:] for part in chains)])
    group_of = torch.from_numpy(connected_components(count, left.numpy(), right.numpy()))
    members: dict[int, tuple[list[Maker], list[Reader], list[fx.Node]]] = {}

    def owners(classes: torch.Tensor) -> Iterable[int]:
        free = classes[classes > 0]
        return torch.unique(group_of[free]).tolist()

    for path, classes in makers.items():
        for number in owners(classes):
            members.setdefault(number, ([], [], []))[0].append(Maker(path, classes))
    for path, classes in readers.items():
        for number in owners(classes):
            members.setdefault(number, ([], [], []))[1].append(Reader(path, classes))
    for node, classes in clips.items():
        for number in owners(classes):
            members[number][2].append(node)
    every = torch.arange(count)
    return [
        Group(every[(group_of == number) & (every > 0)], tuple(made), tuple(read), tuple(cut))
        for number, (made, read, cut) in members.items()
        if made and read
    ]


def hint(size: Any) -> Any:
    """A symbolic size as the number that it was captured with."""
    return size.node.hint if isinstance(size, torch.SymInt) else size


def compressed(labels: torch.Tensor) -> torch.Tensor | None:
    """Dimensions along which nothing changes with size 1; None where nothing is scaled."""
    for dim in range(labels.dim()):
        if labels.shape[dim] > 1:
            first = labels.narrow(dim, 0, 1)
            if labels.stride(dim) == 0 or bool((labels == first).all()):
                labels = first
    return labels.clone() if bool(labels.any()) else None


def _named(node: fx.Node, graph_module: fx.GraphModule) -> str:
    if node.op == "call_module":
        return type(graph_module.get_submodule(str(node.target))).__name__
    return str(node.target).removeprefix("aten.").partition(".")[0]
