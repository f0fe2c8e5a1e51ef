"""What a run of training came to: losses, metrics, times; plain values for reports and checkpoints."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = ["Epoch", "History"]

_POINTS = 200  # of a curve in a report


@dataclass
class Epoch:
    """One epoch: its number from 1 on, the steps done at its end, mean loss, metric if measured, seconds."""

    number: int
    step: int
    loss: float
    metric: float | None
    seconds: float


@dataclass
class History:
    """The course of a run.

    Attributes:
        losses: of every optimizer step, in this process.
        epochs: one entry for each that ended.
        metric: name of what was measured on validation data.
        before: metric before the first step.
        after: metric of the result.
        seconds: of training, validation left out; over all sittings.
        resumed_at: steps that were done when this sitting began.
        stopped: why it ended: ``completed``, or ``no better metric in N epochs``.
        best_epoch: whose weights are the result; None where that was not asked.
    """

    losses: list[float] = field(default_factory=list)
    epochs: list[Epoch] = field(default_factory=list)
    metric: str = ""
    before: float | None = None
    after: float | None = None
    seconds: float = 0.0
    resumed_at: int = 0
    stopped: str = "completed"
    best_epoch: int | None = None

    @property
    def steps(self) -> int:
        """Optimizer steps done."""
        return len(self.losses)

    def curve(self, points: int = _POINTS) -> list[tuple[int, float]]:
        """``(step, mean loss up to it)`` in at most ``points`` parts of equal length."""
        count = len(self.losses)
        width = max(1, -(-count // points))
        parts = [self.losses[start : start + width] for start in range(0, count, width)]
        return [(min((i + 1) * width, count), sum(part) / len(part)) for i, part in enumerate(parts)]

    def detail(self) -> dict[str, Any]:
        """The account of it in a report."""
        found: dict[str, Any] = {
            "steps": self.steps,
            "seconds": round(self.seconds, 2),
            "stopped": self.stopped,
        }
        curves = {"loss": [[step, round(loss, 6)] for step, loss in self.curve()]}
        if self.metric:
            found |= {"metric": self.metric, "before": self.before, "after": self.after}
            measured = [[item.step, item.metric] for item in self.epochs if item.metric is not None]
            start = [[0, self.before]] if self.before is not None else []
            # A metric named "loss" is that of the validation data.
            curves["validation loss" if self.metric == "loss" else self.metric] = start + measured
        if self.best_epoch is not None:
            found["best_epoch"] = self.best_epoch
        if self.resumed_at:
            found["resumed_at"] = self.resumed_at
        return {**found, "curves": curves}

    def summary(self) -> str:
        """One sentence."""
        if not self.losses:
            return "no step was made"
        curve = self.curve(20)
        text = (
            f"{self.steps} steps in {self.seconds:.0f} s{self._taken_up()}, loss {curve[0][1]:.4g} → {curve[-1][1]:.4g}"
        )
        if self.metric and self.after is not None:
            before = f"{self.before:.4g} → " if self.before is not None else ""
            text += f", {self.metric} {before}{self.after:.4g}"
        if self.stopped != "completed":
            text += f"; stopped early: {self.stopped}"
        if self.best_epoch is not None:
            text += f"; weights of epoch {self.best_epoch}"
        return text

    def _taken_up(self) -> str:
        if not self.resumed_at:
            return ""
        what = "all of them" if self.resumed_at == self.steps else f"the first {self.resumed_at}"
        return f" ({what} taken from a checkpoint)"

    def to_json(self) -> dict[str, Any]:
        """For a checkpoint; the losses are kept apart, as a tensor."""
        return {**asdict(self), "losses": []}

    @classmethod
    def from_json(cls, told: dict[str, Any], losses: list[float]) -> History:
        """Back from :meth:`to_json`."""
        epochs = [Epoch(**item) for item in told["epochs"]]
        return cls(**{**told, "epochs": epochs, "losses": losses})
