"""How a graph is called: as the user's model was, with the nesting, constants and fixed sizes of its capture."""

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

    Torch's own lets a longer list or further keys of a dict pass unseen, an argument that capture made part of the
    graph (``None``, a number) be anything, and a tensor have any size, though the graph computes with the sizes that
    it was captured with: ``x.sum(2) / x.shape[2]`` would divide by another length. Here all of these are refused.
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
    sizes: dict[Any, int] = {}  # of each symbol, in this call
    for node, leaf in zip(graph_module.graph.find_nodes(op="placeholder"), leaves, strict=True):
        if "val" not in node.meta:
            continue  # captured without example inputs
        value = node.meta["val"]
        if isinstance(value, torch.Tensor):
            if isinstance(leaf, torch.Tensor):
                if leaf.dtype != value.dtype:
                    _check_dtype(graph_module, node.name, value.dtype, leaf.dtype)
                _check_sizes(graph_module, node.name, value, leaf, sizes)
        elif not isinstance(value, torch.SymInt) and (type(leaf) is not type(value) or _differ(leaf, value)):
            raise PreconditionError(
                f"the model was captured with {node.name} = {value!r}, which is part of the graph; "
                f"this call gives {leaf if not isinstance(leaf, torch.Tensor) else 'a tensor'!r}",
                remedy="capture the model again with that value, or as a tensor if it shall vary",
            )
    return leaves


def _differ(given: Any, fixed: Any) -> bool:
    return bool(given != fixed and fixed == fixed)  # NaN is itself here


def _check_dtype(graph_module: fx.GraphModule, name: str, captured: torch.dtype, given: torch.dtype) -> None:
    """Refuse another dtype, unless the graph was brought to it (``graph.half()``) or autocast converts."""
    kinds = [(dtype.is_floating_point, dtype.is_complex, dtype == torch.bool) for dtype in (captured, given)]
    floats = {weight.dtype for weight in graph_module.parameters() if weight.is_floating_point()}
    converted = any(map(torch.is_autocast_enabled, ("cpu", "cuda")))
    if kinds[0] == kinds[1] and (not captured.is_floating_point or not floats or given in floats or converted):
        return
    raise PreconditionError(
        f"the model was captured with {name} of {captured}, this call gives {given}",
        where=f"input {name!r}",
        remedy=f"give {name}.to({captured}), or compile again with an example of {given}",
    )


def _check_sizes(
    graph_module: fx.GraphModule, name: str, captured: torch.Tensor, given: torch.Tensor, sizes: dict[Any, int]
) -> None:
    """Refuse a tensor whose fixed sizes differ, or whose sizes of one name do; ``sizes`` collects the symbols'."""
    expected = captured.shape
    if len(expected) != given.dim():
        raise _of_another_size(graph_module, name, expected, given, "the number of dims differs")
    for dim, (wanted, size) in enumerate(zip(expected, given.shape, strict=True)):
        if not isinstance(wanted, torch.SymInt):
            if size != wanted:
                raise _of_another_size(graph_module, name, expected, given, f"dim {dim} is fixed")
        elif wanted.node.expr.is_symbol and sizes.setdefault(wanted.node.expr, size) != size:
            reason = f"what is equal in dim {dim} and in another input must be equal in a call"
            raise _of_another_size(graph_module, name, expected, given, reason)


def _of_another_size(
    graph_module: fx.GraphModule, name: str, expected: torch.Size, given: torch.Tensor, reason: str
) -> PreconditionError:
    names = graph_module.meta["fxcompress"].dim_names
    shape = ", ".join(names.get(str(size), str(size)) for size in expected)
    return PreconditionError(
        f"the model was captured with {name} of shape [{shape}], this call gives {list(given.shape)}: {reason}",
        where=f"input {name!r}",
        remedy="give inputs of that shape, or compile again and name the sizes that vary: "
        "dynamic_shapes={'x': {0: 'batch', 2: 'height'}}",
    )


def _not_nested(spec: pytree.TreeSpec, reason: object) -> PreconditionError:
    return PreconditionError(
        f"the inputs are not nested as those that the model was captured with: {reason}", remedy=f"expected {spec}"
    )
