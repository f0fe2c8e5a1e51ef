"""Memory layout: the one thing about a value that a functional graph does not show, and that ``view`` relies on.

A copy may be what makes a later ``view`` possible. So what changes strides is taken out only where every reader makes
the same strides of the value without it; then nothing further down can tell.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch.fx.node import map_arg

from fxcompress.graph.edit import GraphEditor
from fxcompress.graph.info import info
from fxcompress.graph.shapes import no_guards
from fxcompress.passes.base import Skip
from fxcompress.passes.fusion.facts import Facts, tensor_value

__all__ = ["VIEWS", "as_reshape", "kept_for_layout", "outcome", "same_layout"]

aten = torch.ops.aten

VIEWS: dict[Any, Any] = {aten.view.default: aten.reshape.default, aten._unsafe_view.default: aten.reshape.default}
"""Operations that insist on a layout, and those that make the same value of any."""


def same_layout(left: Any, right: Any) -> bool:
    """Whether two fake tensors of one shape have the same strides, where a dimension has more than one element."""
    strides = zip(left.shape, left.stride(), right.stride(), strict=True)
    return all(_expression(a) == _expression(b) for size, a, b in strides if not (isinstance(size, int) and size == 1))


def outcome(facts: Facts, target: Any, args: Any, kwargs: Any, known: dict[fx.Node, torch.Tensor]) -> Any:
    """What an operation would produce if the nodes of ``known`` had those values; None where it would fail."""
    given, named = map_arg((args, kwargs), lambda n: known.get(n, n.meta.get("val")))
    mode = info(facts.graph_module).fake_mode
    try:
        with mode, torch.no_grad(), no_guards(mode), enable_python_dispatcher():
            return target(*given, **named)
    except RuntimeError:
        return None


def kept_for_layout(facts: Facts, node: fx.Node, source: fx.Node) -> Skip | None:
    """A skip where reading ``source`` instead of the equal ``node`` would change the layout of what readers make."""
    value, instead = tensor_value(node), tensor_value(source)
    if value is None or instead is None or same_layout(value, instead):
        return None
    kept: list[str] = []
    for user in node.users:
        if user.op == "output":
            continue  # the caller gets the value, whatever its layout
        made = None
        if user.op == "call_function":
            target = VIEWS.get(user.target, user.target)
            made = outcome(facts, target, user.args, user.kwargs, {node: instead})
        recorded = tensor_value(user)
        if recorded is None or not isinstance(made, torch.Tensor) or not same_layout(made, recorded):
            kept.append(user.name)
    reason = "It copies into another memory layout, which later operations rely on."
    return Skip(node.name, "layout", reason, tuple(kept)) if kept else None


def as_reshape(editor: GraphEditor, view: fx.Node, source: fx.Node) -> None:
    """Let a view be a reshape of ``source``, which equals what it views but may lie in memory otherwise."""
    args = (source, *view.args[1:])
    editor.replace(view, editor.insert_call(aten.reshape.default, args, before=view, like=view, name="reshape"))


def _expression(size: Any) -> Any:
    return size.node.expr if isinstance(size, torch.SymInt) else size
