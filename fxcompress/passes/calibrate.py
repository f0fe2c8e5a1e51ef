"""Grids for quantization stubs, from data."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import fx

from fxcompress.errors import OptionError
from fxcompress.graph.batches import check_limit
from fxcompress.passes.base import Numerics, Pass, PassContext, PassResult, Rewrite
from fxcompress.quantization.account import described
from fxcompress.quantization.calibrate import calibrate
from fxcompress.quantization.observers import check_observer

__all__ = ["Calibrate"]


@dataclass(frozen=True)
class Calibrate(Pass):
    """Run the model on data and give every stub its scale and zero point. Running it again starts anew.

    Each batch costs little more than running the model on it. The observer ``damage`` besides runs the first 32 samples
    there and back, once; the report says how long both took.

    Attributes:
        data: batches: what the model takes, or that and labels.
        observer: of activations: ``minmax``, ``moving_average``, ``percentile``, ``mse``, ``histogram``, ``entropy``;
            ``damage`` takes for each the one that moves the outputs least, told once by gradients on 32 samples.
        weights: observer of weights: ``minmax`` or ``mse``.
        percentile: share of values that ``percentile`` covers.
        batches: how many to read at most; None reads all.
    """

    name: ClassVar[str] = "calibrate"
    numerics: ClassVar[Numerics] = Numerics.LOSSY
    data: Iterable[Any]
    observer: str = "damage"
    weights: Literal["minmax", "mse"] = "minmax"
    percentile: float = 99.99
    batches: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_limit(self.batches)
        check_observer(self.observer)
        if not 50 < self.percentile <= 100:
            raise OptionError(f"percentile={self.percentile} is outside (50, 100]", where="percentile")

    def run(self, graph_module: fx.GraphModule, context: PassContext) -> PassResult:
        """One pass over the data, then the grids."""
        made = calibrate(
            graph_module,
            self.data,
            observer=self.observer,
            weight_observer=self.weights,
            percentile=self.percentile,
            limit=self.batches,
            progress=context.progress,
        )
        rewrites = [
            Rewrite(grid.path, f"[{grid.low:.4g}, {grid.high:.4g}], scale {grid.scale:.4g}", described(grid))
            for grid in made.grids
        ]
        return PassResult(graph_module, tuple(rewrites), (), str(made))
