"""How much shall go: a ratio, or as little as reaches a target, in one step or several."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import fx

from fxcompress.analysis.cost import cost
from fxcompress.errors import OptionError, PreconditionError
from fxcompress.graph.copying import copy_graph
from fxcompress.passes.base import PassContext
from fxcompress.passes.pruning.plan import Plan
from fxcompress.passes.pruning.remove import remove
from fxcompress.passes.pruning.select import Piece
from fxcompress.passes.pruning.target import reach, refill

__all__ = ["Goal", "goal_of"]

Classes = NDArray[np.int64]

_DEFAULT_RATIO = 0.5
_LATENCY_TRIES = 7  # each builds an engine


class Amount(Protocol):
    """The options of a pass that say how much shall go; at most one is given."""

    @property
    def ratio(self) -> float | None: ...
    @property
    def parameters(self) -> float | int | None: ...
    @property
    def macs(self) -> float | int | None: ...
    @property
    def latency_ms(self) -> float | None: ...
    @property
    def speedup(self) -> float | None: ...
    @property
    def backend(self) -> str: ...


@dataclass(frozen=True)
class Goal:
    """A ratio, or a target of a measure.

    Attributes:
        ratio: share of the original channels to remove; with a target, none.
        measure: of a graph, and ``what`` it measures, with the unit.
        start: the measure now.
        target: what shall be left of it.
        tries: measurements of the search for a ratio.
        cheap: single channels are given back after that, with a measurement for each few.
    """

    ratio: float | None = None
    measure: Callable[[fx.GraphModule], float] | None = None
    what: str = ""
    start: float = 0.0
    target: float = 0.0
    tries: int = 12
    cheap: bool = True

    def classes(
        self,
        graph_module: fx.GraphModule,
        plan: Plan,
        at: Callable[[float], Classes],
        given_back: Callable[[Classes], Sequence[Piece]],
        share: float,
    ) -> Classes:
        """What goes so that ``share`` of the way is done.

        Args:
            graph_module: the graph as it is.
            plan: its dependencies.
            at: the classes for a ratio.
            given_back: parts of classes, those first that shall stay where a target leaves room.
            share: in (0, 1]; below 1 in all but the last of several steps.

        Raises:
            PreconditionError: the target cannot be reached.
        """
        if self.measure is None:
            assert self.ratio is not None
            return at(self.ratio * share)
        measure = self.measure

        def left(classes: Classes) -> float:
            copied = copy_graph(graph_module)
            if classes.size:
                remove(copied, plan.on(copied), classes)
            return measure(copied)

        target = self.start - (self.start - self.target) * share
        gone = reach(at, left, target, what=self.what, tries=self.tries)
        if not self.cheap:
            return gone
        return refill(gone, given_back(gone), left, target)

    def refuse_whole(self) -> None:
        """Say that a target is out of reach where nothing can go.

        Raises:
            PreconditionError: there is a target.
        """
        if self.measure is not None:
            raise PreconditionError(
                f"the target of {self.target:,.6g} {self.what} cannot be reached: no channels of this graph can be "
                f"removed, and {self.start:,.6g} remain",
                remedy="run with ratio=0.5 instead of a target to see in the report why each layer stays",
            )


def goal_of(amount: Amount, graph_module: fx.GraphModule, context: PassContext) -> Goal:
    """The goal that the options name.

    Raises:
        OptionError: the target is not below what the graph has now.
        PreconditionError: latency cannot be measured here.
    """
    for name in ("parameters", "macs"):
        wanted = getattr(amount, name)
        if wanted is not None:
            measure = _parameters if name == "parameters" else _macs
            start = measure(graph_module)
            target = wanted * start if wanted < 1 else float(wanted)
            if target >= start:
                raise OptionError(f"{name}={wanted} is no less than the {start:,.0f} there are", where=name)
            return Goal(None, measure, "MACs" if name == "macs" else name, start, target)
    if amount.latency_ms is None and amount.speedup is None:
        return Goal(_DEFAULT_RATIO if amount.ratio is None else amount.ratio)
    if context.latency is None:
        raise PreconditionError(
            "latency can only be measured inside compile(), with example inputs",
            where="latency_ms" if amount.latency_ms is not None else "speedup",
            remedy="use fxcompress.compile(model, passes=[...], example_inputs=...), or a target of macs",
        )
    latency = context.latency
    start = latency(graph_module, amount.backend)
    target = amount.latency_ms if amount.latency_ms is not None else start / (amount.speedup or 1.0)
    if target >= start:
        raise OptionError(f"latency_ms={target:g} is no less than the {start:.3g} ms it takes now", where="latency_ms")
    what = f"ms on {amount.backend}"
    return Goal(None, lambda graph: latency(graph, amount.backend), what, start, target, _LATENCY_TRIES, cheap=False)


def _parameters(graph_module: fx.GraphModule) -> float:
    return float(cost(graph_module).parameters)


def _macs(graph_module: fx.GraphModule) -> float:
    return float(cost(graph_module).macs or 0)
