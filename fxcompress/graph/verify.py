"""The invariants of a graph between two passes, checked; ``docs/architecture.md`` lists them."""

from __future__ import annotations

import operator

import torch
from torch import fx, nn

from fxcompress.errors import GraphError
from fxcompress.graph.info import GraphInfo, info, tensors_of
from fxcompress.graph.shapes import infer, same_value, where

__all__ = ["SIZE_ARITHMETIC", "verify"]

# What a graph may do with sizes, beside ATen operations on tensors.
SIZE_ARITHMETIC = {
    operator.add,
    operator.sub,
    operator.mul,
    operator.floordiv,
    operator.truediv,
    operator.mod,
    operator.neg,
    operator.pow,
    operator.eq,
    operator.ne,
    operator.lt,
    operator.le,
    operator.gt,
    operator.ge,
    torch.sym_int,
    torch.sym_float,
    torch.sym_max,
    torch.sym_min,
    torch.sym_not,
    torch.sym_ite,
    torch.sym_sum,
}


def verify(graph_module: fx.GraphModule, *, shapes: bool = False) -> None:
    """Check every invariant that passes rely on. Linear in the size of the graph.

    Args:
        graph_module: a captured graph.
        shapes: also compute every fake value again and compare (tests do; the manager need not, for the editor
            propagates).

    Raises:
        GraphError: names the first node that breaks an invariant, and how.
    """
    facts = info(graph_module)
    try:
        graph_module.graph.lint()
    except RuntimeError as error:
        raise GraphError(f"the graph is malformed: {error}") from error
    used: set[str] = set()
    layers: set[str] = set()
    for node in graph_module.graph.nodes:
        if node.op == "call_function":
            _check_function(node)
        elif node.op == "call_module":
            layers.add(str(node.target))
        elif node.op == "get_attr":
            used.add(str(node.target))
        elif node.op == "call_method":
            raise _broken(node, f"it calls the method {node.target!r}; only ATen operations and layers are allowed")
        elif node.op == "output":
            _check_output(node, facts)
        if node.op != "output" and facts.has_shapes:
            _check_value(graph_module, node, shapes)
        if not node.users and node.op not in ("placeholder", "output"):
            raise _broken(node, "nothing reads it: dead code must be removed")
    _check_state(graph_module, used, layers)


def _check_output(node: fx.Node, facts: GraphInfo) -> None:
    leaves = node.args[0]
    if not isinstance(leaves, (tuple, list)) or any(isinstance(leaf, (tuple, list, dict)) for leaf in leaves):
        raise _broken(node, "the output is not a flat tuple")
    if len(leaves) != facts.out_spec.num_leaves:
        raise _broken(node, f"it returns {len(leaves)} values where the caller is told {facts.out_spec.num_leaves}")
    inputs = len(node.graph.find_nodes(op="placeholder"))
    if inputs != facts.in_spec.num_leaves:
        raise _broken(node, f"the graph takes {inputs} inputs where the caller gives {facts.in_spec.num_leaves}")


def _check_function(node: fx.Node) -> None:
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        if target._schema.is_mutable:
            raise _broken(node, f"{target} writes into its argument; graphs are functional")
    elif target is not operator.getitem and target not in SIZE_ARITHMETIC:
        raise _broken(node, f"{target} is no ATen operation")


def _check_value(graph_module: fx.GraphModule, node: fx.Node, recompute: bool) -> None:
    if "val" not in node.meta:
        raise _broken(node, "it has no meta['val']")
    mode = info(graph_module).fake_mode
    for value in tensors_of(node.meta["val"]):
        if getattr(value, "fake_mode", None) is not mode:
            raise _broken(node, "its meta['val'] is not a fake tensor of this graph")
    if recompute and node.op not in ("placeholder",):
        fresh = infer(graph_module, node)
        if not same_value(fresh, node.meta["val"]):
            raise _broken(node, f"its meta['val'] is stale: {node.meta['val']} is recorded, {fresh} is produced")


def _check_state(graph_module: fx.GraphModule, used: set[str], layers: set[str]) -> None:
    owners = tuple(layers)
    for kind, tensors in (
        ("parameter", graph_module.named_parameters(remove_duplicate=False)),
        ("buffer", graph_module.named_buffers(remove_duplicate=False)),
    ):
        for path, _ in tensors:
            if path in used or _within(path, layers):
                continue
            raise GraphError(f"the {kind} {path!r} is not used by the graph", remedy="edit through GraphEditor")
    for path in owners:
        if not isinstance(graph_module.get_submodule(path), nn.Module):
            raise GraphError(f"{path!r} is called but is no layer")


def _within(path: str, layers: set[str]) -> bool:
    while "." in path:
        path = path.rpartition(".")[0]
        if path in layers:
            return True
    return False


def _broken(node: fx.Node, what: str) -> GraphError:
    return GraphError(
        f"the graph breaks an invariant at {node.name!r}: {what}",
        where=where(node),
        remedy="passes edit graphs through GraphEditor only; report this if the pass is ours",
    )
