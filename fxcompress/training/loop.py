"""The loop: every pass that trains runs through :func:`train`."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import fx

from fxcompress.errors import PreconditionError
from fxcompress.graph.batches import Batch
from fxcompress.graph.ownership import own_weights
from fxcompress.training.averaging import Average
from fxcompress.training.checkpoint import copy_into, tensors_of
from fxcompress.training.devices import on_device
from fxcompress.training.engine import Engine, engine
from fxcompress.training.feed import Feed
from fxcompress.training.history import Epoch, History
from fxcompress.training.hooks import Hook, Run
from fxcompress.training.keeping import Keeper
from fxcompress.training.masks import HoldMasks
from fxcompress.training.objective import Objective, Step
from fxcompress.training.optimizers import make_optimizer, set_rates
from fxcompress.training.options import TrainingOptions
from fxcompress.training.randomness import kept_randomness, seed_everything
from fxcompress.training.schedules import schedule
from fxcompress.training.validation import Validation

__all__ = ["train"]

_CHECK_EVERY = 20  # steps between two looks at losses that lie on a GPU, which wait for it
_TELL_EVERY = 0.2  # seconds

ProgressCall = Callable[[int, int, str], None]


def train(
    graph_module: fx.GraphModule,
    data: Iterable[Any],
    objective: Objective,
    options: TrainingOptions,
    *,
    hooks: Sequence[Hook] = (),
    progress: ProgressCall | None = None,
) -> History:
    """Train a graph in place; it ends in eval mode, on the device where it was, with weights of its own.

    Tensors that the graph shares with anyone are copied first, so the user's model stays as it is. Parameters that do
    not require gradients, and buffers such as integer weights, are left alone; weights that were made sparse keep their
    zeros. The same seed on the same machine and number of threads gives the same weights, interrupted or not.

    Args:
        graph_module: a captured graph.
        data: batches: what the model takes, or that and labels; see :func:`fxcompress.graph.batches.batches`.
        objective: what is minimised.
        options: of the run.
        hooks: in the order in which they are called.
        progress: called with (steps done, of, what: loss, metric, time left).

    Raises:
        PreconditionError: the data is empty, exhausted or does not fit; nothing trains; a checkpoint is of another
            model or run; Accelerate is missing.
        TrainingError: the loss or a weight is not finite; names the step and the last good checkpoint.
    """
    own_weights(graph_module, [*graph_module.parameters(), *graph_module.buffers()])
    with kept_randomness(), engine(options.precision, options.device) as found, on_device(graph_module, found.device):
        session = _Session(graph_module, data, objective, options, hooks, found, progress)
        try:
            session.run_all()
        finally:
            session.close()
    return session.run.history


class _Session:
    """One sitting of a run."""

    def __init__(
        self,
        graph_module: fx.GraphModule,
        data: Iterable[Any],
        objective: Objective,
        options: TrainingOptions,
        hooks: Sequence[Hook],
        engine: Engine,
        progress: ProgressCall | None,
    ) -> None:
        self.graph_module, self.objective, self.options = graph_module, objective, options
        self.hooks, self.engine, self.progress = (*hooks, HoldMasks()), engine, progress
        self.feed = Feed(
            graph_module,
            data,
            seed=options.seed,
            accumulate=options.accumulate,
            processes=engine.processes,
            process=engine.process,
            device=engine.device,
        )
        total = _total(self.feed, options)
        self.factor = schedule(
            options.schedule, total, warmup=options.warmup, milestones=options.milestones, gamma=options.gamma
        )
        self.validation = Validation(graph_module, options, engine)
        graph_module.eval()
        objective.start(self._first_batch, engine.device, options.seed)
        objective.to(engine.device)
        optimizer = make_optimizer(graph_module, objective, options)
        self.run = Run(graph_module, optimizer, total, engine.device, main=engine.main)
        self.run.history.metric = self.validation.name
        self.average = Average(graph_module, options.ema) if options.ema is not None else None
        self.keeper = Keeper(self.run, options, self.hooks, objective, self.feed, self.average, self.validation, engine)
        self.position = 0  # steps of this epoch that are done
        self.pending: list[torch.Tensor] = []
        self.told = 0.0

    def _first_batch(self) -> Batch:
        if self.feed.once:
            raise PreconditionError(
                "the data can be read only once, and has to be looked at before training",
                where="data",
                remedy="give a list, a DataLoader, or an object whose __iter__ starts anew",
            )
        return next(self.feed.epoch(0))[0]

    def run_all(self) -> None:
        """From the first step, or from where a checkpoint is, to the result."""
        run = self.run
        self.position = self.keeper.resume()
        self.engine.wrap(Step(self.graph_module, self.objective), run.optimizer)
        self.engine.scaler = self.keeper.scaler
        if run.step == 0 and self.validation.wanted:
            run.history.before = self.validation.measure(None)
        self.graph_module.train()
        self.objective.train()
        self._call("start")
        self.started, self.first_step = time.perf_counter(), run.step
        while not self._done():
            self._epoch()
        self._finish()

    def close(self) -> None:
        """Leave the graph as others want it."""
        self.run.optimizer.zero_grad(set_to_none=True)
        self.graph_module.eval()

    def _done(self) -> bool:
        run, options = self.run, self.options
        if self.keeper.stopped:
            return True
        if run.total is not None:
            return run.step >= run.total and self.position == 0
        return run.epoch >= options.epochs

    def _epoch(self) -> None:
        run, options, start = self.run, self.options, time.perf_counter()
        if run.total is None or run.step < run.total:
            for group in self.feed.epoch(run.epoch, self.position):
                self._step(group)
                self.position += 1
                if run.total is not None and run.step >= run.total:
                    break
                if options.checkpoint_every is not None and run.step % options.checkpoint_every == 0:
                    self._drain()
                    self.keeper.save(self.position, time.perf_counter() - start)
        self._drain()
        self._call("after_epoch")
        run.epoch, self.position = run.epoch + 1, 0
        seconds = time.perf_counter() - start + self.keeper.spent
        self.keeper.spent = 0.0
        run.history.seconds += seconds
        if self.validation.wanted:
            run.metric = self.validation.measure(self.average)
        losses = run.history.losses[run.history.epochs[-1].step if run.history.epochs else 0 :]
        mean = sum(losses) / len(losses) if losses else math.nan
        run.history.epochs.append(Epoch(run.epoch, run.step, mean, run.metric, seconds))
        self.keeper.judge()
        if options.checkpoint is not None:
            self.keeper.save(0, 0.0)

    def _step(self, group: list[Batch]) -> None:
        run, engine = self.run, self.engine
        self._call("before_step")
        run.lr = set_rates(run.optimizer, self.factor, run.step)
        seed_everything(self.options.seed, "step", run.step, engine.process)
        samples = sum(batch.size for batch in group)
        losses: list[torch.Tensor] = []
        for index, batch in enumerate(group):
            with engine.unsynced(index + 1 < len(group)):
                loss = engine.loss(batch)
                if len(group) > 1:
                    loss = loss * (batch.size / samples)
                self._check(loss)
                engine.backward(loss)
            losses.append(loss.detach())
        engine.step(self.options.clip)
        run.step += 1
        self.pending.append(torch.stack(losses).sum() if len(losses) > 1 else losses[0])
        if engine.device.type == "cpu" or len(self.pending) >= _CHECK_EVERY:
            self._drain()
        self._call("after_step")
        if self.average is not None:
            self.average.update(self.graph_module, run.step)
        if self.options.callback is not None:
            self.options.callback(run)
        self._tell()

    def _check(self, loss: torch.Tensor) -> None:
        """On a CPU a loss is known before it does harm."""
        if not loss.requires_grad:
            raise PreconditionError(
                "the loss does not depend on any weight that trains",
                where="loss",
                remedy="compute it from the outputs, without detach(), and leave some weights trainable",
            )
        if loss.device.type == "cpu" and not math.isfinite(loss.item()):
            raise self.keeper.diverged(f"the loss is {loss.item()} at step {self.run.step + 1}")

    def _drain(self) -> None:
        """Look at the losses of the last steps."""
        run = self.run
        if not self.pending:
            return
        values = torch.stack(self.pending).tolist() if len(self.pending) > 1 else [self.pending[0].item()]
        for offset, value in enumerate(values):
            if not math.isfinite(value):
                raise self.keeper.diverged(f"the loss is {value} at step {run.step - len(values) + offset + 1}")
        run.history.losses += values
        run.loss = values[-1]
        self.pending.clear()

    def _finish(self) -> None:
        run = self.run
        self.engine.same(self.graph_module)
        result = self.keeper.result()
        if result is not None:
            own = tensors_of(self.graph_module)
            copy_into({name: own[name] for name in result}, result)
        self.keeper.check_weights()
        self.graph_module.eval()
        self._call("finish")
        if self.validation.wanted:
            run.history.after = run.metric = self.validation.measure(None)

    def _call(self, event: str) -> None:
        for hook in self.hooks:
            getattr(hook, event)(self.run)

    def _tell(self) -> None:
        now = time.perf_counter()
        if self.progress is None or not self.run.main or now - self.told < _TELL_EVERY:
            return
        self.told, run = now, self.run
        what = [f"loss {run.loss:.4g}"]
        if run.metric is not None:
            what.append(f"{self.validation.name} {run.metric:.4g}")
        if run.total is not None:
            left = (now - self.started) / (run.step - self.first_step) * (run.total - run.step)
            what.append(f"{left:.0f} s left" if left < 120 else f"{left / 60:.0f} min left")
        self.progress(run.step, run.total or 0, ", ".join(what))


def _total(feed: Feed, options: TrainingOptions) -> int | None:
    """Optimizer steps of the run, where that is known before."""
    if options.steps is not None:
        return options.steps
    if feed.length is not None:
        return max(1, round(options.epochs * feed.length))
    if feed.once and options.epochs > 1:
        raise PreconditionError(
            "the data can be read only once, and more than one epoch is asked for",
            where="data",
            remedy="give a list, a DataLoader, or an object whose __iter__ starts anew",
        )
    if options.schedule != "constant" or 0 < options.warmup < 1 or options.epochs != int(options.epochs):
        raise PreconditionError(
            "the data has no length, so that nobody knows when the schedule is to end",
            where="data",
            remedy="give steps=, or schedule='constant' with whole epochs",
        )
    return None
