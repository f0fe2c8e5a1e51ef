"""Distillation: the graph learns to answer as a teacher does, by default the model as it was before any pass."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import fx

from fxcompress.errors import OptionError, PreconditionError, nearest
from fxcompress.passes.base import Numerics, Pass, PassContext, PassResult, Rewrite, Skip
from fxcompress.training.account import frozen_layers
from fxcompress.training.distillation import Match, Weights, distillation
from fxcompress.training.features import FEATURE_LOSSES
from fxcompress.training.loop import train
from fxcompress.training.options import TrainingOptions, unread

__all__ = ["Distill"]


@dataclass(frozen=True)
class Distill(TrainingOptions, Pass):
    """Train on ``(1 − α)·L(labels) + α·T²·KL(teacher/T ‖ student/T)`` (Hinton et al. 2015), with features if wanted.

    ``loss`` and its metric are of the labels; data without labels is learned from the teacher alone.

    Attributes:
        loader: batches: what the model takes, with labels or without.
        teacher: a module in eval mode that is called as the model is, a captured graph, a compiled model, or several
            in a tuple, of which the mean counts. None takes the model as given to ``compile``.
        alpha: share of the teacher's part, in (0, 1].
        temperature: of ``soft_targets``; 1 compares the probabilities themselves.
        match: what is compared: ``soft_targets`` of classes and tokens, ``mse`` of logits or of regression, ``cosine``
            of embeddings.
        features: layers to compare as well, student's → teacher's, or names that both have. Names of layers or nodes.
        feature_loss: ``fitnets``, with a learned map where widths differ, ``attention`` or ``relational``.
        feature_weight: of all of them together, beside the rest.
    """

    name: ClassVar[str] = "distill"
    numerics: ClassVar[Numerics] = Numerics.LOSSY
    loader: Iterable[Any]
    teacher: Any = field(default=None, kw_only=True)
    alpha: float = field(default=0.9, kw_only=True)
    temperature: float = field(default=4.0, kw_only=True)
    match: Match = field(default="soft_targets", kw_only=True)
    features: Mapping[str, str] | tuple[str, ...] = field(default=(), kw_only=True)
    feature_loss: str = field(default="fitnets", kw_only=True)
    feature_weight: float = field(default=1.0, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.alpha <= 1:
            raise OptionError(
                f"alpha={self.alpha} is outside (0, 1]", where="alpha", remedy="FineTune uses labels alone"
            )
        if not self.temperature > 0:
            raise OptionError(f"temperature={self.temperature} is not above 0", where="temperature")
        if self.feature_weight < 0:
            raise OptionError(f"feature_weight={self.feature_weight} is below 0", where="feature_weight")
        if self.feature_loss not in FEATURE_LOSSES:
            raise OptionError(
                f"feature_loss={self.feature_loss!r} is unknown",
                where="feature_loss",
                remedy=nearest(self.feature_loss, FEATURE_LOSSES),
            )
        if self.match != "soft_targets":
            unread(self, "temperature", "is of match='soft_targets'")
        if not self.features:
            for name in ("feature_loss", "feature_weight"):
                unread(self, name, "is of features")

    def run(self, graph_module: fx.GraphModule, context: PassContext) -> PassResult:
        """One run of training against the teachers."""
        teachers = self.teacher if isinstance(self.teacher, (tuple, list)) else (self.teacher,)
        known = [context.original if teacher is None else teacher for teacher in teachers]
        if not known or any(teacher is None for teacher in known):
            raise PreconditionError("there is no teacher", where="teacher", remedy="give teacher=")
        pairs = dict(self.features) if isinstance(self.features, Mapping) else {name: name for name in self.features}
        weights = Weights(self.alpha, self.temperature, self.match, self.feature_weight, self.feature_loss)
        skipped = tuple(Skip(path, code, reason) for path, code, reason in frozen_layers(graph_module))
        with distillation(graph_module, known, self.loss, weights, pairs) as objective:
            history = train(graph_module, self.loader, objective, self, hooks=context.hooks, progress=context.progress)
        facts = {"teachers": len(known), "labels": objective.labelled, "features": pairs}
        rewrite = Rewrite("all", f"distilled in {history.steps} steps", {**history.detail(), **facts})
        note = history.summary() + ("" if objective.labelled else "; from the teacher alone, without labels")
        return PassResult(graph_module, (rewrite,), skipped, note)
