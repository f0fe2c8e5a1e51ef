"""Zeros that stay zero while a graph trains, and zeros that come step by step."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch

from fxcompress.analysis.sparsity import masks
from fxcompress.errors import PreconditionError
from fxcompress.training.hooks import Hook, Run

__all__ = ["GradualMasks", "HoldMasks", "cubic"]

_CHOICES = 10  # of a ramp, at least


class HoldMasks(Hook):
    """Weights that were made sparse keep their zeros: whatever an optimizer does to them is undone after its step."""

    name = "hold_masks"

    def __init__(self) -> None:
        self._weights: list[torch.Tensor] = []
        self._masks: list[torch.Tensor] = []

    def start(self, run: Run) -> None:
        """Read the masks: where the weights that were made sparse are not zero."""
        self.hold(run, masks(run.graph_module))

    def hold(self, run: Run, kept: Mapping[str, torch.Tensor]) -> None:
        """From now on, zeros where these are False: path of a weight → bool, of its shape."""
        weights = dict(run.graph_module.named_parameters(remove_duplicate=False))
        self._weights = [weights[path].data for path in kept]
        self._masks = [mask.to(weights[path].dtype) for path, mask in kept.items()]
        self._apply()

    def after_step(self, run: Run) -> None:
        self._apply()

    def finish(self, run: Run) -> None:
        self._apply()

    def _apply(self) -> None:
        if self._weights:
            torch._foreach_mul_(self._weights, self._masks)


class GradualMasks(HoldMasks):
    """Masks that grow while the graph trains (Zhu & Gupta 2017).

    Args:
        choose: the masks of a graph at a share of the way, in [0, 1]; more of the way keeps the zeros of less.
        every: most optimizer steps between two choices; at least ten are made where the ramp has as many steps.
        begin: share of the run after which the first weights go.
        end: share after which no more go.
    """

    name = "gradual_masks"

    def __init__(
        self, choose: Callable[[float], Mapping[str, torch.Tensor]], *, every: int, begin: float, end: float
    ) -> None:
        super().__init__()
        self._choose, self._every, self._begin, self._end = choose, every, begin, end
        self._pace, self._last = every, 0

    def start(self, run: Run) -> None:
        """Find the pace; a run that resumes is where it was.

        Raises:
            PreconditionError: nobody knows how long the run is.
        """
        if run.total is None:
            raise PreconditionError(
                "the data has no length, so that nobody knows when the zeros are to come",
                where="training",
                remedy="give the training steps=",
            )
        begin, self._last = self._begin * run.total, math.ceil(self._end * run.total)
        self._pace = max(1, min(self._every, int((self._last - begin) / _CHOICES)))
        if run.step:  # what was chosen last is zero in the checkpoint, and goes first
            past = run.step >= self._last
            self._choose_at(run, self._last if past else run.step // self._pace * self._pace)

    def after_step(self, run: Run) -> None:
        if run.step == self._last or (run.step < self._last and run.step % self._pace == 0):
            self._choose_at(run, run.step)
        else:
            self._apply()

    def finish(self, run: Run) -> None:
        """The end of the way, whatever weights the run ends with."""
        self.hold(run, self._choose(1.0))

    def _choose_at(self, run: Run, step: int) -> None:
        assert run.total is not None
        begin, end = self._begin * run.total, self._end * run.total
        if step >= begin:
            self.hold(run, self._choose(min(1.0, (step - begin) / max(end - begin, 1.0))))


def cubic(way: float) -> float:
    """The share of the final sparsity at a share of the way: 1 − (1 − t)³, fast while there is much to spare."""
    return 1 - (1 - way) ** 3
