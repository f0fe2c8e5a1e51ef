"""The importance of every class of a plan, by the criterion that the options name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import fx, nn

from fxcompress.analysis.dependency.groups import Group, importance
from fxcompress.analysis.dependency.layout import blocks
from fxcompress.errors import PreconditionError
from fxcompress.passes.pruning.importance import WEIGHT_CRITERIA, Criterion, UserScore, of_user, weight_criterion
from fxcompress.passes.pruning.plan import Plan

__all__ = ["scores_of"]


class Scoring(Protocol):
    """The options of a pass that say how channels are scored."""

    @property
    def importance(self) -> str | UserScore: ...
    @property
    def calibration(self) -> Iterable[Any] | None: ...
    @property
    def loss(self) -> Callable[[Any, Any], Any] | None: ...
    @property
    def batches(self) -> int | None: ...
    @property
    def seed(self) -> int: ...


def scores_of(
    options: Scoring, graph_module: fx.GraphModule, plan: Plan, groups: Sequence[Group]
) -> NDArray[np.float64]:
    """``[classes]`` scores. Groups in which the criterion has no say (no norm for ``bn_scale``) are ranked by ``l2``.

    Raises:
        PreconditionError: a weight is not finite, or the data does not fit the model.
    """
    _check_finite(plan)
    scores, heard = _scores(_criterion(options, graph_module), plan)
    deaf = [group for group in groups if not heard[group.classes].all()]
    if deaf:
        fallback, _ = _scores(weight_criterion("l2", graph_module, options.seed), plan)
        for group in deaf:
            scores[group.classes] = fallback[group.classes]
    return scores


def _criterion(options: Scoring, graph_module: fx.GraphModule) -> Criterion:
    if callable(options.importance):
        return of_user(options.importance)
    if options.importance in WEIGHT_CRITERIA:
        return weight_criterion(options.importance, graph_module, options.seed)
    from fxcompress.passes.pruning.data_importance import data_criterion

    assert options.calibration is not None
    return data_criterion(options.importance, graph_module, options.calibration, options.loss, options.batches)


def _scores(criterion: Criterion, plan: Plan) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    return importance(plan.builder, plan.solution, plan.weights, criterion)


def _check_finite(plan: Plan) -> None:
    for path, weight in plan.weights.items():
        if not weight.is_floating_point() or not (isinstance(weight, nn.Parameter) or _ranked(plan, path)):
            continue  # a buffer may hold infinity: a mask, a range
        # NaN and infinity survive a sum, which is many times faster; a finite weight may still overflow it.
        if not bool(weight.sum().isfinite() or torch.isfinite(weight).all()):
            raise PreconditionError(
                f"the weight {path!r} holds NaN or infinity, so that channels cannot be ranked",
                where=path,
                remedy="repair the checkpoint, or list the layer in ignore once it is finite",
            )


def _ranked(plan: Plan, path: str) -> bool:
    """Whether channels are told apart by this tensor."""
    removable, class_of = plan.solution.removable, plan.solution.class_of
    found = (block for dim in plan.builder.weights[path] for block in blocks(dim))
    return any(bool(removable[class_of[block.labels]].any()) for block in found)
