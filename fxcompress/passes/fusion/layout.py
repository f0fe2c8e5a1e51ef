"""Memory layout: the one thing about a value that a functional graph does not show.

A captured graph reshapes where the model had views, so strides matter to the few operations that ask for them. Where
a graph has one of those, nothing that changes strides is taken out.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch.fx.node import map_arg

from fxcompress.graph.info import info
from fxcompress.graph.shapes import no_guards
from fxcompress.passes.base import Skip
from fxcompress.passes.fusion.facts import Facts

__all__ = ["kept_for_layout", "outcome"]

aten = torch.ops.aten

# They compute from strides, or fail where the last dimension is not dense.
_READ_STRIDES = (aten.as_strided.default, aten.view.dtype, aten.view_as_complex.default, aten.view.default)


def outcome(facts: Facts, target: Any, args: Any, kwargs: Any) -> Any:
    """What an operation would produce on the fake values of its arguments; None where it would fail."""
    given, named = map_arg((args, kwargs), lambda n: n.meta.get("val"))
    mode = info(facts.graph_module).fake_mode
    try:
        with mode, torch.no_grad(), no_guards(mode), enable_python_dispatcher():
            return target(*given, **named)
    except RuntimeError:
        return None


def kept_for_layout(facts: Facts, node: fx.Node) -> Skip | None:
    """A skip where the graph has an operation that may rely on the strides that ``node`` makes."""
    graph = facts.graph_module.graph
    readers = [n.name for target in _READ_STRIDES for n in graph.find_nodes(op="call_function", target=target)]
    if not readers:
        return None
    reason = "It may copy into another memory layout, which a later operation relies on."
    return Skip(node.name, "layout", reason, tuple(readers))
