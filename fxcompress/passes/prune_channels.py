"""Structured channel removal: channels, features, heads and hidden units go physically, with everything they touch."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import fx

from fxcompress.analysis.dependency.build import build
from fxcompress.analysis.dependency.builder import Builder
from fxcompress.analysis.dependency.groups import Group, find_groups, importance
from fxcompress.analysis.dependency.labels import Solution
from fxcompress.analysis.dependency.layout import blocks
from fxcompress.analysis.dependency.removal import Removal
from fxcompress.errors import OptionError
from fxcompress.graph.edit import GraphEditor
from fxcompress.graph.names import original_name
from fxcompress.passes.base import Numerics, Pass, PassContext, PassResult, Rewrite, Skip
from fxcompress.passes.pruning.importance import score_of
from fxcompress.passes.pruning.resize import resize_constants
from fxcompress.passes.pruning.shrink import shrink_weights
from fxcompress.passes.pruning.values import values_after

__all__ = ["PruneChannels"]


@dataclass(frozen=True)
class PruneChannels(Pass):
    """Remove the least important channels of every group of layers that is tied together by the graph.

    Attributes:
        ratio: share of channels to remove, in (0, 1).
        importance: ``l1``, ``l2``, ``fpgm``, ``lamp`` or ``random``.
        scope: ``local`` removes the ratio from every group, ``global`` ranks all groups together.
        round_to: widths that remain are multiples of this.
        ignore: glob patterns of layers whose output channels stay.
        min_width: least number of channels to leave in a group.
    """

    name: ClassVar[str] = "prune_channels"
    numerics: ClassVar[Numerics] = Numerics.LOSSY
    ratio: float = 0.5
    importance: str = "l2"
    scope: Literal["local", "global"] = "local"
    round_to: int = 1
    ignore: tuple[str, ...] = ()
    min_width: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.ratio < 1:
            raise OptionError(f"ratio={self.ratio} is outside (0, 1)", remedy="0.5 removes half of the channels")
        if self.round_to < 1 or self.min_width < 1:
            raise OptionError("round_to and min_width are at least 1")
        score_of(self.importance, 0)

    def run(self, graph_module: fx.GraphModule, context: PassContext) -> PassResult:
        """Plan on the whole graph, then remove all at once."""
        builder, solution = _plan(graph_module)
        groups = find_groups(builder, solution)
        chosen, skipped = self._protected(groups)
        if not chosen:
            skipped.append(Skip("all", "nothing_to_prune", "no channels of this graph can be removed"))
            return PassResult(graph_module, (), tuple(skipped))
        weights = {path: _tensor(graph_module, path) for path in builder.weights}
        scores = importance(builder, solution, weights, score_of(self.importance, self.seed))
        classes = _leave_one(builder, solution, self._select(chosen, scores), scores)
        if not classes.size:
            skipped.append(Skip("all", "nothing_to_prune", "every group is at its least width already"))
            return PassResult(graph_module, (), tuple(skipped))
        removal = Removal.of_classes(builder, solution, classes)
        with GraphEditor(graph_module) as editor:
            resize_constants(graph_module, removal, editor)
            kept = shrink_weights(graph_module, removal, editor)
            editor.set_values(values_after(graph_module, removal))
        rewrites = []
        gone = set(classes.tolist())
        for group in chosen:
            removed = sum(1 for cls in group.classes.tolist() if cls in gone)
            if not removed:
                continue
            after = group.width - removed * group.multiplicity
            detail = {
                "before": group.width,
                "after": after,
                "layers": list(group.layers),
                "kept": {},
            }
            rewrites.append(Rewrite(group.layers[0].rpartition(".")[0], f"{group.width} → {after} channels", detail))
        named = {original_name(graph_module, path): dims for path, dims in kept.items()}
        if rewrites:
            rewrites[0].detail["kept"].update(named)
        return PassResult(graph_module, tuple(rewrites), tuple(skipped))

    def _protected(self, groups: list[Group]) -> tuple[list[Group], list[Skip]]:
        unmatched = [p for p in self.ignore if not any(_matches(p, layer) for g in groups for layer in g.layers)]
        if unmatched:
            raise OptionError(f"no removable layer matches {unmatched[0]!r}", where="ignore")
        chosen, skipped = [], []
        for group in groups:
            if any(_matches(pattern, layer) for pattern in self.ignore for layer in group.layers):
                site = group.layers[0].rpartition(".")[0]
                skipped.append(Skip(site, "ignored", "it matches a pattern of ignore", group.layers[1:]))
            else:
                chosen.append(group)
        return chosen, skipped

    def _select(self, groups: list[Group], scores: NDArray[np.float64]) -> NDArray[np.int64]:
        if self.scope == "global":
            normal = [scores[g.classes] / max(float(scores[g.classes].mean()), 1e-30) for g in groups]
            threshold = float(np.quantile(np.concatenate(normal), self.ratio))
            wanted = [int((values < threshold).sum()) for values in normal]
        else:
            wanted = [round(self.ratio * len(g.classes)) for g in groups]
        removed = []
        for group, count in zip(groups, wanted, strict=True):
            count = self._rounded(group, count)
            order = np.argsort(scores[group.classes], kind="stable")
            removed.append(group.classes[order[:count]])
        return np.concatenate(removed) if removed else np.zeros(0, dtype=np.int64)

    def _rounded(self, group: Group, count: int) -> int:
        """Fewer removals if need be, so that the remaining width is a multiple of ``round_to`` and wide enough."""
        least = -(-self.min_width // group.multiplicity)
        for removed in range(min(count, len(group.classes) - max(least, 1)), 0, -1):
            if (group.width - removed * group.multiplicity) % self.round_to == 0:
                return removed
        return 0


def _plan(graph_module: fx.GraphModule) -> tuple[Builder, Solution]:
    """Dependencies, with the other side chosen at every split whose first choice turned out to be pinned."""
    builder = build(graph_module)
    solution = builder.labels.solve()
    choices: dict[str, int] = {}
    for _ in range(4):
        flipped = False
        for name, site in builder.sites.items():
            classes = solution.class_of[site.labels]
            tried = choices.get(name)
            if not solution.removable[classes].any() and (tried is None or tried < len(site.sizes) - 1):
                order = sorted(range(len(site.sizes)), key=lambda side: -site.sizes[side])
                position = order.index(site.live)
                if position + 1 < len(order) and site.sizes[order[position + 1]] > 1:
                    choices[name] = order[position + 1]
                    flipped = True
        if not flipped:
            break
        builder = build(graph_module, choices)
        solution = builder.labels.solve()
    return builder, solution


def _leave_one(
    builder: Builder, solution: Solution, classes: NDArray[np.int64], scores: NDArray[np.float64]
) -> NDArray[np.int64]:
    """Take back the best of the removed wherever a dimension (a piece of a split, say) would lose all it has."""
    gone = np.zeros(len(solution.class_of), dtype=bool)
    gone[classes] = True
    seen: set[int] = set()
    layouts = [*builder.weights.values(), *(builder.dims_of(node) for node in builder.values)]
    for layout in layouts:
        for dim in layout:
            for block in blocks(dim):
                if id(block) in seen:
                    continue
                seen.add(id(block))
                own = solution.class_of[block.labels.reshape(-1)]
                if own.size and gone[own].all():
                    gone[own[np.argmax(scores[own])]] = False
    return np.flatnonzero(gone)


def _tensor(graph_module: fx.GraphModule, path: str) -> torch.Tensor:
    owner, _, name = path.rpartition(".")
    tensor: Any = getattr(graph_module.get_submodule(owner), name)
    assert isinstance(tensor, torch.Tensor)
    return tensor


def _matches(pattern: str, weight: str) -> bool:
    return fnmatchcase(weight.rpartition(".")[0], pattern) or fnmatchcase(weight, pattern)
