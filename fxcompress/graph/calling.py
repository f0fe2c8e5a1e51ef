"""How a graph is called: as the user's model was, with the nesting and the constants that it was captured with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch.fx import _pytree as fx_pytree
from torch.fx.graph import _PyTreeCodeGen, _PyTreeInfo
from torch.utils import _pytree as pytree

from fxcompress.errors import PreconditionError

__all__ = ["CallCodeGen"]


class CallCodeGen(_PyTreeCodeGen):
    """Generates a ``forward`` that takes and returns what the user's model did.

    Torch's own lets a longer list or further keys of a dict pass unseen, and an argument that capture made part of the
    graph (``None``, a number) be anything. Here both are refused.
    """

    def __init__(self, names: Sequence[str], in_spec: pytree.TreeSpec, out_spec: pytree.TreeSpec) -> None:
        super().__init__(_PyTreeInfo(list(names), in_spec, out_spec))

    def gen_var_bindings(self, fn_args: list[str], free_vars: list[str], expanded_def: bool) -> str:
        text = super().gen_var_bindings(fn_args, free_vars, expanded_def)
        return text.replace("fx_pytree.tree_flatten_spec(", "_flatten_call(self, ", 1)

    def additional_globals(self) -> list[tuple[str, Any]]:
        return [*super().additional_globals(), ("_flatten_call", _flatten_call)]


def _flatten_call(graph_module: fx.GraphModule, call: Any, spec: pytree.TreeSpec) -> list[Any]:
    try:
        leaves = fx_pytree.tree_flatten_spec(call, spec)
    except (ValueError, TypeError, KeyError, RuntimeError, AttributeError, IndexError) as error:
        raise _not_nested(spec, error) from error
    if len(pytree.tree_leaves(call)) != len(leaves):
        raise _not_nested(spec, f"{len(pytree.tree_leaves(call))} values instead of {len(leaves)}")
    for node, leaf in zip(graph_module.graph.find_nodes(op="placeholder"), leaves, strict=True):
        if "val" in node.meta and not isinstance(node.meta["val"], (torch.Tensor, torch.SymInt)):
            fixed = node.meta["val"]
            if type(leaf) is not type(fixed) or (leaf != fixed and fixed == fixed):
                raise PreconditionError(
                    f"the model was captured with {node.name} = {fixed!r}, which is part of the graph; "
                    f"this call gives {leaf if not isinstance(leaf, torch.Tensor) else 'a tensor'!r}",
                    remedy="capture the model again with that value, or as a tensor if it shall vary",
                )
    return leaves


def _not_nested(spec: pytree.TreeSpec, reason: object) -> PreconditionError:
    return PreconditionError(
        f"the inputs are not nested as those that the model was captured with: {reason}", remedy=f"expected {spec}"
    )
