"""Whether what an operation makes of removed channels is zero.

Removing a channel is exact where its indices hold zeros once all of its weights are zeroed: then a sum over them, or
a product without a weight, loses nothing. A layer leaves zeros; ``relu`` keeps them; ``sigmoid`` does not. No list of
functions says so: the operation is run on zeros, with anything else in the places of operands that are not zero. Only
a number that the model holds and does not train (the bounds of a clamp) stands there as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

import numpy as np
import torch
from torch import fx
from torch.fx.node import map_aggregate
from torch.utils import _pytree as pytree

from fxcompress.analysis.dependency.builder import Builder
from fxcompress.analysis.dependency.layout import (
    Block,
    Dim,
    Dirt,
    blocks,
    gathered,
    is_live,
    matching,
    redone,
    size_of,
    spread,
)

__all__ = ["Rule", "combine", "contract", "every", "operands", "outcome", "product", "require_zero", "run_on_zeros"]

ZERO, OTHER, NOT_FINITE = 0, 1, 2

Rule = Callable[[Sequence[Dirt]], Any]
"""From the dirt of each operand to the outcome, index by index."""


def product(dirt: Sequence[Dirt]) -> Any:
    """A product is zero where any factor is."""
    return reduce(np.logical_and, dirt)


def every(dirt: Sequence[Dirt]) -> Any:
    """Operands next to each other: zero where all are."""
    return reduce(np.logical_or, dirt)


def combine(b: Builder, node: fx.Node, dims: Sequence[Dim], rule: Rule) -> Dim:
    """One dimension of operands that broadcast against each other; equal indices go from all."""
    full = [dim for dim in dims if size_of(dim) != 1]
    if not full:
        return next((dim for dim in dims if is_live(dim)), dims[0])
    live = [dim for dim in full if is_live(dim)]
    if not live:
        return full[0]
    for other in full:
        if other is not live[0]:
            b.align(live[0], other, node.name)
    if len(live) < len(full):  # then nothing goes from any of them
        return next(dim for dim in full if not is_live(dim))
    chosen = next((dim for dim in live if not any(block.soft for block in blocks(dim))), live[0])

    def change(block: Block) -> Block:
        found = np.asarray(rule([dirt_along(chosen, block, dim) for dim in dims]))
        if (found == NOT_FINITE).any():
            reason = f"{name(node)} is not finite where a removed channel is zero"
            b.labels.pin(np.broadcast_to(block.labels, found.shape)[found == NOT_FINITE], node.name, reason)
        return Block(block.labels, _short(found != ZERO), block.soft)

    return redone(chosen, change)


def contract(b: Builder, node: fx.Node, dims: Sequence[Dim]) -> None:
    """A sum of products over a dimension: equal indices go, and at those one operand at least must be zero."""
    full = [dim for dim in dims if size_of(dim) != 1]
    for other in full[1:]:
        b.align(full[0], other, node.name)
    require_zero(b, node, dims, f"{name(node)} sums over channels that would not be zero if they were removed")


def require_zero(b: Builder, node: fx.Node, dims: Sequence[Dim], reason: str) -> None:
    """Pin the indices at which none of ``dims`` is zero after their removal."""
    chosen = next((dim for dim in dims if is_live(dim) and size_of(dim) != 1), None)
    if chosen is None:
        return
    for block in blocks(chosen):
        dirty = product([dirt_along(chosen, block, dim) for dim in dims])
        dirty = np.broadcast_to(dirty, block.labels.shape)
        if dirty.any():
            b.barriers[node.name] = reason
            b.labels.pin(block.labels[dirty], node.name, reason)


def dirt_along(chosen: Dim, block: Block, dim: Dim) -> Dirt:
    """The dirt of ``dim`` brought to the shape of a block of ``chosen``, to which it is aligned."""
    if dim is chosen:
        return block.dirt
    everywhere = np.ones((), dtype=bool)
    if not is_live(dim) or size_of(dim) == 1:
        return everywhere
    pairs = matching(chosen, dim)
    if pairs is not None:
        return next(theirs.dirt for mine, theirs in pairs if mine is block)
    found = spread(dim)
    if found is None or spread(chosen) is None:
        return everywhere
    return gathered(chosen, found[1])


def _short(dirty: Any) -> Any:
    """One bool where all are equal."""
    return bool(dirty.all()) if dirty.all() == dirty.any() else dirty


# --- running operations on zeros -----------------------------------------------------------------------------------

_FLOATS = (0.37, -1.21, 2.83, -0.053, 1.7e4, -1.3e4)
_CREATE = {torch.ops.aten.zeros_like.default, torch.ops.aten.new_zeros.default}
_known: dict[Any, int] = {}


def operands(node: fx.Node) -> list[fx.Node]:
    """The tensors that a node reads, one per place in its arguments."""
    found: list[fx.Node] = []

    def visit(item: Any) -> Any:
        if isinstance(item, fx.Node) and isinstance(item.meta.get("val"), torch.Tensor):
            found.append(item)
        return item

    map_aggregate((node.args, node.kwargs), visit)
    return found


def run_on_zeros(b: Builder, node: fx.Node) -> Rule:
    """The rule of an elementwise operation."""
    numbers = tuple(_number(b, source) for source in operands(node))

    def rule(dirt: Sequence[Dirt]) -> Any:
        codes = sum(item.astype(np.int64) << place for place, item in enumerate(dirt))
        table = np.full(1 << len(dirt), OTHER)
        for code in np.unique(codes).tolist():
            table[code] = outcome(node, tuple(bool(code >> place & 1) for place in range(len(dirt))), numbers)
        return table[codes]

    return rule


def _number(b: Builder, node: fx.Node) -> float | None:
    """The value of a buffer or constant that is one number."""
    if node.op != "get_attr" or node.meta["val"].numel() != 1:
        return None
    owner, _, name = str(node.target).rpartition(".")
    tensor: torch.Tensor = getattr(b.graph_module.get_submodule(owner), name)
    return None if isinstance(tensor, torch.nn.Parameter) or tensor.device.type == "meta" else tensor.item()


def outcome(node: fx.Node, dirty: tuple[bool, ...], numbers: tuple[float | None, ...] = ()) -> int:
    """What an elementwise operation makes of zeros, of known ``numbers``, and of anything where operands are dirty."""
    if node.target in _CREATE:
        return ZERO
    if all(dirty):
        return OTHER
    dtypes = tuple(item.meta["val"].dtype for item in operands(node))
    constants = map_aggregate((node.args, node.kwargs), lambda item: "·" if isinstance(item, fx.Node) else item)
    key = (node.target, str(constants), dtypes, dirty, numbers)
    if key not in _known:
        _known[key] = _run(node, dirty, numbers)
    return _known[key]


def _run(node: fx.Node, dirty: tuple[bool, ...], numbers: tuple[float | None, ...]) -> int:
    place = iter(range(len(dirty)))

    def sample(item: Any) -> Any:
        if isinstance(item, fx.Node):
            value = item.meta.get("val")
            if not isinstance(value, torch.Tensor):
                return 7919  # a size
            index = next(place)
            if not dirty[index]:
                return torch.zeros(len(_FLOATS), dtype=value.dtype)
            if numbers and (number := numbers[index]) is not None:
                return torch.full((len(_FLOATS),), number, dtype=value.dtype)
            values = torch.tensor(_FLOATS).roll(index)
            return values > 0 if value.dtype == torch.bool else values.to(value.dtype)
        return torch.device("cpu") if isinstance(item, torch.device) else item

    args, kwargs = map_aggregate((node.args, node.kwargs), sample)
    kwargs = {key: value for key, value in kwargs.items() if key not in ("memory_format", "layout", "pin_memory")}
    try:
        with torch.no_grad():
            made = node.target(*args, **kwargs)  # type: ignore[operator]
    except (RuntimeError, TypeError, ValueError, IndexError):
        return OTHER  # it does not run on samples: nothing is known
    results = [leaf for leaf in pytree.tree_leaves(made) if isinstance(leaf, torch.Tensor)]
    if all(bool((leaf == 0).all()) for leaf in results):
        return ZERO
    finite = any(bool(leaf.isfinite().any()) for leaf in results)
    return OTHER if finite else NOT_FINITE


def name(node: fx.Node) -> str:
    """The operation, as a reason names it."""
    return str(getattr(node.target, "_opname", node.target))
