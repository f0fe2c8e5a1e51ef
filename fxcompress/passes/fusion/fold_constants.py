"""Everything that depends on weights alone, computed once.

f(weights) → op(x, ·)  ⇒  op(x, constant)

Weight standardisation and weight norm, position tables and their interpolation, masks built by ``arange`` and ``where``,
gathered position biases: the part of the graph that no input reaches is run once, on the real tensors and by the
very operations of the model, and its results take its place. A result takes over the name of the weight it came from; it
stays a parameter if that was one. A convolution or linear operation whose weights have become constants is a layer
again (``raise_layers``).

Not done while the graph trains (how a weight is computed would be frozen), for results much larger than what they are
made of, for random numbers, nor for a parameter that is also read as it is (it would come apart).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx, nn

from fxcompress.graph.edit import GraphEditor
from fxcompress.passes.base import Rewrite, Skip
from fxcompress.passes.fusion.base import Rule, Site
from fxcompress.passes.fusion.constants import constant_nodes, evaluate
from fxcompress.passes.fusion.facts import Facts, tensor_value

__all__ = ["FoldConstants"]

_LARGE = 1 << 20
_GROWTH = 4


@dataclass(frozen=True)
class ConstantSite(Site):
    """A constant node that is read by others, its value, and the weight whose name it takes over."""

    node: fx.Node
    value: torch.Tensor
    roots: tuple[fx.Node, ...]
    heir_of: fx.Node | None
    persistent: bool


class FoldConstants(Rule[ConstantSite]):
    """See the module's text."""

    name: ClassVar[str] = "fold_constants"

    def match(self, facts: Facts) -> Iterator[ConstantSite | Skip]:
        constant = constant_nodes(facts)
        computed = [node for node in facts.nodes if node in constant and node.op != "get_attr"]
        if computed and facts.graph_module.training:
            reason = "The graph is in training mode: folding would freeze how a weight is computed; call eval() first."
            yield Skip(computed[0].name, "training", reason)
            return
        roots = _roots(facts, constant)
        wanted: list[fx.Node] = []
        rejected: set[fx.Node] = set()
        for node in reversed(computed):
            if not any(user not in constant or user in rejected for user in node.users):
                continue  # read by constants only: goes with them
            refused = self._refuse(facts, constant, roots, node)
            if refused is None:
                wanted.append(node)
            else:
                rejected.add(node)
                if isinstance(refused, Skip):
                    yield refused
        wanted.reverse()
        values = evaluate(facts, wanted)
        heirs = _heirs(facts, wanted, roots)
        for node in wanted:
            yield self._site(facts, node, values[node], tuple(roots[node]), heirs.get(node))
'''
