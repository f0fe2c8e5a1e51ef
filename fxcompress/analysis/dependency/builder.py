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
    Dirt,
    Factor,
    Layout,
    blocks,
    cleaned,
    inert,
    is_live,
    labelled,
    matching,
    regroup,
    size_of,
    spread,
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
    counts: dict[fx.Node, Dim] = field(default_factory=dict)  # call with a number of groups → their dimension
    reindexed: dict[fx.Node, tuple[int, Array]] = field(default_factory=dict)  # movement → dimension, index picked
    _of_tensor: dict[int, str] = field(default_factory=dict)
    _paths: dict[int, set[str]] = field(default_factory=dict)

    # --- weights -----------------------------------------------------------------------------------------------

    def weight(
        self, path: str, tensor: torch.Tensor, *, layout: Sequence[Dim | None], site: str, makes: tuple[int, ...] = ()
    ) -> Layout:
        """Say how a weight's dimensions lie; a dimension given as None gets labels of its own.

        A weight met again (tied, or a layer called twice) keeps its first layout, and the new one is made equal.
        """
        key = self._of_tensor.setdefault(id(tensor), path)
        self._paths.setdefault(id(tensor), set()).add(path)
        known = self.weights.get(key)
        if known is None:
            known = tuple(
                self.fresh(size) if dim is None else cleaned(dim)
                for dim, size in zip(layout, tensor.shape, strict=True)
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

    def shared(self, tensor: torch.Tensor) -> bool:
        """Whether a weight is reached by several paths."""
        return len(self._paths.get(id(tensor), ())) > 1

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
        pairs = matching(left, right)
        if pairs is not None:
            for x, y in pairs:
                self.labels.unify(x.labels, y.labels)
            return
        a, b = vector(left), vector(right)
        if a is not None and b is not None and len(a) == len(b):
            self.labels.unify(a, b)
            return
        whole = self.hardened(left, site), self.hardened(right, site)
        if whole[0] is not left or whole[1] is not right:
            if is_live(whole[0]) and is_live(whole[1]):
                self.align(*whole, site)
            elif is_live(whole[0]) or is_live(whole[1]):
                self.pin(whole, site, "it meets a dimension from which nothing can be removed")
            return
        self.pin([left, right], site, "two different splits of a dimension meet")

    def hardened(self, dim: Dim, site: str) -> Dim:
        """The dimension with its soft blocks kept whole."""
        soft = [block for block in blocks(dim) if block.soft]
        if not soft:
            return dim
        for block in soft:
            self.labels.pin(block.labels.reshape(-1), site, "what is repeated meets a split of another dimension")
        return tuple(Factor(f.size) if f.block is not None and f.block.soft else f for f in dim)

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

    def view(self, node: fx.Node, layout: Layout, sizes: Sequence[Any], *, live: int | None = None) -> Layout:
        """``layout`` seen with other sizes; where a block falls apart, one side is chosen to stay removable.

        ``live`` says which dimension of the result that is where the operation leaves no choice.
        """
        groups = regroup(layout, sizes)
        if groups is None:
            self.barrier(node, "the view mixes dimensions in a way that cannot be followed", layout)
            return tuple(inert(size) for size in sizes)
        return self.separated(node, groups, sizes, live=live)

    def separated(
        self, node: fx.Node, groups: Sequence[Sequence[Factor]], sizes: Sequence[Any], *, live: int | None = None
    ) -> Layout:
        """Dimensions from factors, such that no block has axes in two of them."""
        dims = [tuple(group) or inert(size) for group, size in zip(groups, sizes, strict=True)]
        count = 0
        while True:
            split = _first_split(dims)
            if split is None:
                return tuple(dims)
            block, homes = split
            if live in homes:
                dims = self._resolve(dims, block, homes, homes.index(live))
                continue
            dims = self._choose(node, dims, block, homes, count)
            count += 1

    def _choose(self, node: fx.Node, dims: list[Dim], block: Block, homes: list[int], count: int) -> list[Dim]:
        name = node.name if count == 0 else f"{node.name}/{count}"
        axes = {home: [f.axis for f in dims[home] if f.block is block] for home in homes}
        sizes = tuple(int(np.prod([block.labels.shape[axis] for axis in axes[home]])) for home in homes)
        live = self.choices.get(name, int(np.argmax(sizes)))
        self.sites[name] = Site(node.name, sizes, live, block.labels)
        return self._resolve(dims, block, homes, live)

    def _resolve(self, dims: list[Dim], block: Block, homes: list[int], live: int) -> list[Dim]:
        """Let only the ``live``-th of a block's homes lose indices."""
        keep = [factor.axis for factor in dims[homes[live]] if factor.block is block]
        drop = [axis for axis in range(block.labels.ndim) if axis not in keep]
        # Indices that differ only along the sides that stay whole go together.
        shape = tuple(block.labels.shape[axis] for axis in keep)
        ordered = block.moved(lambda values: values.transpose(*keep, *drop).reshape(*shape, -1))
        self.labels.unify(ordered.labels, ordered.labels[..., :1])
        dirty = ordered.dirty if isinstance(ordered.dirty, bool) else ordered.dirt.any(-1)
        fresh = Block(np.ascontiguousarray(ordered.labels[..., 0]), dirty, block.soft)

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
        found = [self.spread_or_pinned(part, node) for part in parts]
        if any(item is None for item in found):
            self.barrier(node, "it joins a dimension of symbolic size to one from which channels could go", parts)
            total = 0
            for part in parts:
                total = total + size_of(part)
            return (Factor(total),)
        joined = [item for item in found if item is not None]
        return labelled(np.concatenate([item[0] for item in joined]), np.concatenate([item[1] for item in joined]))

    def vector_or_pinned(self, dim: Dim, node: fx.Node) -> Array | None:
        """Labels of a dimension, index by index; pinned ones where it has none. None for a symbolic size."""
        found = self.spread_or_pinned(dim, node)
        return None if found is None else found[0]

    def spread_or_pinned(self, dim: Dim, node: fx.Node) -> tuple[Array, Dirt] | None:
        """Label and dirt of each index of a dimension; pinned where it has none. None for a symbolic size."""
        size = size_of(dim)
        if not isinstance(size, int):
            return None
        found = spread(dim) or spread(self.hardened(dim, node.name))
        if found is not None:
            return found
        if is_live(dim):
            self.pin([dim], node.name, "its indices are removable in two ways at once, which this operation mixes")
        return np.full(size, PINNED, dtype=np.int64), np.zeros(size, dtype=bool)

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
