"""Running a graph on example inputs: flat leaves, other sizes of the dynamic dims, and the error between outputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch.fx import _pytree as fx_pytree
from torch.utils import _pytree as pytree

from fxcompress.errors import PreconditionError
from fxcompress.graph.difference import difference
from fxcompress.graph.edit import copy_graph
from fxcompress.graph.info import GraphInfo, info
from fxcompress.heap import give_back

__all__ = [
    "computed_outputs",
    "dynamic_sizes",
    "flat_inputs",
    "max_relative_error",
    "nested_inputs",
    "outputs_of",
    "resized",
]


def flat_inputs(graph_module: fx.GraphModule, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """The leaves of a call, in placeholder order. Keyword arguments may come in any order.

    Raises:
        PreconditionError: the structure is not that of the captured call.
    """
    facts = info(graph_module)
    positional, keywords = facts.in_spec.child(0), facts.in_spec.child(1)
    given = list(args)
    names = facts.parameter_names
    # A positional argument may be given by name, and a keyword by position: both are one list of names.
    by_name = dict(zip(names, given, strict=False)) | dict(kwargs)
    if len(given) > len(names) or set(by_name) != set(names) or len(given) + len(kwargs) != len(names):
        raise PreconditionError(
            f"the model was captured with the arguments {', '.join(names)}; "
            f"this call gives {len(given)} positional and {', '.join(kwargs) or 'no'} keyword arguments",
            remedy="call it with the arguments it was captured with",
        )
    count = positional.num_children
    ordered = tuple(by_name[name] for name in names[:count])
    named = {name: by_name[name] for name in keywords.context}
    try:
        return list(fx_pytree.tree_flatten_spec((ordered, named), facts.in_spec))
    except (ValueError, TypeError, KeyError, RuntimeError, AttributeError, IndexError) as error:
        raise PreconditionError(
            f"the inputs are not nested as the ones the model was captured with: {error}",
            remedy=f"expected {facts.in_spec}",
        ) from error


def nested_inputs(graph_module: fx.GraphModule, leaves: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """``(args, kwargs)`` as the user's model takes them, from flat leaves."""
    args, kwargs = pytree.tree_unflatten(list(leaves), info(graph_module).in_spec)
    return args, kwargs


def outputs_of(
    function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], seed: int = 0
) -> list[Any]:
    """Flat leaves of what ``function(*args, **kwargs)`` returns; no gradients, random state and heap as before."""
    if isinstance(function, fx.GraphModule) and isinstance(function.meta.get("fxcompress"), GraphInfo):
        if any(module.training for module in function.modules()):
            function = copy_graph(function).eval()  # a norm in train mode would update statistics that are shared
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        leaves: list[Any] = pytree.tree_leaves(function(*args, **kwargs))
    give_back()
    return leaves


def computed_outputs(graph_module: fx.GraphModule) -> list[bool]:
    """For each output leaf, whether an engine gives it: tensors and sizes, but no constants."""
    leaves = graph_module.graph.output_node().args[0]
    values = [leaf.meta.get("val") if isinstance(leaf, fx.Node) else leaf for leaf in leaves]  # type: ignore[union-attr]
    return [isinstance(value, (torch.Tensor, torch.SymInt)) for value in values]


def dynamic_sizes(graph_module: fx.GraphModule, leaves: Sequence[Any]) -> dict[str, int]:
    """What each symbolic size of the graph is for these leaves: ``{"s77": 2}``."""
    sizes: dict[str, int] = {}
    for node, leaf in zip(_placeholders(graph_module), leaves, strict=True):
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor) or not isinstance(leaf, torch.Tensor):
            continue
        for dim, size in enumerate(value.shape):
            if isinstance(size, torch.SymInt) and size.node.expr.is_symbol:
                sizes.setdefault(str(size.node.expr), int(leaf.shape[dim]))
    return sizes


def resized(graph_module: fx.GraphModule, leaves: Sequence[Any], sizes: Mapping[str, int]) -> list[Any] | None:
    """The leaves with each symbolic size set as told, by repeating or cutting; None where a dim cannot be set.

    ``sizes`` maps symbols to new sizes; symbols it does not name keep theirs.
    """
    wanted = dynamic_sizes(graph_module, leaves) | dict(sizes)
    made: list[Any] = []
    for node, leaf in zip(_placeholders(graph_module), leaves, strict=True):
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor) and isinstance(leaf, torch.Tensor):
            for dim, size in enumerate(value.shape):
                if not isinstance(size, torch.SymInt):
                    continue
                expression = size.node.expr
                known = {symbol: wanted[str(symbol)] for symbol in expression.free_symbols if str(symbol) in wanted}
                if len(known) != len(expression.free_symbols):
                    return None
                length = int(expression.subs(known))
                if length != leaf.shape[dim]:
                    index = torch.arange(length, device=leaf.device) % leaf.shape[dim]
                    leaf = leaf.index_select(dim, index)
        made.append(leaf)
    return made


def max_relative_error(expected: Sequence[Any], actual: Sequence[Any]) -> tuple[float, int]:
    """The largest ``max|a − b| / max|a|`` over the outputs, and which output has it.

    NaN must stand where NaN stood, infinities where those stood: else the error is infinite. So it is where the
    number of outputs, a shape or a dtype differs. Values that are no tensors must be equal.
    """
    if len(expected) != len(actual):
        return float("inf"), min(len(expected), len(actual))
    worst, index = 0.0, 0
    for position, (a, b) in enumerate(zip(expected, actual, strict=True)):
        error = _relative_error(a, b)
        if error > worst:
            worst, index = error, position
    return worst, index


def _relative_error(a: Any, b: Any) -> float:
    if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor):
        return 0.0 if a == b else float("inf")
    if a.shape != b.shape or a.dtype != b.dtype:
        return float("inf")
    if not a.is_floating_point() and not a.is_complex():
        return 0.0 if torch.equal(a, b) else float("inf")
    worst, scale = difference(a, b)
    return worst / scale if scale > 0 else (0.0 if worst == 0 else float("inf"))


def _placeholders(graph_module: fx.GraphModule) -> list[fx.Node]:
    return [node for node in graph_module.graph.nodes if node.op == "placeholder"]
