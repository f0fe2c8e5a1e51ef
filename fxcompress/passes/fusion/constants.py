"""Which nodes of a graph are constants, and what they are: computed once, with real tensors."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_arg

from fxcompress.passes.fusion.facts import Facts, tensor_value

__all__ = ["constant_nodes", "draws_random_numbers", "evaluate"]

aten = torch.ops.aten

# Filled by shape alone: what they are given tells size, dtype and device, and its values do not matter.
_LIKE = {
    aten.new_zeros.default,
    aten.new_ones.default,
    aten.new_full.default,
    aten.zeros_like.default,
    aten.ones_like.default,
    aten.full_like.default,
}
_KNOWN = {"aten", "prims", "torchvision"}
# Random by their schema's tag, but not when this argument says so.
_SWITCHED: dict[Any, tuple[str, int]] = {
    aten.dropout.default: ("train", 2),
    aten.feature_dropout.default: ("train", 2),
    aten.alpha_dropout.default: ("train", 2),
    aten.feature_alpha_dropout.default: ("train", 2),
    aten.rrelu.default: ("training", 3),
    aten.scaled_dot_product_attention.default: ("dropout_p", 4),
}


def draws_random_numbers(node: fx.Node) -> bool:
    """Whether calling ``node`` twice may give two results: random operations, and those that torch does not define."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return False
    if node.target.namespace not in _KNOWN:
        return True
    if torch.Tag.nondeterministic_seeded not in node.target.tags:
        return False
    if node.target in _SWITCHED:
        name, index = _SWITCHED[node.target]
        return bool(node.kwargs.get(name, node.args[index] if len(node.args) > index else False))
    return True


def constant_nodes(facts: Facts) -> set[fx.Node]:
    """Every node whose value depends on weights and numbers alone. One scan."""
    constant: set[fx.Node] = set()
    for node in facts.nodes:
        if node.op == "get_attr":
            constant.add(node)
        elif node.op == "call_module":
            if not facts.layer(node).training and constant.issuperset(node.all_input_nodes):
                constant.add(node)
        elif node.op == "call_function" and (isinstance(node.target, torch._ops.OpOverload) or _is_item(node)):
            if not draws_random_numbers(node) and (constant.issuperset(node.all_input_nodes) or _only_size(node)):
                constant.add(node)
    return constant


def _is_item(node: fx.Node) -> bool:
    return node.target is operator.getitem


def _only_size(node: fx.Node) -> bool:
    value = tensor_value(node)
    if node.target not in _LIKE or value is None or not all(type(size) is int for size in value.shape):
        return False
    source, others = node.args[0], node.args[1:]
    given = tensor_value(source)
    if given is None or any(isinstance(size, torch.SymInt) for size in value.shape):
        return False
    nodes: list[fx.Node] = []
    map_arg((others, node.kwargs), lambda n: nodes.append(n))
    return not nodes


def evaluate(facts: Facts, wanted: Iterable[fx.Node]) -> dict[fx.Node, torch.Tensor]:
    """The values of constant nodes. What leads to several of them is computed once, and freed when read last."""
    results: dict[fx.Node, torch.Tensor] = {}
    targets = set(wanted)
    needed = set(targets)
    stack = list(targets)
    while stack:
        for source in _read(stack.pop()):
            if source not in needed:
                needed.add(source)
                stack.append(source)
    pending = dict.fromkeys(needed, 0)
    for node in needed:
        for source in _read(node):
            pending[source] += 1
    values: dict[fx.Node, Any] = {}
    with torch.no_grad():
        for node in (item for item in facts.nodes if item in needed):
            values[node] = _call(facts, node, values)
            if node in targets:
                results[node] = values[node]
            for source in _read(node):
                pending[source] -= 1
                if not pending[source]:
                    del values[source]
    return results


def _read(node: fx.Node) -> list[fx.Node]:
    return [] if node.op == "get_attr" or _stands_in(node) else node.all_input_nodes


def _stands_in(node: fx.Node) -> bool:
    return node.target in _LIKE and _only_size(node)


def _call(facts: Facts, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    if node.op == "get_attr":
        return facts.constant(node)
    if _stands_in(node):
        given: Any = tensor_value(node.args[0])
        made: Any = tensor_value(node)
        blank = torch.empty((), dtype=given.dtype, device=made.device)
        if "like" in str(node.target):
            blank = blank.expand(made.shape)
        return node.target(blank, *node.args[1:], **node.kwargs)  # type: ignore[operator]
    args, kwargs = map_arg((node.args, node.kwargs), lambda n: values[n])
    target: Any = facts.layer(node) if node.op == "call_module" else node.target
    return target(*args, **kwargs)
