"""The options that every pass that trains has: how long, by which optimizer, under which schedule, kept where."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from fxcompress.errors import OptionError, nearest
from fxcompress.options import check_types
from fxcompress.training.losses import LOSSES, Loss
from fxcompress.training.metrics import METRICS, Metric
from fxcompress.training.schedules import SCHEDULES

__all__ = ["TrainingOptions", "unread"]


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """Mix-in of passes that train: ``class FineTune(TrainingOptions, Pass)``; the pass is then its own options.

    Attributes:
        epochs: passes over the data; may be a fraction.
        steps: optimizer steps, in place of ``epochs``; needed with a schedule where the data has no length.
        optimizer: ``adamw``, ``adam``, ``sgd`` (Nesterov), or a function of parameter groups that makes one.
        lr: learning rate, the largest of the schedule.
        momentum: of ``sgd``.
        weight_decay: of weights with two dimensions or more; norms, biases and scales have none.
        schedule: ``cosine``, ``linear``, ``step``, ``one_cycle``, ``constant``, or a function of the share done,
            in [0, 1], that gives the factor of ``lr``.
        warmup: over how many steps the rate rises from 0: a share of all below 1, a number from 1 on.
        milestones: of ``step``: shares of the run after which the rate falls.
        gamma: of ``step``: factor at each milestone.
        loss: ``auto``, ``cross_entropy``, ``mse``, ``l1``, ``smooth_l1``, ``bce``, ``cosine``, or a function
            ``(outputs, batch) -> scalar``. ``auto`` is cross entropy where a batch has class labels.
        precision: of the arithmetic (autocast); weights and optimizer stay as they are. ``float16`` needs a GPU.
        accumulate: batches per optimizer step.
        clip: largest norm of all gradients together.
        ema: decay of an exponential moving average of the weights, which is then the result: ``0.999``.
        validation: batches on which the metric is measured after every epoch, or a function ``(module) -> figure``.
        metric: ``accuracy``, ``top5``, ``loss``, ``mse``, ``cosine``, or a function ``(outputs, batch) -> mean of the
            batch``. Without it: ``accuracy`` where the loss is cross entropy, else ``loss``.
        better: which way the metric is better; known for those with a name.
        patience: epochs without a better metric after which training stops. The best weights are then the result.
        keep_best: end with the weights of the best epoch.
        checkpoint: directory for checkpoints. Where it holds one of the same run, that run goes on.
        checkpoint_every: optimizer steps between checkpoints; None writes one after every epoch.
        seed: of the order of the data and of all random numbers.
        device: ``auto`` takes a GPU if there is one, or ``cpu``.
        callback: called with a :class:`~fxcompress.training.hooks.Run` after every optimizer step.
    """

    epochs: float = 1
    steps: int | None = None
    optimizer: str | Callable[[list[dict[str, Any]]], Any] = "adamw"
    lr: float = 3e-4
    momentum: float = 0.9
    weight_decay: float = 0.0
    schedule: str | Callable[[float], float] = "cosine"
    warmup: float = 0.0
    milestones: tuple[float, ...] = (0.5, 0.75)
    gamma: float = 0.1
    loss: str | Loss = "auto"
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    accumulate: int = 1
    clip: float | None = None
    ema: float | None = None
    validation: Iterable[Any] | Callable[[Any], float] | None = None
    metric: str | Metric | None = None
    better: Literal["higher", "lower"] | None = None
    patience: int | None = None
    keep_best: bool = False
    checkpoint: str | Path | None = None
    checkpoint_every: int | None = None
    seed: int = 0
    device: Literal["auto", "cpu"] = "auto"
    callback: Callable[[Any], object] | None = None

    def __post_init__(self) -> None:
        """Check types, ranges and names.

        Raises:
            OptionError: names the option, and the nearest name where one is unknown.
        """
        check_types(self)
        _known("optimizer", self.optimizer, ("adam", "adamw", "sgd"))
        _known("schedule", self.schedule, SCHEDULES)
        _known("loss", self.loss, ("auto", *LOSSES))
        _known("metric", self.metric, METRICS)
        _above("epochs", self.epochs, 0.0)
        _above("lr", self.lr, 0.0)
        _above("clip", self.clip, 0.0)
        for name in ("steps", "accumulate", "patience", "checkpoint_every"):
            _least(name, getattr(self, name), 1)
        for name in ("momentum", "weight_decay", "warmup", "gamma"):
            _least(name, getattr(self, name), 0)
        if self.ema is not None and not 0 < self.ema < 1:
            raise OptionError(f"ema={self.ema} is outside (0, 1)", where="ema", remedy="0.999 is usual")
        if any(not 0 <= share <= 1 for share in self.milestones):
            raise OptionError(f"milestones={self.milestones} are no shares of the run", where="milestones")
        if (self.patience is not None or self.keep_best) and self.validation is None:
            name = "patience" if self.patience is not None else "keep_best"
            raise OptionError(f"{name} needs data for the metric", where=name, remedy="give validation=")
        if callable(self.metric) and callable(self.validation):
            raise OptionError("validation is a function, which leaves nothing to the metric", where="metric")
        if self.checkpoint_every is not None and self.checkpoint is None:
            raise OptionError("checkpoint_every needs a directory", where="checkpoint", remedy="give checkpoint=")
        if self.metric is not None and self.validation is None:
            raise OptionError("a metric needs data", where="metric", remedy="give validation=")
        if self.optimizer != "sgd":
            unread(self, "momentum", "is of optimizer='sgd'")
        if self.schedule != "step":
            for name in ("milestones", "gamma"):
                unread(self, name, "is of schedule='step'")


def unread(options: Any, name: str, why: str) -> None:
    """Refuse an option that was given and that the others leave without effect.

    Raises:
        OptionError: it is not at its default.
    """
    default = next(item.default for item in fields(options) if item.name == name)
    if getattr(options, name) != default:
        raise OptionError(f"{name}={getattr(options, name)!r} would do nothing: it {why}", where=name)


def _known(option: str, value: object, names: Iterable[str]) -> None:
    if isinstance(value, str) and value not in names:
        raise OptionError(f"{option}={value!r} is unknown", where=option, remedy=nearest(value, names))


def _above(option: str, value: float | None, limit: float) -> None:
    if value is not None and not (value > limit and math.isfinite(value)):
        raise OptionError(f"{option}={value} is no number above {limit:g}", where=option)


def _least(option: str, value: float | None, limit: float) -> None:
    if value is not None and not value >= limit:
        raise OptionError(f"{option}={value} is below {limit:g}", where=option)
