"""Following one dimension of a value back through views, to the layer that made it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch import fx

from fxcompress.passes.fusion.facts import first_input, tensor_value

__all__ = ["Origin", "permutation", "trace_back"]

aten = torch.ops.aten

PERMUTES = {aten.permute.default, aten.transpose.int, aten.t.default}
RESHAPES = {
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.unsqueeze.default,
    aten.view_as.default,
    aten.reshape_as.default,
}


@dataclass(frozen=True)
class Origin:
    """Where a value comes from: ``node``, whose dimension ``dim`` it is, through the views ``between``.

    ``others`` are readers on the way, of the node or of a view, that see the value without what is to be folded.
    """

    node: fx.Node
    dim: int | None
    between: tuple[fx.Node, ...]
    others: tuple[fx.Node, ...]


def permutation(node: fx.Node, rank: int) -> list[int]:
    """Of a permuting node: which dimension of the input each dimension of the output is."""
    order = list(range(rank))
    if node.target is aten.t.default:
        return order[::-1]
    if node.target is aten.transpose.int:
        left, right = (int(dim) % rank for dim in node.args[1:3])  # type: ignore[arg-type]
        order[left], order[right] = order[right], order[left]
        return order
    dims: Any = node.args[1]
    return [int(dim) % rank for dim in dims]


def trace_back(reader: fx.Node, node: fx.Node, dim: int | None) -> Origin:
    """Follow ``dim`` of ``node`` (None: the value as a whole), which ``reader`` reads, back through views.

    Stops at the first node that is no view, or where ``dim`` is merged with others or split.
    """
    between: list[fx.Node] = []
    others: list[fx.Node] = []
    while True:
        others += [user for user in node.users if user is not reader]
        source = first_input(node)
        value, made = tensor_value(source), tensor_value(node)
        if source is None or value is None or made is None:
            break
        back = None
        if node.target in PERMUTES:
            back = None if dim is None else permutation(node, value.dim())[dim]
        elif node.target not in RESHAPES:
            break
        elif dim is not None:
            back = _same_dimension(made, dim, value)
            if back is None:
                break
        between.append(node)
        reader, node, dim = node, source, back
    return Origin(node, dim, tuple(between), tuple(others))


def _same_dimension(made: torch.Tensor, dim: int, source: torch.Tensor) -> int | None:
    """The dimension of ``source`` that a reshape to ``made`` left whole as ``dim``: same size, as much after it."""
    wanted = (_expression(made.shape[dim]), _product(made.shape[dim + 1 :]))
    for index, size in enumerate(source.shape):
        if (_expression(size), _product(source.shape[index + 1 :])) == wanted:
            return index
    return None


def _expression(size: Any) -> Any:
    return size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(size)


def _product(sizes: Any) -> Any:
    if not any(isinstance(size, torch.SymInt) for size in sizes):
        return sympy.Integer(math.prod(sizes))
    return sympy.prod([_expression(size) for size in sizes])
