"""Views of views.

permute(permute(x, p), q)  ⇒  permute(x, p∘q), or x where that is the identity
reshape(reshape(x, a), b)  ⇒  reshape(x, b), or x where that is its shape
reshape_as(x, y)  ⇒  reshape(x, sizes), so that nobody reads y for its shape alone

Exact: both only move elements. Merged where nobody else reads what lies between; a way there and back is removed in
any case. Left where an operation asks for strides (see ``layout``).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from fxcompress.graph.edit import GraphEditor
from fxcompress.graph.shapes import same_value
from fxcompress.passes.base import Rewrite, Skip
from fxcompress.passes.fusion.base import Rule, Site
from fxcompress.passes.fusion.channels import PERMUTES, RESHAPES, permutation
from fxcompress.passes.fusion.facts import Facts, first_input, tensor_value
from fxcompress.passes.fusion.layout import kept_for_layout, outcome

__all__ = ["MergeViews"]

aten = torch.ops.aten

_FAR = 16  # how many views are looked through
_AS = {aten.reshape_as.default, aten.view_as.default}


@dataclass(frozen=True)
class ViewSite(Site):
    """A chain of ``depth`` views, last first; ``target`` with ``option`` does the same at once, or no view at all."""

    depth: int
    target: Any = None
    option: Any = None


class MergeViews(Rule[ViewSite]):
    """See the module's text."""

    name: ClassVar[str] = "merge_views"

    def match(self, facts: Facts) -> Iterator[ViewSite | Skip]:
        for node in facts.nodes:
            sizes = _sizes_alone(node)
            if sizes is not None:
                yield ViewSite(node.name, (node,), 1, aten.reshape.default, sizes)
                continue
            for kind, find in ((PERMUTES, _permutes), (RESHAPES, _reshapes)):
                if node.target in kind and not _goes_on(node, kind):
                    found = find(facts, node)
                    if found is not None:
                        yield found

    def rewrite(self, editor: GraphEditor, site: ViewSite) -> Rewrite:
        last = site.nodes[0]
        source: Any = last
        for _ in range(site.depth):
            source = first_input(source)
        if site.target is not None:
            name = "permute" if site.target is aten.permute.default else "reshape"
            new = editor.insert_call(site.target, (source, site.option), before=last, like=last, name=name)
        else:
            new = source
        editor.replace(last, new)
        detail = {"rule": self.name, "views": [node.name for node in site.nodes[: site.depth]]}
        result = "merged into one view" if site.depth > 1 else "reads a shape no more"
        return Rewrite(site.name, result if site.target is not None else "undone by one another", detail)


def _sizes_alone(node: fx.Node) -> list[int] | None:
    """The sizes for what is reshaped to the shape of another value; at most one may be symbolic, and is −1."""
    value = tensor_value(node)
    if node.target not in _AS or value is None:
        return None
    sizes = [-1 if isinstance(size, torch.SymInt) else int(size) for size in value.shape]
    return None if 0 in sizes or sizes.count(-1) > 1 else sizes


def _goes_on(node: fx.Node, kind: set[Any]) -> bool:
    """Whether the chain that ``node`` belongs to ends further down."""
    return len(node.users) == 1 and all(user.target in kind and first_input(user) is node for user in node.users)


def _chain(node: fx.Node, kind: set[Any]) -> list[fx.Node]:
    """``node`` and the views of this kind above it, and what they view, nearest first."""
    chain = [node]
    while len(chain) <= _FAR and chain[-1].target in kind:
        source = first_input(chain[-1])
        if source is None or tensor_value(source) is None:
            break
        chain.append(source)
    return chain


def _private(chain: list[fx.Node]) -> int:
    """How many views from the end on nobody reads but the next."""
    depth = 1
    while depth < len(chain) - 1 and len(chain[depth].users) == 1:
        depth += 1
    return depth


def _permutes(facts: Facts, node: fx.Node) -> ViewSite | Skip | None:
    chain = _chain(node, PERMUTES)
    value = tensor_value(node)
    if len(chain) < 3 or value is None:
        return None
    order = list(range(value.dim()))
    private, merged = _private(chain), order
    for depth, view in enumerate(chain[:-1], start=1):
        inner = permutation(view, value.dim())
        order = [inner[dim] for dim in order]
        if depth > 1 and order == list(range(value.dim())):
            return ViewSite(node.name, tuple(chain[:depth]), depth)
        if depth == private:
            merged = order
    if private < 2:
        return None
    return ViewSite(node.name, tuple(chain[:private]), private, aten.permute.default, merged)


def _reshapes(facts: Facts, node: fx.Node) -> ViewSite | Skip | None:
    chain = _chain(node, RESHAPES)
    value = tensor_value(node)
    if len(chain) < 3 or value is None:
        return None
    for depth, source in enumerate(chain[2:], start=2):
        if same_value(source.meta.get("val"), value):
            kept = kept_for_layout(facts, node)
            return ViewSite(node.name, tuple(chain[:depth]), depth) if kept is None else kept
    private = _private(chain)
    if private < 2 or node.target is not aten.reshape.default:
        return None
    if not same_value(outcome(facts, aten.reshape.default, (chain[private], node.args[1]), {}), value):
        reason = "Sizes that are not known do not tell that one step makes the same shape."
        return Skip(node.name, "unknown_sizes", reason, (chain[private].name,))
    kept = kept_for_layout(facts, node)
    if kept is not None:
        return kept
    return ViewSite(node.name, tuple(chain[:private]), private, aten.reshape.default, node.args[1])
