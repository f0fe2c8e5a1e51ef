"""The metric of a run: what is measured, on what, and which way is better."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

from torch import fx

from fxcompress.errors import PreconditionError
from fxcompress.graph.batches import Batch, as_batch
from fxcompress.training.averaging import Average, placed
from fxcompress.training.engine import Engine
from fxcompress.training.metrics import evaluate, higher_is_better
from fxcompress.training.options import TrainingOptions
from fxcompress.training.randomness import seed_everything

__all__ = ["Validation"]


class Validation:
    """What a run measures.

    Attributes:
        wanted: whether there is anything to measure on.
        name: of the metric; empty where it is not wanted.
    """

    def __init__(self, graph_module: fx.GraphModule, options: TrainingOptions, engine: Engine) -> None:
        self.graph_module, self.options, self.engine = graph_module, options, engine
        self.wanted = options.validation is not None
        self.metric = options.metric
        if self.metric is None:
            self.metric = "accuracy" if options.loss in ("auto", "cross_entropy") else "loss"
        told: Any = options.validation if callable(options.validation) else self.metric
        self.name = "" if not self.wanted else told if isinstance(told, str) else getattr(told, "__name__", "metric")
        ranked = options.patience is not None or options.keep_best
        self.higher = higher_is_better(told, options.better) if ranked else True

    def measure(self, average: Average | None) -> float:
        """The metric of the weights as they are, or of their average; the same number in every process."""
        validation = self.options.validation
        self.engine.same(self.graph_module)
        with placed(self.graph_module, average.tensors if average is not None else None):
            if callable(validation):
                modes = {module: module.training for module in self.graph_module.modules()}
                try:
                    return _number(validation(self.graph_module.eval()))
                finally:
                    for module, mode in modes.items():
                        module.training = mode
            assert self.metric is not None
            return evaluate(
                self.graph_module, self._batches(), self.metric, loss=self.options.loss, total=self.engine.total
            )

    def _batches(self) -> Iterator[Batch]:
        """Those of this process."""
        seed_everything(self.options.seed, "validation")
        given: Any = self.options.validation
        if not hasattr(given, "__iter__") or isinstance(given, (str, dict)):
            raise PreconditionError(
                f"the validation data is a {type(given).__name__}, not a series of batches", where="validation"
            )
        if hasattr(given, "__next__"):
            raise PreconditionError(
                "the validation data can be read only once",
                where="validation",
                remedy="give a list or a DataLoader: it is read after every epoch",
            )
        for index, batch in enumerate(islice(given, self.engine.process, None, self.engine.processes)):
            yield as_batch(self.graph_module, batch, f"batch {index} of the validation data", device=self.engine.device)


def _number(found: Any) -> float:
    try:
        return float(found)
    except (TypeError, ValueError, RuntimeError) as error:
        raise PreconditionError(
            f"the validation function gave a {type(found).__name__}, which is no number",
            where="validation",
            remedy="return the figure",
        ) from error
