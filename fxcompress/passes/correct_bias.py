"""Bias correction: the mean error that quantization puts on each channel goes into the bias."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx

from fxcompress.errors import OptionError
from fxcompress.passes.base import Numerics, Pass, PassContext, PassResult, Rewrite, Skip
from fxcompress.quantization.account import repair_details
from fxcompress.quantization.repair import repair, repairable

__all__ = ["CorrectBias"]


@dataclass(frozen=True)
class CorrectBias(Pass):
    """b' = b + E[y − ŷ] for each channel of each quantized layer, from data (Nagel et al. 2019, arXiv:1906.04721).

    y is the layer's output with all stubs of the graph switched off, ŷ with all of them on and the biases before it
    corrected. Needs no batch norm. Run it after ``Quantize`` or ``Calibrate``.

    Attributes:
        data: batches for calibration: what the model takes, or that and labels.
        samples: how many to read at most; the activations of all of them lie in memory at one place of the graph.
    """

    name: ClassVar[str] = "correct_bias"
    numerics: ClassVar[Numerics] = Numerics.LOSSY
    data: Iterable[Any]
    samples: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.samples < 1:
            raise OptionError(f"samples={self.samples} is below 1", where="samples")

    def run(self, graph_module: fx.GraphModule, context: PassContext) -> PassResult:
        """One walk over the graph; each layer is corrected before the next one is looked at."""
        paths, left = repairable(graph_module)
        skipped = [Skip(path, code, f"{reason}.") for path, (code, reason) in left.items()]
        if not paths:
            reason = "no layer is quantized and can be corrected: run Quantize first."
            return PassResult(graph_module, (), (*skipped, Skip("all", "nothing_to_correct", reason)))
        found = repair(graph_module, self.data, paths, samples=self.samples, progress=context.progress)
        rewrites = [Rewrite(path, "bias moved", repair_details(item)) for path, item in found.items()]
        return PassResult(graph_module, tuple(rewrites), tuple(skipped))
