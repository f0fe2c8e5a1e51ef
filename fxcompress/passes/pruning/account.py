"""What was removed, over all steps, in terms of the graph as it was before the first."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import fx

from fxcompress.analysis.dependency.groups import Group
from fxcompress.analysis.dependency.layout import blocks
from fxcompress.analysis.dependency.removal import Removal
from fxcompress.graph.names import original_name
from fxcompress.passes.base import Rewrite
from fxcompress.passes.pruning.plan import Plan
from fxcompress.passes.pruning.proof import Proof

__all__ = ["Account", "Kept"]

Kept = dict[str, dict[int, list[int]]]


@dataclass
class _Entry:
    """One group over all steps."""

    layers: tuple[str, ...]
    before: int
    after: int
    weights: list[str] = field(default_factory=list)


class Account:
    """Collects removals; :meth:`rewrites` tells them group by group."""

    def __init__(self, graph_module: fx.GraphModule) -> None:
        self.kept: Kept = {}
        self._entries: dict[tuple[str, ...], _Entry] = {}  # by the layers of the group
        self._told: set[str] = set()
        self._proofs: list[Proof] = []
        self.refits: Sequence[Any] = ()  # of layers whose weights were fitted anew, see `reconstruct`
        self._made: dict[str, dict[int, int]] = {}  # weight → sizes of the dimensions that its layer makes, at first
        names = [name for name, _ in graph_module.named_parameters(remove_duplicate=False)]
        names += [name for name, _ in graph_module.named_buffers(remove_duplicate=False)]
        self._names = {path: original_name(graph_module, path) for path in names}

    def original_width(self, group: Group) -> int:
        """Channels of the group before the first step."""
        entry = self._entries.get(group.layers)
        return entry.before if entry is not None else group.width

    def add(self, plan: Plan, groups: Sequence[Group], removal: Removal, kept: Kept, proof: Proof | None) -> None:
        """Take down one removal; ``kept`` is in terms of the graph just before it."""
        for path, dims_made in plan.builder.makes.items():
            self._made.setdefault(path, {dim: plan.weights[path].shape[dim] for dim in dims_made})
        for path, dims in kept.items():
            known = self.kept.setdefault(path, {})
            for dim, indices in dims.items():
                known[dim] = [known[dim][index] for index in indices] if dim in known else indices
        if proof is not None:
            self._proofs.append(proof)
        gone = np.zeros(len(plan.solution.class_of), dtype=bool)
        gone[np.unique(plan.solution.class_of[removal.removed])] = True
        group_of = np.full(len(gone), -1)
        for number, group in enumerate(groups):
            group_of[group.classes] = number
            removed = int(gone[group.classes].sum())
            if removed:
                entry = self._entries.setdefault(group.layers, _Entry(group.layers, group.width, group.width))
                entry.after = group.width - removed * group.multiplicity
        for path in kept:
            if path not in self._told:
                number = self._group_of_weight(plan, path, removal, group_of)
                if number >= 0:
                    self._told.add(path)
                    self._entries[groups[number].layers].weights.append(path)

    def _widths(self, entry: _Entry) -> dict[str, list[int]]:
        """Channels that each layer of a group made before and makes now."""
        found = {}
        for path in entry.layers:
            kept = self.kept.get(path, {})
            now = {dim: len(kept[dim]) if dim in kept else size for dim, size in self._made[path].items()}
            layer = self._names[path].rpartition(".")[0] or self._names[path]
            found[layer] = [math.prod(self._made[path].values()), math.prod(now.values())]
        return found

    @staticmethod
    def _group_of_weight(plan: Plan, path: str, removal: Removal, group_of: Any) -> int:
        """The group that a weight is told with: of the first dimension that a layer makes, else of the first."""
        layout = plan.builder.weights[path]
        made = plan.builder.makes.get(path, ())
        order = sorted(range(len(layout)), key=lambda dim: dim not in made)
        for block in (block for dim in order for block in blocks(layout[dim])):
            labels = block.labels.reshape(-1)
            removed = labels[removal.removed[labels]]
            if removed.size:
                return int(group_of[plan.solution.class_of[removed[0]]])
        return -1

    def note(self) -> str:
        """What was proved, in a sentence."""
        if not self._proofs:
            return "the removal was not proved: there are no example inputs" if self.kept else ""
        told = _told(self._proofs)
        if not told["applies"]:
            return f"the dead-channel proof does not apply: {told['reason']}"
        norms = told["norms_over_kept_channels"]
        beside = f", with {len(norms)} norms taken over the channels that stay" if norms else ""
        return (
            f"proved: outputs are those of the model with all removed weights zero{beside}; "
            f"relative error {told['relative_error']:.1e}"
        )

    def rewrites(self) -> tuple[Rewrite, ...]:
        """One rewrite per group. Each weight's ``kept`` stands whole in one of them, under its original name."""
        made = []
        for entry in self._entries.values():
            detail: dict[str, Any] = {
                "before": entry.before,
                "after": entry.after,
                "layers": [self._names[layer] for layer in entry.layers],
                "widths": self._widths(entry),
                "kept": {self._names[path]: self.kept[path] for path in entry.weights},
            }
            refits = {item.layer: [item.before, item.after] for item in self.refits}
            read = {path.rpartition(".")[0] for path in entry.weights}
            if read & refits.keys():
                detail["refitted"] = {layer: refits[layer] for layer in refits if layer in read}
            if self._proofs:
                detail["proof"] = _told(self._proofs)
            site = self._names[entry.layers[0]].rpartition(".")[0] or entry.layers[0]
            made.append(Rewrite(site, f"{entry.before} → {entry.after} channels", detail))
        return tuple(made)


def _told(proofs: Sequence[Proof]) -> dict[str, Any]:
    """The proofs of all steps as one."""
    reason = next((proof.reason for proof in proofs if proof.reason is not None), None)
    errors = [proof.error for proof in proofs if proof.error is not None]
    return {
        "applies": reason is None,
        "relative_error": max(errors) if reason is None else None,
        "norms_over_kept_channels": sorted({norm for proof in proofs for norm in proof.norms}),
        **({"reason": reason} if reason is not None else {}),
    }
