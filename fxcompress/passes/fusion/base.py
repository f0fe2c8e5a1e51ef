"""What a fusion rule is: ``match`` finds sites and changes nothing, ``rewrite`` changes one and says what it did."""

from __future__ import annotations

import fnmatch
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

from torch import fx

from fxcompress.graph.edit import GraphEditor
from fxcompress.passes.base import Rewrite, Skip
from fxcompress.passes.fusion.facts import Facts

__all__ = ["Rule", "Site", "apply", "names_of"]


@dataclass(frozen=True)
class Site:
    """A place where a rule applies.

    Attributes:
        name: what the report calls it: a layer's path, else a node's name.
        nodes: every node that the rewrite consumes or changes; sites of one rule never share one.
    """

    name: str
    nodes: tuple[fx.Node, ...]


SiteT = TypeVar("SiteT", bound=Site)


class Rule(ABC, Generic[SiteT]):
    """One rewrite. ``match`` yields the legal sites, and a :class:`Skip` for each site that is not legal.

    Rules with ``needs_shapes`` are left out where the model was captured without example inputs.
    """

    name: ClassVar[str]
    needs_shapes: ClassVar[bool] = True

    @abstractmethod
    def match(self, facts: Facts) -> Iterable[SiteT | Skip]:
        """Find sites. Pure, and linear in the size of the graph."""

    @abstractmethod
    def rewrite(self, editor: GraphEditor, site: SiteT) -> Rewrite:
        """Change one site."""


def apply(
    rule: Rule[SiteT], graph_module: fx.GraphModule, ignore: Collection[str] = ()
) -> tuple[list[Rewrite], list[Skip]]:
    """Match ``rule`` once over the whole graph, then rewrite every site that nothing forbids.

    Two reasons to leave a site hold for every rule and are checked here: a pattern of ``ignore``, and a layer in
    training mode. A site that shares nodes with an earlier one is left for the next round, which sees it afresh.
    """
    facts = Facts(graph_module)
    rewrites: list[Rewrite] = []
    skips: list[Skip] = []
    sites: list[SiteT] = []
    taken: set[fx.Node] = set()
    for found in rule.match(facts):
        refused = found if isinstance(found, Skip) else _refuse(facts, found, ignore)
        if refused is not None:
            skips.append(refused)
        elif not isinstance(found, Skip) and taken.isdisjoint(found.nodes):
            taken.update(found.nodes)
            sites.append(found)
    if sites:
        with GraphEditor(graph_module) as editor:
            rewrites = [rule.rewrite(editor, site) for site in sites]
    return rewrites, skips


def _refuse(facts: Facts, site: Site, ignore: Collection[str]) -> Skip | None:
    if ignore:
        names = {name for node in site.nodes for name in names_of(node)} | {site.name}
        for pattern in ignore:
            if fnmatch.filter(names, pattern):
                return Skip(site.name, "ignored", f"It matches the pattern {pattern!r} of ignore.")
    training = [node.name for node in site.nodes if node.op == "call_module" and facts.layer(node).training]
    if training:
        reason = "A layer in training mode updates or uses what the rewrite would freeze; call eval() first."
        return Skip(site.name, "training", reason, tuple(training))
    return None


def names_of(node: fx.Node) -> Iterator[str]:
    """What a pattern may call a node: its own name, and the paths of its layer and of the modules around that."""
    yield node.name
    stack: Any = node.meta.get("nn_module_stack") or {}
    paths = [str(entry[0]).split("@")[0] for entry in stack.values()]
    if node.op in ("call_module", "get_attr"):
        paths.append(str(node.target))
    for path in paths:
        while path:
            yield path
            path = path.rpartition(".")[0]
