"""What can be removed from a graph: its dependencies solved, and a side chosen wherever a view splits channels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import fx

from fxcompress.analysis.dependency.builder import Builder, Site
from fxcompress.analysis.dependency.groups import Group, find_groups
from fxcompress.analysis.dependency.labels import Solution
from fxcompress.analysis.dependency.layout import blocks
from fxcompress.analysis.dependency.settle import settle
from fxcompress.heap import without_collections
from fxcompress.passes.base import Skip

__all__ = ["Attention", "Plan", "make_plan", "tensor_at"]

Attention = Literal["auto", "heads", "head_size"]

aten = torch.ops.aten

_PRODUCTS = (
    aten.scaled_dot_product_attention.default,
    aten.matmul.default,
    aten.bmm.default,
    aten.baddbmm.default,
    aten.einsum.default,
)


@dataclass(frozen=True)
class Plan:
    """Dependencies of a graph, solved.

    Attributes:
        builder: labels of every dimension of every value and weight.
        solution: which labels go together, and which may go at all.
        groups: the channels that compete with each other.
        weights: parameters and buffers with labels, by path.
    """

    builder: Builder
    solution: Solution
    groups: tuple[Group, ...]
    weights: dict[str, torch.Tensor]

    def without_empty(self, classes: NDArray[np.int64], scores: NDArray[np.float64]) -> NDArray[np.int64]:
        """``classes`` less the best of them wherever a dimension, a piece of a split, say, would lose all it has."""
        class_of = self.solution.class_of
        gone = np.zeros(len(class_of), dtype=bool)
        gone[classes] = True
        for own in self._blocks:
            if gone[own].all():
                gone[own[np.argmax(scores[own])]] = False
        return np.flatnonzero(gone)

    @cached_property
    def _blocks(self) -> list[NDArray[np.int64]]:
        """The classes of each distinct block of which every index could go."""
        seen: set[int] = set()
        distinct: dict[bytes, NDArray[np.int64]] = {}
        layouts = [*self.builder.weights.values(), *(self.builder.dims_of(node) for node in self.builder.values)]
        for block in (block for layout in layouts for dim in layout for block in blocks(dim)):
            if id(block) in seen or not block.labels.size:
                continue
            seen.add(id(block))
            own = self.solution.class_of[block.labels.reshape(-1)]
            if self.solution.removable[own].all():
                distinct.setdefault(own.tobytes(), own)
        return list(distinct.values())

    def kinds(self, groups: Sequence[Group]) -> list[set[str]]:
        """Type names of the layers of each group: ``{"Conv2d"}``."""
        module = self.builder.graph_module.get_submodule
        return [{type(module(layer.rpartition(".")[0])).__name__ for layer in group.layers} for group in groups]

    def pinned(self) -> list[Skip]:
        """Layers none of whose channels can go, and what stands in the way."""
        skips: dict[str, Skip] = {}
        for path, dims in self.builder.makes.items():
            labels = [block.labels.reshape(-1) for dim in dims for block in blocks(self.builder.weights[path][dim])]
            if not labels or self.solution.removable[self.solution.class_of[np.concatenate(labels)]].any():
                continue
            site = path.rpartition(".")[0] or path
            node, reason = self.reason(labels[0][0])
            skips.setdefault(
                site, Skip(site, "pinned", f"{reason} ({node})" if node else reason, (node,) if node else ())
            )
        return list(skips.values())

    def reason(self, label: int) -> tuple[str, str]:
        """Why a label cannot go: the node and a sentence."""
        root = int(self.builder.labels.component[label])
        return self.solution.reasons.get(root, ("", "it is tied to an index that cannot go"))

    def on(self, copied: fx.GraphModule) -> Plan:
        """The same plan for a copy of its graph, node by node."""
        mine = dict(zip(self.builder.graph_module.graph.nodes, copied.graph.nodes, strict=True))
        b = self.builder
        values = {mine[node]: told for node, told in b.values.items()}
        counts = {mine[node]: lead for node, lead in b.counts.items()}
        reindexed = {mine[node]: picked for node, picked in b.reindexed.items()}
        return replace(self, builder=replace(b, graph_module=copied, values=values, counts=counts, reindexed=reindexed))


def make_plan(graph_module: fx.GraphModule, attention: Attention = "auto") -> Plan:
    """Solve the dependencies of a graph.

    Where a view splits features into heads and head size, one side can shrink. ``auto`` takes the larger one, whose
    indices are finer, and the other if that one turns out to be pinned; ``heads`` and ``head_size`` ask for theirs
    first, wherever the view feeds a product of activations. Where ``auto`` leaves such a view pinned (queries and
    keys of unlike shapes took unlike sides), the two are tried as well, and what frees the most weights is taken.
    """
    with without_collections():
        builder, solution = settle(graph_module, lambda first: _asked_for(first, attention))
        if attention == "auto" and _any_pinned(builder, solution):
            others = [settle(graph_module, partial(_asked_for, attention=side)) for side in ("heads", "head_size")]
            builder, solution = max([(builder, solution), *others], key=lambda found: _freed(*found))
        groups = tuple(find_groups(builder, solution))
    weights = {path: tensor_at(graph_module, path) for path in builder.weights}
    return Plan(builder, solution, groups, weights)


def _asked_for(builder: Builder, attention: Attention) -> dict[str, int]:
    """The sides that the option asks for, at the views that feed a product of activations."""
    if attention == "auto":
        return {}
    nodes = {node.name: node for node in builder.graph_module.graph.nodes}
    choices = {}
    for name, site in builder.sites.items():
        side = len(site.sizes) - (2 if attention == "heads" else 1)
        if side >= 0 and site.sizes[side] > 1 and _feeds_product(nodes[site.node], site):
            choices[name] = side
    return choices


def _any_pinned(builder: Builder, solution: Solution) -> bool:
    """Whether neither side of a view that feeds a product of activations can shrink."""
    nodes = {node.name: node for node in builder.graph_module.graph.nodes}
    return any(
        not solution.removable[solution.class_of[site.labels]].any() and _feeds_product(nodes[site.node], site)
        for site in builder.sites.values()
    )


def _freed(builder: Builder, solution: Solution) -> float:
    """How many weights would go if half of every index that can go did."""
    total = 0.0
    for path, layout in builder.weights.items():
        kept = 1.0
        for block in (block for dim in layout for block in blocks(dim)):
            if block.labels.size:
                kept *= 1 - float(solution.removable[solution.class_of[block.labels]].mean()) / 2
        total += tensor_at(builder.graph_module, path).numel() * (1 - kept)
    return total


def _feeds_product(node: fx.Node, site: Site) -> bool:
    """Whether what the view makes reaches a product of activations before any layer does."""
    if node.op != "call_function":
        return False  # the groups of a convolution
    seen, front = {node}, [node]
    for _ in range(16):  # movement, scaling, rotary embeddings, norms per head
        following = [user for found in front for user in found.users if user not in seen]
        if any(user.target in _PRODUCTS for user in following):
            return True
        front = [user for user in following if user.op == "call_function"]
        seen.update(front)
    return False


def tensor_at(graph_module: fx.GraphModule, path: str) -> torch.Tensor:
    """The parameter or buffer at ``path``."""
    owner, _, name = path.rpartition(".")
    tensor: Any = getattr(graph_module.get_submodule(owner), name)
    assert isinstance(tensor, torch.Tensor)
    return tensor
