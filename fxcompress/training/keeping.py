"""What a run remembers: the best weights, when to stop, and its checkpoints."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch

from fxcompress.errors import PreconditionError, TrainingError
from fxcompress.training.averaging import Average
from fxcompress.training.checkpoint import (
    Checkpoint,
    Checkpoints,
    copy_into,
    fingerprint,
    optimizer_state,
    restore_optimizer,
    tensors_of,
)
from fxcompress.training.engine import Engine
from fxcompress.training.feed import Feed
from fxcompress.training.history import History
from fxcompress.training.hooks import Hook, Run
from fxcompress.training.objective import Objective
from fxcompress.training.options import TrainingOptions
from fxcompress.training.validation import Validation

__all__ = ["Keeper"]

# Options that do not change what the weights become; all others tell one run from another.
_NEUTRAL = {"callback", "checkpoint", "checkpoint_every", "device", "loader", "data", "validation"}


class Keeper:
    """The memory of a run.

    Attributes:
        stopped: training ends here.
        spent: seconds of the present epoch in earlier sittings.
        scaler: state of the float16 loss scale to go on from.
    """

    def __init__(
        self,
        run: Run,
        options: TrainingOptions,
        hooks: Sequence[Hook],
        objective: Objective,
        feed: Feed,
        average: Average | None,
        validation: Validation,
        engine: Engine,
    ) -> None:
        self.run, self.options, self.hooks, self.objective = run, options, hooks, objective
        self.average, self.validation, self.engine = average, validation, engine
        self.stopped, self.spent, self.waited = False, 0.0, 0
        self.scaler: dict[str, float] = {}
        self.best: dict[str, torch.Tensor] | None = None
        self.best_metric = math.nan
        self.checkpoints: Checkpoints | None = None
        self.last: str | None = None
        if options.checkpoint is not None:
            identity = {**_plain(options), "processes": engine.processes, "steps_per_epoch": feed.length}
            self.checkpoints = Checkpoints(options.checkpoint, {**fingerprint(run.graph_module), **identity})

    def judge(self) -> None:
        """After a metric was measured: keep the weights if it is the best, stop if it has not been for too long."""
        options, metric, history = self.options, self.run.metric, self.run.history
        if metric is None or not (options.keep_best or options.patience is not None):
            return
        if math.isnan(metric):
            raise self.diverged(f"{self.validation.name} is NaN after step {self.run.step}")
        better = math.isnan(self.best_metric) or (
            metric > self.best_metric if self.validation.higher else metric < self.best_metric
        )
        if better:
            self.best_metric, self.waited = metric, 0
            self.best = self._result_now()
            history.best_epoch = self.run.epoch
            return
        self.waited += 1
        if options.patience is not None and self.waited >= options.patience:
            self.stopped = True
            history.stopped = f"no better {self.validation.name} in {self.waited} epochs"

    def result(self) -> dict[str, torch.Tensor] | None:
        """The weights that the run is to end with, where those are not the last."""
        if self.best is not None:
            return self.best
        return self.average.tensors if self.average is not None else None

    def _result_now(self) -> dict[str, torch.Tensor]:
        """Copies of all tensors, averaged where an average is kept."""
        own = {**tensors_of(self.run.graph_module), **(self.average.tensors if self.average is not None else {})}
        return {name: tensor.detach().clone() for name, tensor in own.items()}

    def diverged(self, problem: str) -> TrainingError:
        """The error for numbers that are not finite."""
        kept = f"the last good checkpoint is {self.last}; " if self.last is not None else ""
        return TrainingError(
            problem,
            where=f"epoch {self.run.epoch + 1}",
            remedy=f"{kept}lower lr ({self.options.lr:g}), clip gradients (clip=1.0), and look for NaN in the data",
        )

    def check_weights(self) -> None:
        """Refuse weights that are not finite."""
        for name, tensor in tensors_of(self.run.graph_module).items():
            if tensor.is_floating_point() and not bool(tensor.sum().isfinite() or torch.isfinite(tensor).all()):
                raise self.diverged(f"{name!r} is not finite after step {self.run.step}")

    def save(self, position: int, seconds: float) -> None:
        """Write a checkpoint; ``position`` steps of the present epoch are done, and took ``seconds``."""
        assert self.checkpoints is not None
        self.engine.same(self.run.graph_module)
        self.check_weights()
        if self.engine.main:
            self.last = str(self.checkpoints.save(self.run.step, *self._content(position, seconds)))
        self.engine.wait()

    def _content(self, position: int, seconds: float) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        run = self.run
        optimizer, plain = optimizer_state(run.optimizer)
        parts: dict[str, dict[str, torch.Tensor]] = {
            "model": tensors_of(run.graph_module),
            "objective": tensors_of(self.objective),
            "optimizer": optimizer,
            "average": self.average.tensors if self.average is not None else {},
            "best": self.best or {},
        }
        for hook in self.hooks:
            parts[f"hook.{hook.name}"] = dict(hook.state())
        tensors = {f"{part}.{name}": tensor for part, found in parts.items() for name, tensor in found.items()}
        tensors["losses"] = torch.tensor(run.history.losses, dtype=torch.float64)
        state = {
            "step": run.step,
            "epoch": run.epoch,
            "position": position,
            "seconds": self.spent + seconds,
            "metric": run.metric,
            "stopped": self.stopped,
            "waited": self.waited,
            "best_metric": None if math.isnan(self.best_metric) else self.best_metric,
            "history": run.history.to_json(),
            "optimizer": plain,
            "scaler": self.engine.scaler,
        }
        return state, tensors

    def resume(self) -> int:
        """Go back to the newest checkpoint, if there is one; returns how many steps of its epoch are done."""
        found = self.checkpoints.latest() if self.checkpoints is not None else None
        if found is None:
            return 0
        assert self.checkpoints is not None
        try:
            return self._restore(found)
        except (KeyError, ValueError, TypeError, RuntimeError) as error:
            raise PreconditionError(
                f"the checkpoint does not fit this run: {error}",
                where=str(self.checkpoints.directory),
                remedy="give another directory, or remove this one to start anew",
            ) from error

    def _restore(self, found: Checkpoint) -> int:
        run, state = self.run, found.state
        copy_into(tensors_of(run.graph_module), found.part("model"))
        copy_into(tensors_of(self.objective), found.part("objective"))
        restore_optimizer(run.optimizer, found.part("optimizer"), state["optimizer"])
        if self.average is not None:
            copy_into(self.average.tensors, found.part("average"))
        best = found.part("best")
        self.best = {name: tensor.to(run.device) for name, tensor in best.items()} or None
        for hook in self.hooks:
            hook.load_state(found.part(f"hook.{hook.name}"))
        run.history = History.from_json(state["history"], found.tensors["losses"].tolist())
        run.step, run.epoch, run.metric = state["step"], state["epoch"], state["metric"]
        run.history.resumed_at = run.step
        run.loss = run.history.losses[-1] if run.history.losses else math.nan
        self.stopped, self.waited, self.spent = state["stopped"], state["waited"], state["seconds"]
        self.best_metric = math.nan if state["best_metric"] is None else state["best_metric"]
        self.scaler = state["scaler"]
        assert self.checkpoints is not None
        self.last = str(self.checkpoints.directory / f"step-{run.step:08d}")
        return int(state["position"])


def _plain(options: Any) -> dict[str, Any]:
    """Options as values that JSON keeps; of functions only their names."""
    made: dict[str, Any] = {}
    for item in dataclasses.fields(options):
        value = getattr(options, item.name)
        if item.name in _NEUTRAL:
            continue
        if callable(value) or not isinstance(value, (bool, int, float, str, tuple, list, dict, type(None))):
            value = getattr(value, "__qualname__", type(value).__qualname__)
        made[item.name] = value
    return made
