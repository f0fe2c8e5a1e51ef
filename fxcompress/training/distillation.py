"""The objective of distillation: labels, a teacher's outputs, a teacher's features.

``(1 − α)·L(labels) + α·T²·KL(softmax(t/T) ‖ softmax(s/T)) + β·Σ features``  (Hinton et al. 2015), the divergence a mean
over the rows of the batch. Without labels it is the teacher's part alone, with weight 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import fx, nn

from fxcompress.errors import PreconditionError
from fxcompress.graph.batches import Batch
from fxcompress.graph.running import nested_inputs
from fxcompress.training.features import FEATURE_LOSSES, adapter_for
from fxcompress.training.losses import Loss, classes_last, labels_of, loss_of, main_output
from fxcompress.training.objective import Objective
from fxcompress.training.randomness import seed_of
from fxcompress.training.taps import tapped
from fxcompress.training.teacher import Teacher

__all__ = ["Distillation", "Match", "Weights", "distillation"]

Match: TypeAlias = Literal["soft_targets", "mse", "cosine"]

functional = nn.functional


@dataclass(frozen=True)
class Weights:
    """How much what counts.

    Attributes:
        alpha: of the teacher's outputs; labels have the rest.
        temperature: of ``soft_targets``.
        match: what of the outputs is compared.
        feature: of all features together.
        feature_loss: a name in :data:`~fxcompress.training.features.FEATURE_LOSSES`.
    """

    alpha: float
    temperature: float
    match: Match
    feature: float
    feature_loss: str


class Distillation(Objective):
    """See the module. Made by :func:`distillation`, which taps the student."""

    def __init__(
        self,
        student: fx.GraphModule,
        teachers: Sequence[Teacher],
        loss: str | Loss,
        weights: Weights,
        pairs: Mapping[str, str],
        taps: Mapping[str, torch.Tensor],
    ) -> None:
        super().__init__(loss)
        self.teachers, self.weights, self.pairs = tuple(teachers), weights, dict(pairs)
        self.taps, self._student = taps, (student,)  # in a tuple, the student is no part of this module
        self.adapters = nn.ModuleList()
        self.labelled = False

    def targets(self, batch: Batch) -> list[tuple[Any, dict[str, torch.Tensor]]]:
        """Outputs and features of every teacher."""
        args, kwargs = nested_inputs(self._student[0], batch.leaves)
        return [(teacher(args, kwargs), dict(teacher.features)) for teacher in self.teachers]

    def forward(self, outputs: Any, batch: Batch, targets: Any) -> torch.Tensor:
        """The loss of a batch."""
        weights = self.weights
        output, labels = main_output(outputs), labels_of(batch)
        theirs = [main_output(found) for found, _ in targets]
        for found in theirs:
            if found.shape != output.shape:
                raise PreconditionError(
                    f"the teacher gives {list(found.shape)}, the student {list(output.shape)}",
                    where="teacher",
                    remedy="distil between models with the same outputs; widths inside may differ",
                )
        total = self._matched(output, theirs, labels)
        hard = callable(self.loss) or labels is not None
        if hard and weights.alpha < 1:
            self.labelled = True
            total = weights.alpha * total + (1 - weights.alpha) * loss_of(self.loss, outputs, batch)
        if self.pairs and weights.feature:
            total = total + weights.feature * self._features([found for _, found in targets])
        return total

    def _matched(
        self, output: torch.Tensor, theirs: Sequence[torch.Tensor], labels: torch.Tensor | None
    ) -> torch.Tensor:
        """Several teachers are one: the mean of their probabilities, or of their outputs."""
        if self.weights.match != "soft_targets":
            target = torch.stack([found.to(output.dtype) for found in theirs]).mean(0)
            if self.weights.match == "mse":
                return functional.mse_loss(output, target)
            return 1 - functional.cosine_similarity(output, target, dim=-1).mean()
        heat = self.weights.temperature
        student = classes_last(output, labels)
        if student.shape[-1] < 2:
            raise PreconditionError(
                f"outputs {list(output.shape)} have one class, whose probability is 1 whatever the weights are",
                where="match",
                remedy="give match='mse'",
            )
        wanted = torch.stack([classes_last(found, labels).div(heat).softmax(-1) for found in theirs]).mean(0)
        student, wanted = student.flatten(0, -2), wanted.flatten(0, -2)
        if labels is not None and labels.dtype == torch.int64 and labels.numel() == len(student):
            counts = labels.flatten() >= 0  # tokens marked by -100 are no targets
            if not bool(counts.all()):
                student, wanted = student[counts], wanted[counts]
        divergence = functional.kl_div(student.div(heat).log_softmax(-1), wanted, reduction="sum")
        return heat**2 * divergence / max(len(student), 1)

    def _features(self, theirs: Sequence[Mapping[str, torch.Tensor]]) -> torch.Tensor:
        compare = FEATURE_LOSSES[self.weights.feature_loss]
        terms: list[torch.Tensor] = []
        for index, features in enumerate(theirs):
            for number, (ours, name) in enumerate(self.pairs.items()):
                student = self.taps[ours].float()
                if len(self.adapters):
                    student = self.adapters[index * len(self.pairs) + number](student)
                terms.append(compare(student, features[name].float()))
        return torch.stack(terms).mean()

    @torch.no_grad()
    def start(self, first: Callable[[], Batch], device: torch.device, seed: int) -> None:
        """One run of teachers and student, to see what the features are like and make the adapters they need."""
        for teacher in self.teachers:
            teacher.start(device)
        if not self.pairs or self.weights.feature_loss != "fitnets":
            return  # the others compare features of any width
        student, batch = self._student[0], first()
        args, kwargs = nested_inputs(student, batch.leaves)
        student(*args, **kwargs)
        targets = self.targets(batch)
        made: list[nn.Module] = []
        with torch.random.fork_rng():
            torch.manual_seed(seed_of(seed, "adapters"))
            for _, features in targets:
                made += [adapter_for(self.taps[ours], features[name]) for ours, name in self.pairs.items()]
        self.adapters = nn.ModuleList(made)


@contextmanager
def distillation(
    student: fx.GraphModule,
    teachers: Sequence[Any],
    loss: str | Loss,
    weights: Weights,
    pairs: Mapping[str, str],
) -> Iterator[Distillation]:
    """The objective, for as long as it is used; afterwards student and teachers are as they were.

    Args:
        student: the graph that is to train.
        teachers: modules or captured graphs.
        loss: of the labels.
        weights: of the parts.
        pairs: layer of the student → layer of each teacher whose features it is to learn.

    Raises:
        PreconditionError: a teacher cannot be used.
        OptionError: a layer is unknown; the nearest is suggested.
    """
    with ExitStack() as stack:
        found = [stack.enter_context(Teacher(teacher, pairs.values())) for teacher in teachers]
        taps = stack.enter_context(tapped(student, pairs))
        yield Distillation(student, found, loss, weights, pairs, taps)
