"""The ATen calls that a function or a layer makes, recorded on fake values: nothing is computed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from fxcompress.errors import GraphError
from fxcompress.graph.shapes import no_guards

__all__ = ["OF_ANY_LAYOUT", "trace"]

aten = torch.ops.aten

OF_ANY_LAYOUT: dict[Any, Any] = {
    aten.view.default: aten.reshape.default,
    aten._unsafe_view.default: aten.reshape.default,
    aten.view_as.default: aten.reshape_as.default,
}
"""Among values nobody can tell a view from a copy, but a view insists on strides. Those are not the same on fake values
and on real ones, once a write became a value, or once a pass put other layers before it: so graphs reshape."""


def trace(
    function: Callable[..., Any],
    values: Sequence[Any],
    mode: FakeTensorMode,
    *,
    decompositions: Mapping[Any, Callable[..., Any]] | None = None,
) -> fx.GraphModule:
    """A functional ATen graph of ``function(*values)``; its placeholders are ``values``, in order.

    Args:
        function: returns a tensor, or a nested tuple or list of them.
        values: fake tensors and SymInts of ``mode``.
        mode: makes the fake values of the recorded nodes.
        decompositions: operations to take apart, each with its reference implementation in simpler operations. Without
            it composite operations (``linear``, ``conv2d``) stay whole.

    Raises:
        GraphError: the function writes into its arguments in a way that cannot be undone.
    """
    whole = decompositions is None
    table: Any = dict(decompositions or {})
    with mode, torch.no_grad(), no_guards(mode):
        values = _distinct(values)
        recorded = make_fx(function, table, tracing_mode="symbolic", pre_dispatch=whole)(*values)
        if _first_write(recorded) is not None:
            recorded = make_fx(torch.func.functionalize(recorded), table, tracing_mode="symbolic")(*values)
    write = _first_write(recorded)
    if write is not None:
        raise GraphError(f"{write} writes into its argument; graphs are functional")
    if not decompositions:  # whoever takes operations apart wants the simple ones
        for node in recorded.graph.nodes:
            node.target = OF_ANY_LAYOUT.get(node.target, node.target)
    return recorded


def _distinct(values: Sequence[Any]) -> list[Any]:
    """The values, with a copy of each tensor for every time that it occurs again.

    Two nodes may have one fake value between them, as two calls of one layer do. Tracing would take them for one
    argument, and the second would be lost.
    """
    seen: set[int] = set()
    made = []
    for value in values:
        if isinstance(value, torch.Tensor) and id(value) in seen:
            value = torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device=value.device)
        seen.add(id(value))
        made.append(value)
    return made


def _first_write(recorded: fx.GraphModule) -> Any:
    for node in recorded.graph.nodes:
        schema = getattr(node.target, "_schema", None)
        if schema is not None and schema.is_mutable:
            return node.target
    return None
