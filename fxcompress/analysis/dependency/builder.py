"""Walks a graph once and says, for every dimension of every value and weight, which labels its indices carry."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from fxcompress.analysis.dependency.labels import PINNED, Labels
from fxcompress.analysis.dependency.layout import (
    Array,
    Block,
    Dim,
    Factor,
    Layout,
    blocks,
    inert,
    is_live,
    regroup,
    size_of,
    vector,
)

__all__ = ["Builder", "Rule", "Site"]


@dataclass
class Site:
    """A place where a view splits removable indices in two, and only one side can shrink.

    Attributes:
        node: the view.
        sizes: of the candidate sides: ``(12, 64)`` for heads and head size.
        live: index of the side that may shrink.
    """

    node: str
    sizes: tuple[int, ...]
    live: int
    labels: Array


@dataclass
class Builder:
    """State of the walk: labels so far, the layout of every value and weight, and the choices made on the way.

    ``choices`` maps a site (``"view_3"``, or ``"view_3/1"`` for a second one at the same node) to the side that may
    shrink; sites it does not name take the larger side.
    """

    graph_module: fx.GraphModule
    choices: Mapping[str, int] = field(default_factory=dict)
    labels: Labels = field(default_factory=Labels)
    values: dict[fx.Node, Any] = field(default_factory=dict)
    weights: dict[str, Layout] = field(default_factory=dict)
    sites: dict[str, Site] = field(default_factory=dict)
    edges: list[tuple[tuple[str, str, int], tuple[str, str, int], str]] = field(default_factory=list)
    barriers: dict[str, str] = field(default_factory=dict)
    normed: list[Array] = field(default_factory=list)
    makes: dict[str, tuple[int, ...]] = field(default_factory=dict)  # weight → dimensions that a layer makes
    groups: dict[str, Dim] = field(default_factory=dict)  # grouped layer → the dimension that counts its groups
    _of_tensor: dict[int, str] = field(default_factory=dict)

    # --- weights -----------------------------------------------------------------------------------------------

    def weight(
        self, path: str, tensor: torch.Tensor, *, layout: Sequence[Dim | None], site: str, makes: tuple[int, ...] = ()
    ) -> Layout:
        """Say how a weight's dimensions lie; a dimension given as None gets labels of its own.

        A weight met again (tied, or a layer called twice) keeps its first layout, and the new one is made equal.
        """
        key = self._of_tensor.setdefault(id(tensor), path)
        known = self.weights.get(key)
        if known is None:
            known = tuple(
                self.fresh(size) if dim is None else dim for dim, size in zip(layout, tensor.shape, strict=True)
            )
            self.weights[key] = known
        else:
            for mine, theirs in zip(known, layout, strict=True):
                if theirs is not None:
                    self.align(mine, theirs, site)
        if key != path:
            self.weights[path] = known
        if makes:
            self.makes[path] = makes
        return known

    def fresh(self, size: int, *, made: bool = False) -> Dim:
        """A dimension with new labels."""
        if size == 1 and not made:
            return inert(1)
        return (Factor(int(size), Block(self.labels.fresh((int(size),), made=made))),)

    # --- equalities --------------------------------------------------------------------------------------------

    def align(self, left: Dim, right: Dim, site: str) -> None:
        """Make two dimensions of equal size lose the same indices."""
        if not is_live(left) and not is_live(right):
            return
        if not is_live(left) or not is_live(right):
            self.pin([left, right], site, "it meets a dimension from which nothing can be removed")
            return
        if self._align_blocks(left, right):
            return
        a, b = vector(left), vector(right)
        if a is not None and b is not None and len(a) == len(b):
            self.labels.unify(a, b)
            return
        self.pin([left, right], site, "two different splits of a dimension meet")

    def _align_blocks(self, left: Dim, right: Dim) -> bool:
        """Dimensions with the same factors and blocks on the same factors are equal block by block."""
        left = tuple(factor for factor in left if factor.size != 1)
        right = tuple(factor for factor in right if factor.size != 1)
        if [factor.size for factor in left] != [factor.size for factor in right]:
            return False
        pairs: list[tuple[Block, Block]] = []
        for a, b in zip(left, right, strict=True):
            if (a.block is None) != (b.block is None):
                return False
            if a.block is None or b.block is None:
                continue
            if a.axis != b.axis or a.block.labels.shape != b.block.labels.shape:
                return False
            if not any(a.block is x and b.block is y for x, y in pairs):
                if any(a.block is x or b.block is y for x, y in pairs):
                    return False
                pairs.append((a.block, b.block))
        for x, y in pairs:
            self.labels.unify(x.labels, y.labels)
        return True

    def pin(self, dims: Iterable[Dim], site: str, reason: str) -> None:
        """Nothing may be removed from these dimensions, and why."""
        for dim in dims:
            for block in blocks(dim):
                self.labels.pin(block.labels.reshape(-1), site, reason)

    def barrier(self, node: fx.Node, reason: str, dims: Iterable[Dim] | None = None) -> None:
        """``node`` stops removal along ``dims``, or along everything it reads."""
        self.barriers[node.name] = reason
        if dims is None:
            dims = self.dims_of_all(node)
        self.pin(dims, node.name, reason)

    # --- layouts -----------------------------------------------------------------------------------------------

    def dims_of(self, node: fx.Node) -> list[Dim]:
        """All dimensions of a node's value, of every tensor in it."""
        return list(_all_dims(self.values.get(node)))

    def dims_of_all(self, node: fx.Node) -> list[Dim]:
        """All dimensions of everything that ``node`` reads."""
        return [dim for source in node.all_input_nodes for dim in self.dims_of(source)]

    def layout(self, node: Any) -> Layout:
        """The layout of a tensor node."""
        found: Layout = self.values[node]
        return found

    def view(self, node: fx.Node, layout: Layout, sizes: Sequence[Any]) -> Layout:
        """``layout`` seen with other sizes; where a block falls apart, one side is chosen to stay removable."""
        groups = regroup(layout, sizes)
        if groups is None:
            self.barrier(node, "the view mixes dimensions in a way that cannot be followed", layout)
            return tuple(inert(size) for size in sizes)
        return self.separated(node, groups, sizes)

    def separated(self, node: fx.Node, groups: Sequence[Sequence[Factor]], sizes: Sequence[Any]) -> Layout:
        """Dimensions from factors, such that no block has axes in two of them."""
        dims = [tuple(group) or inert(size) for group, size in zip(groups, sizes, strict=True)]
        count = 0
        while True:
            split = _first_split(dims)
            if split is None:
                return tuple(dims)
            block, homes = split
            dims = self._choose(node, dims, block, homes, count)
            count += 1

    def _choose(self, node: fx.Node, dims: list[Dim], block: Block, homes: list[int], count: int) -> list[Dim]:
        name = node.name if count == 0 else f"{node.name}/{count}"
        axes = {home: [f.axis for f in dims[home] if f.block is block] for home in homes}
        sizes = tuple(int(np.prod([block.labels.shape[axis] for axis in axes[home]])) for home in homes)
        live = self.choices.get(name, int(np.argmax(sizes)))
        self.sites[name] = Site(node.name, sizes, live, block.labels)
        keep = axes[homes[live]]
        drop = [axis for axis in range(block.labels.ndim) if axis not in keep]
        # Indices that differ only along the sides that stay whole go together.
        ordered = block.labels.transpose(*keep, *drop).reshape(*(block.labels.shape[a] for a in keep), -1)
        self.labels.unify(ordered, ordered[..., :1])
        fresh = Block(np.ascontiguousarray(ordered[..., 0]))

        def resolved(factor: Factor) -> Factor:
            if factor.block is not block:
                return factor
            return Factor(factor.size, fresh, keep.index(factor.axis)) if factor.axis in keep else Factor(factor.size)

        return [tuple(resolved(factor) for factor in dim) for dim in dims]

    def concatenated(self, node: fx.Node, parts: Sequence[Dim]) -> Dim:
        """The dimension that results from joining ``parts`` end to end."""
        if not any(is_live(part) for part in parts):
            total: Any = 0
            for part in parts:
                total = total + size_of(part)
            return (Factor(total),)
        vectors = [self.vector_or_pinned(part, node) for part in parts]
        if any(found is None for found in vectors):
            self.barrier(node, "it joins a dimension of symbolic size to one from which channels could go", parts)
            total = 0
            for part in parts:
                total = total + size_of(part)
            return (Factor(total),)
        return (Factor(sum(map(len, vectors)), Block(np.concatenate(vectors))),)  # type: ignore[arg-type]

    def vector_or_pinned(self, dim: Dim, node: fx.Node) -> Array | None:
        """Labels of a dimension, index by index; pinned ones where it has none. None for a symbolic size."""
        size = size_of(dim)
        if not isinstance(size, int):
            return None
        found = vector(dim)
        if found is not None:
            return found
        if is_live(dim):
            self.pin([dim], node.name, "its indices are removable in two ways at once, which this operation mixes")
        return np.full(size, PINNED, dtype=np.int64)

    def edge(self, source: tuple[str, str, int], target: tuple[str, str, int], op: str) -> None:
        """Record a dependency between two dimensions for the graph that users see."""
        self.edges.append((source, target, op))


Rule = Callable[[Builder, fx.Node], Any]


def _first_split(dims: Sequence[Dim]) -> tuple[Block, list[int]] | None:
    homes: dict[int, tuple[Block, list[int]]] = {}
    for index, dim in enumerate(dims):
        for block in blocks(dim):
            homes.setdefault(id(block), (block, []))[1].append(index)
    for block, places in homes.values():
        if len(places) > 1:
            return block, places
    return None


def _all_dims(value: Any) -> Iterable[Dim]:
    if value is None:
        return
    if isinstance(value, list):
        for item in value:
            yield from _all_dims(item)
    else:
        yield from value


def module_of(builder: Builder, node: fx.Node) -> nn.Module:
    """The layer that a ``call_module`` node calls."""
    return builder.graph_module.get_submodule(str(node.target))
