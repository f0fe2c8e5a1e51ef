"""Values that are computed twice.

a = f(x);  b = f(x)  ⇒  b = a

Exact. By value numbering: two nodes are the same value when they call the same operation, or the same layer, on the
same values with the same options. Not for what may give two values: random operations, operations that torch does not
define, and dropout, which would in training.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx, nn

from fxcompress.graph.edit import GraphEditor
from fxcompress.passes.base import Rewrite, Skip
from fxcompress.passes.fusion.base import Rule, Site
from fxcompress.passes.fusion.constants import draws_random_numbers
from fxcompress.passes.fusion.facts import Facts

__all__ = ["MergeDuplicates"]


@dataclass(frozen=True)
class DuplicateSite(Site):
    """A node, and the earlier one of the same value."""

    first: fx.Node


class MergeDuplicates(Rule[DuplicateSite]):
    """See the module's text."""

    name: ClassVar[str] = "merge_duplicates"
    needs_shapes: ClassVar[bool] = False

    def match(self, facts: Facts) -> Iterator[DuplicateSite | Skip]:
        numbers: dict[fx.Node, fx.Node] = {}  # a node → the first node of the same value
        known: dict[Hashable, fx.Node] = {}
        for node in facts.nodes:
            numbers[node] = node
            if node.op not in ("placeholder", "output"):
                first = known.setdefault(_key(node, numbers), node)
                if first is node:
                    continue  # the first of its value
                in_training = node.op == "call_module" and _random_in_training(facts.layer(node))
                if in_training or draws_random_numbers(node):
                    reason = f"It may give another value than {first.name!r}{' in training' * in_training}."
                    yield Skip(node.name, "random", reason, (first.name,))
                else:
                    numbers[node] = first
                    yield DuplicateSite(node.name, (node,), first)

    def rewrite(self, editor: GraphEditor, site: DuplicateSite) -> Rewrite:
        (node,) = site.nodes
        editor.replace(node, site.first)
        return Rewrite(site.name, f"is {site.first.name}", {"rule": self.name, "first": site.first.name})


def _random_in_training(layer: nn.Module) -> bool:
    return isinstance(layer, (nn.modules.dropout._DropoutNd, nn.RReLU)) or bool(getattr(layer, "dropout", 0))


def _key(node: fx.Node, numbers: dict[fx.Node, fx.Node]) -> Hashable:
    return (node.op, node.target, _frozen(node.args, numbers), _frozen(node.kwargs, numbers))


def _frozen(value: Any, numbers: dict[fx.Node, fx.Node]) -> Hashable:
    """``value`` as something hashable that tells 1, 1.0 and True apart, and 0.0 from −0.0."""
    if isinstance(value, fx.Node):
        return numbers[value]
    if isinstance(value, (tuple, list)):
        return tuple(_frozen(item, numbers) for item in value)
    if isinstance(value, dict):
        return tuple((key, _frozen(item, numbers)) for key, item in value.items())
    if isinstance(value, slice):
        return ("slice", *(_frozen(item, numbers) for item in (value.start, value.stop, value.step)))
    if isinstance(value, (torch.Tensor, fx.GraphModule)):
        return id(value)
    return (type(value).__name__, repr(value))
