"""Structured channel removal: channels, features, heads and hidden units go physically, with everything they touch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from torch import fx

from fxcompress.analysis.dependency.groups import Group
from fxcompress.analysis.dependency.removal import Removal
from fxcompress.errors import OptionError, nearest
from fxcompress.graph.edit import copy_graph
from fxcompress.graph.shapes import require_shapes
from fxcompress.passes.base import Numerics, Pass, PassContext, PassResult, Skip
from fxcompress.passes.pruning.account import Account
from fxcompress.passes.pruning.goal import Goal, goal_of
from fxcompress.passes.pruning.importance import UserScore
from fxcompress.passes.pruning.options import check_options
from fxcompress.passes.pruning.plan import Attention, Plan, make_plan
from fxcompress.passes.pruning.proof import Proof, dead_channel_proof
from fxcompress.passes.pruning.remove import remove
from fxcompress.passes.pruning.score import scores_of
from fxcompress.passes.pruning.select import Choice, Limits, matches

__all__ = ["PruneChannels"]


@dataclass(frozen=True)
class PruneChannels(Pass):
    """Remove the least important channels of every group of layers that is tied together by the graph.

    How much goes is a ``ratio``, or a target: the least removal is searched that reaches it. Give one of them; with
    none the ratio is 0.5.

    Attributes:
        ratio: share of channels to remove, in (0, 1).
        importance: of a channel, summed over all that goes with it: ``l1``, ``l2`` (norms' scales included), ``fpgm``,
            ``lamp``, ``bn_scale``, ``random``; with ``calibration`` data ``taylor``, ``obd``, ``activation``; or a
            function ``(weight, dim) -> scores [weight.shape[dim]]``.
        scope: ``local`` removes the ratio from every group, ``global`` ranks all groups together, each relative to
            its own mean.
        round_to: widths that remain are multiples of this, or per type of layer: ``{"Conv2d": 8, "Linear": 16}``.
        ignore: name patterns (``"layer4.*"``) of layers whose output channels stay.
        min_width: least number of channels to leave in a group.
        parameters: target: parameters left, as a share of now (below 1) or a number.
        macs: target: multiply-accumulates left, likewise, at batch size 1.
        latency_ms: target: median latency on ``backend`` in milliseconds, on the example inputs and this machine.
        speedup: target: latency on ``backend`` now over latency then; above 1.
        backend: that latency is measured on.
        ratios: ratios of single layers by name pattern; 0 keeps a layer whole. The least counts where several match.
        max_ratio: greatest share to remove from one group.
        attention: what goes in attention: whole ``heads``, parts of every head (``head_size``), or per site what is
            finer and free (``auto``).
        steps: remove in that many steps, scoring anew before each.
        calibration: batches for the importances that need data, and for ``reconstruct``: what the model takes, or
            that and labels.
        loss: ``(outputs, batch) -> scalar`` for ``taylor`` and ``obd``. Without it: cross entropy where a batch has
            labels, else the mean square of the outputs.
        batches: how many batches to take at most; None takes all.
        reconstruct: fit the weights that read the remaining channels to what they read before, by least squares on
            the calibration data.
        proof: compare with the original model with all removed weights zero, where there are example inputs.
        seed: of ``random``.
    """

    name: ClassVar[str] = "prune_channels"
    numerics: ClassVar[Numerics] = Numerics.LOSSY
    ratio: float | None = None
    importance: str | UserScore = "l2"
    scope: Literal["local", "global"] = "local"
    round_to: int | Mapping[str, int] = 1
    ignore: tuple[str, ...] = ()
    min_width: int = 1
    parameters: float | int | None = None
    macs: float | int | None = None
    latency_ms: float | None = None
    speedup: float | None = None
    backend: str = "onnxruntime"
    ratios: Mapping[str, float] = field(default_factory=dict)
    max_ratio: float = 1.0
    attention: Attention = "auto"
    steps: int = 1
    calibration: Iterable[Any] | None = None
    loss: Callable[[Any, Any], Any] | None = None
    batches: int | None = None
    reconstruct: bool = False
    proof: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.ignore, (list, str)):
            object.__setattr__(self, "ignore", (self.ignore,) if isinstance(self.ignore, str) else tuple(self.ignore))
        super().__post_init__()
        check_options(self)

    def run(self, graph_module: fx.GraphModule, context: PassContext) -> PassResult:
        """Plan on the whole graph, then remove all at once; that ``steps`` times."""
        require_shapes(graph_module, self.name)
        original = copy_graph(graph_module) if self.reconstruct else None
        prove = self.proof and context.example_inputs is not None
        goal = goal_of(self, graph_module, context)
        account = Account(graph_module)
        skipped: list[Skip] = []
        for step in range(1, self.steps + 1):
            plan = make_plan(graph_module, self.attention)
            chosen, skipped = self._chosen(plan)
            if not chosen:
                goal.refuse_whole()
                skipped.append(Skip("all", "nothing_to_prune", "no channels of this graph can be removed"))
                break
            classes = self._classes(graph_module, plan, chosen, goal, account, step / self.steps)
            if not classes.size:
                continue
            before = copy_graph(graph_module) if prove else None
            removal, kept = remove(graph_module, plan, classes)
            account.add(plan, chosen, removal, kept, self._proved(before, graph_module, removal, context))
        if not account.kept and not any(skip.code == "nothing_to_prune" for skip in skipped):
            skipped.append(Skip("all", "nothing_to_prune", "every group is at its least width already"))
        note = account.note() if self.proof else ""
        if original is not None and account.kept:
            note += self._reconstruct(original, graph_module, account)
        return PassResult(graph_module, account.rewrites(), tuple(skipped), note)

    def _reconstruct(self, original: fx.GraphModule, pruned: fx.GraphModule, account: Account) -> str:
        # It needs the statistics, which others who prune do not.
        from fxcompress.passes.pruning.reconstruct import reconstruct

        assert self.calibration is not None
        account.refits = reconstruct(original, pruned, account.kept, self.calibration, self.batches)
        if not account.refits:
            return "; no layer could be refitted"
        before, after = (
            sum(getattr(refit, side) for refit in account.refits) / len(account.refits) for side in ("before", "after")
        )
        return f"; {len(account.refits)} layers refitted, mean error of their outputs {before:.3f} → {after:.3f}"

    def _classes(
        self,
        graph_module: fx.GraphModule,
        plan: Plan,
        groups: Sequence[Group],
        goal: Goal,
        account: Account,
        share: float,
    ) -> NDArray[np.int64]:
        """What goes now, so that ``share`` of the way to the goal is done."""
        scores = scores_of(self, graph_module, plan, groups)
        choice = Choice(groups, plan.kinds(groups), scores, self._limits(account, groups, share, goal))

        def at(ratio: float) -> NDArray[np.int64]:
            return plan.without_empty(choice.at(ratio), scores)

        return goal.classes(graph_module, plan, at, choice.given_back, share)

    @staticmethod
    def _proved(
        before: fx.GraphModule | None, after: fx.GraphModule, removal: Removal, context: PassContext
    ) -> Proof | None:
        if before is None or context.example_inputs is None:
            return None
        return dead_channel_proof(before, after, removal, context.example_inputs, context.seed)

    def _limits(self, account: Account, groups: Sequence[Group], share: float, goal: Goal) -> Limits:
        return Limits(
            scope=self.scope,
            ratios={pattern: ratio * share for pattern, ratio in self.ratios.items()},
            round_to=self.round_to,
            min_width=self.min_width,
            max_ratio=self.max_ratio,
            originals=tuple(account.original_width(group) for group in groups),
            up=goal.measure is not None,
        )

    def _chosen(self, plan: Plan) -> tuple[list[Group], list[Skip]]:
        """The groups that may lose channels, and why others may not."""
        layers = [layer for group in plan.groups for layer in group.layers]
        for option, patterns in (("ignore", self.ignore), ("ratios", tuple(self.ratios))):
            for pattern in patterns:
                if not any(matches(pattern, layer) for layer in layers):
                    known = sorted({layer.rpartition(".")[0] for layer in layers})
                    raise OptionError(
                        f"no layer with removable channels matches {pattern!r}",
                        where=option,
                        remedy=nearest(pattern, known) if known else "no layer of this model has removable channels",
                    )
        chosen, skipped = [], list(plan.pinned())
        for group in plan.groups:
            if any(matches(pattern, layer) for pattern in self.ignore for layer in group.layers):
                site = group.layers[0].rpartition(".")[0] or group.layers[0]
                skipped.append(Skip(site, "ignored", "it matches a pattern of ignore", group.layers[1:]))
            else:
                chosen.append(group)
        return chosen, skipped
