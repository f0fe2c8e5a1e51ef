"""AdaRound: which weights are rounded up and which down is learned from data, one layer after the other."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx

from fxcompress.errors import OptionError
from fxcompress.passes.base import Numerics, Pass, PassContext, PassResult, Rewrite, Skip
from fxcompress.quantization.account import repair_details
from fxcompress.quantization.repair import Rounding, repair, repairable

__all__ = ["RoundAdaptively"]


@dataclass(frozen=True)
class RoundAdaptively(Pass):
    """Learn the rounding of the weights of quantized layers (AdaRound, Nagel et al. 2020, arXiv:2004.10568).

    Each layer is fitted to its output in floating point, given what it reads after the layers before it were fitted;
    then the mean error that is left goes into its bias. The weights that result lie on their grid: engines hold exactly
    these integers. It gains most with 4-bit weights. Run it after ``Quantize`` or ``Calibrate``.

    Attributes:
        data: batches for calibration: what the model takes, or that and labels.
        samples: how many to read at most; the activations of all of them lie in memory at one place of the graph.
        iterations: steps for each layer.
        rows: positions (patches of a convolution, tokens) that are drawn from the samples for each layer.
        batch: of them in each step.
    """

    name: ClassVar[str] = "round_adaptively"
    numerics: ClassVar[Numerics] = Numerics.LOSSY
    data: Iterable[Any]
    samples: int = 128
    iterations: int = 1000
    rows: int = 4096
    batch: int = 256

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("samples", "iterations", "rows", "batch"):
            if getattr(self, name) < 1:
                raise OptionError(f"{name}={getattr(self, name)} is below 1", where=name)

    def run(self, graph_module: fx.GraphModule, context: PassContext) -> PassResult:
        """One walk over the graph; each layer is fitted before the next one is looked at."""
        paths, left = repairable(graph_module)
        skipped = [Skip(path, code, f"{reason}.") for path, (code, reason) in left.items()]
        if not paths:
            reason = "no layer is quantized and can be fitted: run Quantize first."
            return PassResult(graph_module, (), (*skipped, Skip("all", "nothing_to_round", reason)))
        rounding = Rounding(self.iterations, self.rows, self.batch, context.seed)
        found = repair(
            graph_module, self.data, paths, samples=self.samples, rounding=rounding, progress=context.progress
        )
        rewrites = [Rewrite(path, "rounding learned", repair_details(item)) for path, item in found.items()]
        return PassResult(graph_module, tuple(rewrites), tuple(skipped))
