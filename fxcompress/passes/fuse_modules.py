"""Module fusion: what inference does not need separately becomes one."""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx

from fxcompress.errors import OptionError, nearest
from fxcompress.graph.info import info
from fxcompress.passes.base import Numerics, Pass, PassContext, PassResult, Rewrite, Skip
from fxcompress.passes.fusion.base import Rule, apply, names_of
from fxcompress.passes.fusion.fold_affine import FoldAffine
from fxcompress.passes.fusion.fold_constants import FoldConstants
from fxcompress.passes.fusion.fold_norm_after import FoldNormAfter
from fxcompress.passes.fusion.fold_norm_before import FoldNormBefore
from fxcompress.passes.fusion.fold_padding import FoldPadding
from fxcompress.passes.fusion.merge_branches import MergeBranches
from fxcompress.passes.fusion.merge_duplicates import MergeDuplicates
from fxcompress.passes.fusion.merge_views import MergeViews
from fxcompress.passes.fusion.normalize_padding import NormalizePadding
from fxcompress.passes.fusion.raise_layers import RaiseLayers
from fxcompress.passes.fusion.remove_identities import RemoveIdentities

__all__ = ["FuseModules"]

# In this order. One value under two names is merged before weights are computed, so that a tied weight stays tied;
# norms go into convolutions before the branches that these make are summed.
_RULES: tuple[Rule[Any], ...] = (
    MergeDuplicates(),
    NormalizePadding(),
    FoldConstants(),
    RaiseLayers(),
    RemoveIdentities(),
    MergeViews(),
    FoldNormAfter(),
    FoldAffine(),
    FoldNormBefore(),
    FoldPadding(),
    MergeBranches(),
)
_NAMES = tuple(rule.name for rule in _RULES)
_ROUNDS = 8  # models need two or three; the bound is for graphs made to take long


@dataclass(frozen=True)
class FuseModules(Pass):
    """Fold, merge and remove what inference does not need separately.

    ::

        conv → batch norm  ⇒  conv      W' = W·γ/σ,  b' = (b − μ)·γ/σ + β

    and, each a rule of its own with its legality in ``passes/fusion``: norms before layers, per-channel arithmetic,
    padding, parallel branches, constants, identities with dropout, views of views, and values computed twice. Rules are
    repeated while any of them finds something. Not legal, and told as skips: a value that somebody else reads
    (``shared_value``), a layer called twice (``shared_layer``), a tied weight (``tied_weight``), training mode
    (``training``), weights that are not numbers (``not_finite``), and more.

    Args:
        rules: names of the rules to use; None for all.
        ignore: layers and nodes that stay as they are: paths, paths of containers, or either with ``*``, ``?`` and
            ``[...]``: ``("backbone.stem", "*.head")``.
    """

    name: ClassVar[str] = "fuse_modules"
    numerics: ClassVar[Numerics] = Numerics.REASSOCIATED

    rules: tuple[str, ...] | None = None
    ignore: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for option in ("rules", "ignore"):
            value = getattr(self, option)
            if isinstance(value, str):
                object.__setattr__(self, option, (value,))
            elif isinstance(value, list):
                object.__setattr__(self, option, tuple(value))
        super().__post_init__()
        for rule in self.rules or ():
            if rule not in _NAMES:
                raise OptionError(f"fuse_modules has no rule {rule!r}", where="rules", remedy=nearest(rule, _NAMES))

    def run(self, graph_module: fx.GraphModule, context: PassContext) -> PassResult:
        names = {name for node in graph_module.graph.nodes for name in names_of(node)} if self.ignore else set()
        for pattern in self.ignore:
            if not fnmatch.filter(names, pattern):
                raise OptionError(
                    f"no layer or node is called {pattern!r}", where="ignore", remedy=nearest(pattern, names)
                )
        chosen = [rule for rule in _RULES if self.rules is None or rule.name in self.rules]
        blind = [] if info(graph_module).has_shapes else [rule for rule in chosen if rule.needs_shapes]
        chosen = [rule for rule in chosen if rule not in blind]
        rewrites: list[Rewrite] = []
        skips: list[Skip] = []
        for _ in range(_ROUNDS):
            made: list[Rewrite] = []
            skips = []
            for rule in chosen:
                done, left = apply(rule, graph_module, self.ignore)
                made += done
                skips += left
            rewrites += made
            if not made:
                break
        # What one rule leaves, another may leave for the same reason: told once. Skips of earlier rounds are history.
        told = {(skip.site, skip.code): skip for skip in reversed(skips)}
        if blind:
            left_out = ", ".join(rule.name for rule in blind)
            reason = f"Captured without example inputs, the graph has no shapes, which these rules need: {left_out}."
            told["graph", "no_shapes"] = Skip("graph", "no_shapes", reason)
        if not rewrites and not told:
            reason = "No rule applies: the graph has no norm, arithmetic, padding, branch or constant to fold."
            told["", ""] = Skip("graph", "nothing_to_fuse", reason)
        return PassResult(graph_module, tuple(rewrites), tuple(reversed(told.values())))
