"""Sizes of a graph's fake values as plain numbers, at a batch size of one's choice."""

from __future__ import annotations

import math
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch import fx

from fxcompress.errors import OptionError
from fxcompress.graph.info import info

__all__ = ["GraphSizes"]


class GraphSizes:
    """Numbers for the symbolic sizes of one graph. Each expression is evaluated once.

    The batch is the symbol of dim 0 of the first tensor input; with it go the dims 0 of other inputs that were as long
    in the example and that nobody named. Every other symbol keeps its size in the example inputs. A size that depends
    on the values of tensors is unknown and counts as 1.

    Args:
        graph_module: a captured graph.
        batch: what the batch shall be.

    Raises:
        OptionError: ``batch`` is not positive.
    """

    def __init__(self, graph_module: fx.GraphModule, batch: int = 1) -> None:
        if batch < 1:
            raise OptionError(f"batch={batch}", where="batch", remedy="use a positive batch size")
        self._values = _symbol_values(graph_module, batch)
        self._numbers: dict[sympy.Basic, int] = {}
        self.known = info(graph_module).has_shapes
        """Whether the graph has shapes; one traced without example inputs has none."""

    def number(self, size: Any) -> int:
        """A size, which may be symbolic, as a number."""
        if not isinstance(size, torch.SymInt):
            return int(size)
        expression = size.node.expr
        if expression not in self._numbers:
            unknown = {symbol: sympy.Integer(1) for symbol in expression.free_symbols if symbol not in self._values}
            self._numbers[expression] = int(expression.xreplace(self._values | unknown))
        return self._numbers[expression]

    def of(self, tensor: torch.Tensor) -> tuple[int, ...]:
        """Sizes of a fake tensor."""
        return tuple(size if type(size) is int else self.number(size) for size in tensor.shape)

    def strides(self, tensor: torch.Tensor) -> tuple[int, ...]:
        """Strides of a fake tensor, in elements."""
        return tuple(self.number(stride) for stride in tensor.stride())

    def bytes_of(self, tensor: torch.Tensor) -> int:
        """Bytes of a fake tensor's elements."""
        return math.prod(self.of(tensor)) * tensor.element_size()


def _symbol_values(graph_module: fx.GraphModule, batch: int) -> dict[sympy.Basic, sympy.Integer]:
    names = info(graph_module).dim_names
    values: dict[sympy.Basic, sympy.Integer] = {}
    example: int | None = None  # the batch size of the example inputs
    first = True
    for node in graph_module.graph.nodes:
        value = node.meta.get("val")
        if node.op != "placeholder" or not isinstance(value, torch.Tensor):
            continue
        for dim, size in enumerate(value.shape):
            if not isinstance(size, torch.SymInt) or not size.node.expr.is_symbol or size.node.expr in values:
                continue
            symbol, hint = size.node.expr, int(size.node.hint) if size.node.has_hint() else 1
            is_batch = dim == 0 and (
                first or (hint == example and names.get(str(symbol)) in ("batch", f"{node.name}_dim0"))
            )
            if first and dim == 0:
                example = hint
            values[symbol] = sympy.Integer(batch if is_batch else hint)
        first = False
    return values
