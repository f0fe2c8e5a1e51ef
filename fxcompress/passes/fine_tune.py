"""Fine-tuning: the graph trains on labelled data, to win back what the passes before it cost."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx

from fxcompress.passes.base import Numerics, Pass, PassContext, PassResult, Rewrite, Skip
from fxcompress.training.account import frozen_layers
from fxcompress.training.loop import train
from fxcompress.training.objective import Objective
from fxcompress.training.options import TrainingOptions

__all__ = ["FineTune"]


@dataclass(frozen=True)
class FineTune(TrainingOptions, Pass):
    """Train all weights that require gradients on ``loader``. Layers with integer weights stay as they are.

    Attributes:
        loader: batches: what the model takes, and labels.
    """

    name: ClassVar[str] = "fine_tune"
    numerics: ClassVar[Numerics] = Numerics.LOSSY
    loader: Iterable[Any]

    def run(self, graph_module: fx.GraphModule, context: PassContext) -> PassResult:
        """One run of training; the graph ends in eval mode with weights of its own."""
        skipped = tuple(Skip(path, code, reason) for path, code, reason in frozen_layers(graph_module))
        history = train(
            graph_module, self.loader, Objective(self.loss), self, hooks=context.hooks, progress=context.progress
        )
        rewrite = Rewrite("all", f"trained in {history.steps} steps", history.detail())
        return PassResult(graph_module, (rewrite,), skipped, history.summary())
