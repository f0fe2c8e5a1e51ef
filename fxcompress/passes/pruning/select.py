"""Which classes go, given how much each matters and how many shall go."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import pairwise
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fxcompress.analysis.dependency.groups import Group

__all__ = ["Choice", "Limits", "Piece", "matches"]

Scope = Literal["local", "global"]


@dataclass(frozen=True)
class Limits:
    """What a selection has to respect.

    Attributes:
        scope: whether each group loses the ratio, or all groups are ranked together.
        ratios: ratios of single layers, by name pattern; they hold in either scope.
        round_to: remaining widths are multiples of this; by type of layer if it is a mapping.
        min_width: least number of channels to leave in a group.
        max_ratio: greatest share of a group to remove.
        originals: width of each group before the first of several steps; ratios are shares of these.
        up: a common ratio takes the next whole number of channels, not the nearest: for a target, whose room goes
            back to the groups that kept the least share.
    """

    scope: Scope
    ratios: Mapping[str, float]
    round_to: int | Mapping[str, int]
    min_width: int
    max_ratio: float
    originals: Sequence[int]
    up: bool = False


class Piece(NamedTuple):
    """Classes of one group that stay or go together."""

    group: int
    classes: NDArray[np.int64]


class Choice:
    """Ranks the classes of groups once, and then answers for any ratio.

    Args:
        groups: that may lose channels.
        kinds: type names of the layers of each group, for ``round_to``.
        scores: importance by class; the least goes first, and among equals the first.
        limits: see there.
    """

    def __init__(
        self, groups: Sequence[Group], kinds: Sequence[set[str]], scores: NDArray[np.float64], limits: Limits
    ) -> None:
        self._limits = limits
        self._groups = groups
        own = [scores[group.classes] for group in groups]
        self._ranked = [g.classes[np.argsort(values, kind="stable")] for g, values in zip(groups, own, strict=True)]
        # Groups differ in scale by orders of magnitude; relative to their own mean they compare.
        self._scores, self._own = scores, [values / max(float(values.mean()), 1e-30) for values in own]
        self._relative = [np.sort(values) for values in self._own]
        self._fixed = [self._own_ratio(group) for group in groups]
        self._before = [
            width // group.multiplicity for width, group in zip(limits.originals, groups, strict=True)
        ]  # classes of each group before the first step
        self._steps = [self._least_and_step(index, kind) for index, kind in enumerate(kinds)]
        free = [index for index, fixed in enumerate(self._fixed) if fixed is None]
        self._all = np.sort(np.concatenate([np.zeros(0), *(self._relative[index] for index in free)]))
        self._gone = sum(self._before[index] for index in free) - len(self._all)

    def at(self, ratio: float) -> NDArray[np.int64]:
        """The classes to remove so that ``ratio``, in [0, 1), of the original ones is gone."""
        removed = [np.zeros(0, dtype=np.int64)]
        count = int(ratio * (len(self._all) + self._gone)) - self._gone
        threshold = self._all[count] if 0 < count < len(self._all) else (np.inf if count > 0 else -np.inf)
        for index, group in enumerate(self._groups):
            fixed = self._fixed[index]
            if fixed is not None or self._limits.scope == "local":
                whole = (ratio if fixed is None else fixed) * self._before[index]
                total = math.ceil(whole - 1e-9) if self._limits.up and fixed is None else round(whole)
                wanted = total - (self._before[index] - len(group.classes))
            else:
                wanted = int(np.searchsorted(self._relative[index], threshold))
            removed.append(self._ranked[index][: self._rounded(group, wanted, *self._steps[index])])
        return np.concatenate(removed)

    def given_back(self, classes: NDArray[np.int64]) -> list[Piece]:
        """``classes`` in the order in which they may stay after all, each piece the next legal width of its group.

        In local scope the group that would then keep the least share of its channels comes first, so that shares stay
        as equal as whole channels allow; in global scope what matters most does. Groups with ratios of their own are
        left out.
        """
        wanted = np.zeros(len(self._scores), dtype=bool)
        wanted[classes] = True
        found: list[tuple[float, float, Piece]] = []
        for index, (group, ranked) in enumerate(zip(self._groups, self._ranked, strict=True)):
            gone = ranked[wanted[ranked]]
            if self._fixed[index] is not None or not gone.size:
                continue
            relative = np.sort(self._own[index][np.isin(group.classes, gone)])
            _, step = self._steps[index]
            counts = np.arange(len(gone) - 1, -1, -1)
            legal = counts[(group.width - counts * group.multiplicity) % step == 0]
            for most, fewer in pairwise([len(gone), *legal.tolist()]):
                share = (len(group.classes) - fewer) / self._before[index]
                matters = -float(relative[fewer])
                order = (share, matters) if self._limits.scope == "local" else (matters, share)
                found.append((*order, Piece(index, gone[fewer:most])))
        return [piece for *_, piece in sorted(found, key=lambda item: item[:2])]

    def _own_ratio(self, group: Group) -> float | None:
        found = [
            ratio
            for pattern, ratio in self._limits.ratios.items()
            if any(matches(pattern, layer) for layer in group.layers)
        ]
        return min(found) if found else None

    def _least_and_step(self, index: int, kinds: set[str]) -> tuple[int, int]:
        limits, group = self._limits, self._groups[index]
        step = limits.round_to
        if isinstance(step, Mapping):
            step = math.lcm(*(step.get(kind, 1) for kind in kinds))
        share = math.ceil((1 - limits.max_ratio) * limits.originals[index] - 1e-9)
        return max(limits.min_width, share, group.multiplicity), step

    def _rounded(self, group: Group, wanted: int, least: int, step: int) -> int:
        """At most ``wanted``: fewer where the remaining width would be too small, or no multiple."""
        most = min(wanted, (group.width - least) // group.multiplicity)
        if most <= 0:
            return 0
        counts = np.arange(most, max(most - step, 0), -1)
        fits = (group.width - counts * group.multiplicity) % step == 0
        return int(counts[np.argmax(fits)]) if fits.any() else 0


def matches(pattern: str, weight: str) -> bool:
    """Whether a name pattern means the layer of a weight (or the weight itself)."""
    return fnmatchcase(weight.rpartition(".")[0], pattern) or fnmatchcase(weight, pattern)
