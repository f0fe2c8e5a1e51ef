"""Passes in rounds: take a little away, recover, and again, until enough is gone or too much is lost."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

from torch import fx

from fxcompress.analysis.cost import Cost, cost
from fxcompress.analysis.sparsity import sparsity
from fxcompress.errors import OptionError, nearest
from fxcompress.graph.batches import batches
from fxcompress.passes.base import Numerics, Pass, PassContext, PassResult, Rewrite, Skip
from fxcompress.passes.manager import PassManager
from fxcompress.passes.registry import as_pass
from fxcompress.training.masks import cubic
from fxcompress.training.metrics import METRICS, Metric, evaluate, higher_is_better

__all__ = ["Iterate", "Round"]

_TARGETS = ("parameters", "macs", "bytes", "sparsity", "drop")
_RAMPS = {
    "linear": lambda value, step, steps: value * step / steps,
    "cubic": lambda value, step, steps: value * cubic(step / steps),
    # An equal share of what is left at every step, counted from the start: 0.75 in two steps is 0.5, 0.75.
    "geometric": lambda value, step, steps: 1 - (1 - value) ** (step / steps),
    # The same where an option counts from what is left: 0.75 in two steps is 0.5, 0.5.
    "compound": lambda value, step, steps: 1 - (1 - value) ** (1 / steps),
}


@dataclass(frozen=True)
class Round:
    """What is known after a round.

    Attributes:
        number: from 1 on.
        graph_module: as the round left it.
        cost: of it, and ``start``, before the first round.
        sparsity: share of zeros in its layers.
        metric: on the validation data, and ``metric_at_start``; None without.
    """

    number: int
    graph_module: fx.GraphModule
    cost: Cost
    start: Cost
    sparsity: float
    metric: float | None
    metric_at_start: float | None


@dataclass(frozen=True)
class Iterate(Pass):
    """Run ``passes`` again and again.

    Attributes:
        passes: of every round, in order: instances, names, or ``{name: {option: value}}``.
        steps: most rounds.
        until: stop after the round that reaches this: ``{"macs": 0.5}``, ``parameters`` or ``bytes`` left (a share of
            the start below 1, else a number), ``sparsity`` of the weights; or a function of a :class:`Round` that says
            so. ``{"drop": 0.5}`` stops when the metric has become worse by more than this, and goes back to the round
            before.
        schedule: option of an inner pass → its value in each round. A tuple lists the values; ``linear``, ``cubic``
            and ``geometric`` lead to the value that the pass has; ``compound`` takes away an equal share of what is
            left, so that all rounds together come to that value: ``{"ratio": "compound", "sparsity": "cubic"}``.
        validation: batches for the metric, or a function ``(module) -> figure``.
        metric: ``accuracy``, ``top5``, ``loss``, ``mse``, ``cosine``, or a function ``(outputs, batch) -> mean``.
        better: ``higher`` or ``lower``, where the metric has no name that tells.
    """

    name: ClassVar[str] = "iterate"
    numerics: ClassVar[Numerics] = Numerics.LOSSY
    passes: tuple[Pass, ...]
    steps: int = 3
    until: Mapping[str, float] | Callable[[Round], bool] | None = None
    schedule: Mapping[str, str | tuple[float, ...]] = field(default_factory=dict)
    validation: Iterable[Any] | Callable[[Any], float] | None = None
    metric: str | Metric = "accuracy"
    better: str | None = None

    def __post_init__(self) -> None:
        given = [self.passes] if isinstance(self.passes, (str, Mapping, Pass)) else self.passes
        object.__setattr__(self, "passes", tuple(as_pass(item) for item in given))
        values = {key: tuple(v) if isinstance(v, list) else v for key, v in self.schedule.items()}
        object.__setattr__(self, "schedule", values)
        super().__post_init__()
        if not self.passes:
            raise OptionError("there is no pass to repeat", where="passes", remedy="give passes=[...]")
        if self.steps < 1:
            raise OptionError(f"steps={self.steps} is below 1", where="steps")
        if isinstance(self.metric, str) and self.metric not in METRICS:
            raise OptionError(
                f"metric={self.metric!r} is unknown", where="metric", remedy=nearest(self.metric, METRICS)
            )
        if self.better not in (None, "higher", "lower"):
            raise OptionError(f"better={self.better!r} is unknown", where="better", remedy="'higher' or 'lower'")
        if self.metric != "accuracy" and (self.validation is None or callable(self.validation)):
            where = "nothing to measure on" if self.validation is None else "validation is a function of its own"
            raise OptionError(f"metric={self.metric!r} would do nothing: {where}", where="metric")
        self._check_until()
        for option, values_of in self.schedule.items():
            self._check_ramp(option, values_of)

    def _check_until(self) -> None:
        if not isinstance(self.until, Mapping):
            return
        for name, value in self.until.items():
            if name not in _TARGETS:
                raise OptionError(f"there is no target {name!r}", where="until", remedy=nearest(name, _TARGETS))
            if not value > 0:
                raise OptionError(f"the target {name}={value} is not above 0", where="until")
        if "drop" in self.until:
            if self.validation is None:
                raise OptionError("a drop needs data for the metric", where="validation", remedy="give validation=")
            told = self.validation if callable(self.validation) else self.metric
            higher_is_better(told, self.better)  # type: ignore[arg-type]

    def _check_ramp(self, option: str, values: str | tuple[float, ...]) -> None:
        known = {item.name for pass_ in self.passes for item in dataclasses.fields(pass_)}
        if option not in known:
            raise OptionError(f"no pass here has an option {option!r}", where="schedule", remedy=nearest(option, known))
        if isinstance(values, str):
            if values not in _RAMPS:
                raise OptionError(f"there is no ramp {values!r}", where="schedule", remedy=nearest(values, _RAMPS))
            held = [getattr(pass_, option, None) for pass_ in self.passes]
            if not any(isinstance(value, (int, float)) for value in held):
                raise OptionError(f"no pass has a number as {option!r} to lead to", where="schedule")
        elif len(values) != self.steps:
            raise OptionError(
                f"{option!r} has {len(values)} values for {self.steps} steps", where="schedule", remedy="give one each"
            )

    def run(self, graph_module: fx.GraphModule, context: PassContext) -> PassResult:
        """Round after round, each on the result of the one before."""
        start, at_start = cost(graph_module), self._measure(graph_module)
        current, records, rewrites = graph_module, [], []
        skipped: dict[tuple[str, str], Skip] = {}
        points = [(0, start.parameters, sparsity(graph_module).share, at_start)]
        why = f"all {self.steps} rounds"
        if self.until is not None and set(self.until if isinstance(self.until, Mapping) else ("",)) - {"drop"}:
            why += ", the target was not reached"
        for number in range(1, self.steps + 1):
            found = PassManager(self._passes_of(number), prove=context.prove).run(current, context)
            records += [(number, record) for record in found.records]
            skipped |= {(skip.site, skip.code): skip for record in found.records for skip in record.result.skipped}
            if not any(record.result.changed for record in found.records):
                why = f"round {number} changed nothing"
                break
            metric = self._measure(found.graph_module)
            told = Round(
                number,
                found.graph_module,
                cost(found.graph_module),
                start,
                sparsity(found.graph_module).share,
                metric,
                at_start,
            )
            points.append((number, told.cost.parameters, told.sparsity, metric))
            if self._dropped(told):
                why = f"round {number} lost too much ({at_start:.4g} → {metric:.4g}) and was undone"
                rewrites.append(_rewrite(told, kept=False))
                break
            current = found.graph_module
            rewrites.append(_rewrite(told, kept=True))
            if self._reached(told):
                why = f"the target was reached in round {number}"
                break
        if rewrites:
            rewrites[-1] = replace(rewrites[-1], detail={**rewrites[-1].detail, "curves": self._curves(points)})
        kept = [item for item in rewrites if item.detail["kept_round"]]
        note = f"{len(kept)} rounds: {why}"
        left = tuple(skipped.values())
        if not kept:
            left = (*left, Skip("all", "no_round_kept", f"{why}."))
            return PassResult(graph_module, (), left, note, tuple(records))
        return PassResult(current, tuple(rewrites), left, note, tuple(records))

    def _passes_of(self, number: int) -> list[Pass]:
        """The passes of a round, with the values that options have in it, and checkpoints of their own."""
        made: list[Pass] = []
        for pass_ in self.passes:
            own: dict[str, Any] = {}
            for option, ramp in self.schedule.items():
                value = getattr(pass_, option, None)
                if isinstance(ramp, tuple) and hasattr(pass_, option):
                    own[option] = ramp[number - 1]
                elif isinstance(ramp, str) and isinstance(value, (int, float)):
                    own[option] = _RAMPS[ramp](value, number, self.steps)
            checkpoint = getattr(pass_, "checkpoint", None)
            if checkpoint is not None:
                own["checkpoint"] = Path(checkpoint) / f"round-{number}"
            made.append(replace(pass_, **own) if own else pass_)
        return made

    def _curves(self, points: list[tuple[int, int, float, float | None]]) -> dict[str, list[list[float]]]:
        """Over the rounds, what changed."""
        name = self.metric if isinstance(self.metric, str) and not callable(self.validation) else "metric"
        told: dict[str, list[list[float]]] = {
            "parameters": [[number, count] for number, count, _, _ in points],
            "sparsity": [[number, share] for number, _, share, _ in points],
            name: [[number, metric] for number, _, _, metric in points if metric is not None],
        }
        return {key: curve for key, curve in told.items() if len({value for _, value in curve}) > 1}

    def _measure(self, graph_module: fx.GraphModule) -> float | None:
        if self.validation is None:
            return None
        if callable(self.validation):
            return float(self.validation(graph_module))
        return evaluate(graph_module, batches(graph_module, self.validation), self.metric)

    def _dropped(self, told: Round) -> bool:
        if not isinstance(self.until, Mapping) or "drop" not in self.until:
            return False
        assert told.metric is not None and told.metric_at_start is not None
        higher = higher_is_better(self.validation if callable(self.validation) else self.metric, self.better)  # type: ignore[arg-type]
        lost = told.metric_at_start - told.metric if higher else told.metric - told.metric_at_start
        return not lost <= self.until["drop"]  # NaN is a loss too

    def _reached(self, told: Round) -> bool:
        if self.until is None:
            return False
        if not isinstance(self.until, Mapping):
            return bool(self.until(told))
        targets = {name: value for name, value in self.until.items() if name != "drop"}
        for name, value in targets.items():
            if name == "sparsity":
                if told.sparsity < value:
                    return False
                continue
            now, then = getattr(told.cost, name) or 0, getattr(told.start, name) or 0
            if now > (value * then if value < 1 else value):
                return False
        return bool(targets)


def _rewrite(told: Round, *, kept: bool) -> Rewrite:
    detail: dict[str, Any] = {
        "kept_round": kept,
        "parameters": told.cost.parameters,
        "macs": told.cost.macs,
        "bytes": told.cost.bytes,
        "sparsity": told.sparsity,
    }
    if told.metric is not None:
        detail["metric"] = told.metric
    return Rewrite(f"round {told.number}", "kept" if kept else "undone", detail)
