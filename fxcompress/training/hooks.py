"""What may act on a run of training while it goes on: constraints on weights, things that happen at a step, state."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from fxcompress.training.history import History

__all__ = ["Hook", "Run"]


@dataclass
class Run:
    """A run of training, as hooks and callbacks see it.

    Attributes:
        graph_module: what is trained; its weights are its own. Change modules of it only at ``start`` and before steps.
        optimizer: a ``torch.optim`` optimizer.
        total: optimizer steps in all; None where nobody knows.
        device: where it trains.
        step: optimizer steps done.
        epoch: epochs begun before this one.
        loss: of the last step, in this process; NaN before the first. On a GPU the loss of some steps ago.
        lr: learning rate of the last step.
        metric: the last one measured.
        main: whether this process reports and writes.
        history: what was measured so far.
    """

    graph_module: fx.GraphModule
    optimizer: torch.optim.Optimizer
    total: int | None
    device: torch.device
    step: int = 0
    epoch: int = 0
    loss: float = float("nan")
    lr: float = 0.0
    metric: float | None = None
    main: bool = True
    history: History = field(default_factory=History)


class Hook:
    """Base of hooks: every method may be left out. The order of a run is ::

        load_state (when it resumes), start,
        then at every step  before_step, forward, backward, optimizer, after_step,
        at the end of every epoch  after_epoch (before the metric is measured),
        finish

    What a hook did to flags of modules (a norm put into eval mode, observers switched off) is in no checkpoint:
    ``start`` does it again where ``run.step`` says that it was done. Tensors of the graph are saved without help.
    """

    name = "hook"
    """Under which its state is saved; unique within a run."""

    def start(self, run: Run) -> None:
        """Before the first step, the graph in train mode; ``run.step`` is above 0 when the run resumes."""

    def before_step(self, run: Run) -> None:
        """Before forward and backward of a step; ``run.step`` steps are done."""

    def after_step(self, run: Run) -> None:
        """The optimizer has stepped, ``run.step`` counts this step; hold constraints here, under ``torch.no_grad``."""

    def after_epoch(self, run: Run) -> None:
        """An epoch has ended."""

    def finish(self, run: Run) -> None:
        """After the last step; the result's weights are in place (average or best), the graph in eval mode."""

    def state(self) -> Mapping[str, torch.Tensor]:
        """What a checkpoint must keep of the hook."""
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take back what :meth:`state` gave."""
