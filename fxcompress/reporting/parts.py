"""The parts of a report: capture, one pass, the engine, its latency."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from fxcompress.analysis.cost import Cost
from fxcompress.passes.base import Rewrite, Skip
from fxcompress.reporting.integers import IntegerShare
from fxcompress.reporting.values import from_json, to_json

__all__ = ["Bar", "CaptureReport", "Curve", "EngineReport", "Latency", "PassReport"]


@dataclass
class CaptureReport:
    """How the model became a graph.

    Attributes:
        seconds: run time of capture.
        nodes: number of nodes of the graph.
        errors: relative error against the model, by the sizes compared: ``{"batch=2": 0.0, "batch=1": 0.0}``.
        notes: what could not be carried over or compared, and why.
    """

    seconds: float = 0.0
    nodes: int = 0
    errors: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


@dataclass
class Bar:
    """One line of a bar chart: a figure before and after a pass, such as the width of a layer."""

    label: str
    before: float
    after: float


@dataclass
class Curve:
    """A line of a chart: ``(step, value)``, such as the loss of a run of training."""

    name: str
    points: list[tuple[float, float]]


@dataclass
class PassReport:
    """What one pass did.

    Attributes:
        name: ``fuse_modules``.
        text: the pass with the options that differ from its defaults: ``prune_channels(ratio=0.5)``.
        options: all of its options.
        numerics: ``exact``, ``reassociated`` or ``lossy``.
        seconds: run time of the pass alone.
        rewrites: the sites it changed; each ``detail`` is a dict of plain values.
        skipped: the sites it looked at and left, with the reasons.
        before: what the graph cost before it.
        after: what the graph cost after it.
        error: relative error of the outputs against those before the pass; None if it was not measured.
        tolerance: what ``error`` had to stay within; None where any was allowed.
        note: one sentence more, or nothing.
        widths: channels of each layer that the pass resized, in the order of the graph.
        nonzeros: weights that are not zero in each layer that the pass made sparse, likewise.
        steps: what the passes did that this one ran, in order.
        curves: loss and metric over the steps of a pass that trains.
    """

    name: str
    text: str
    options: dict[str, Any]
    numerics: str
    seconds: float
    rewrites: list[Rewrite]
    skipped: list[Skip]
    before: Cost
    after: Cost
    error: float | None = None
    tolerance: float | None = None
    note: str = ""
    widths: list[Bar] = field(default_factory=list)
    nonzeros: list[Bar] = field(default_factory=list)
    steps: list[PassReport] = field(default_factory=list)
    curves: list[Curve] = field(default_factory=list)

    @classmethod
    def from_record(cls, record: Any) -> PassReport:
        """The account of a pass manager's ``PassRecord``, or of anything with the same attributes."""
        pass_, result = record.pass_, record.result
        return cls(
            name=pass_.name,
            text=str(pass_),
            options=dict(pass_.options),
            numerics=getattr(pass_.numerics, "value", str(pass_.numerics)),
            seconds=record.seconds,
            rewrites=[
                Rewrite(item.site, item.result, from_json(to_json(dict(item.detail)))) for item in result.rewrites
            ],
            skipped=list(result.skipped),
            before=record.before,
            after=record.after,
            error=record.error,
            tolerance=record.tolerance,
            note=result.note,
            widths=_bars(result.rewrites, "widths"),
            nonzeros=_bars(result.rewrites, "nonzeros"),
            curves=_curves(result.rewrites),
            steps=[_step(number, inner) for number, inner in getattr(result, "records", ())],
        )


def _step(number: int, record: Any) -> PassReport:
    made = PassReport.from_record(record)
    made.text = f"round {number}: {made.text}"
    return made


def _bars(rewrites: Iterable[Rewrite], key: str) -> list[Bar]:
    """From rewrites whose detail has ``key``: layer → before and after."""
    told = {layer: pair for item in rewrites for layer, pair in item.detail.get(key, {}).items()}
    return [Bar(layer, before, after) for layer, (before, after) in told.items()]


def _curves(rewrites: Iterable[Rewrite]) -> list[Curve]:
    """From rewrites whose detail has ``"curves"``: name → points."""
    return [
        Curve(name, [(float(x), float(y)) for x, y in points])
        for item in rewrites
        for name, points in item.detail.get("curves", {}).items()
    ]


@dataclass
class Latency:
    """Milliseconds per call of one candidate, such as the engine or the eager model.

    Attributes:
        name: of the candidate.
        median_ms: half of the calls were faster.
        p95_ms: 95% of the calls were faster.
        batch: size of the batch of each call.
    """

    name: str
    median_ms: float
    p95_ms: float
    batch: int | None = None


@dataclass
class EngineReport:
    """The engine that a backend built.

    Attributes:
        backend: its name.
        path: directory of the bundle.
        size_bytes: of all files of the bundle but its manifest and its reference data.
        options: of the backend.
        errors: relative error against PyTorch, by output.
        tolerance: what each of them had to stay within.
        verified: the sizes at which engine and PyTorch were compared: ``["x[2, 3, 8, 8]", "x[3, 3, 8, 8]"]``.
        unverified: why they were not, or nothing.
        latency: what was measured, the engine first; empty if nothing was.
        integers: what of a quantized model runs in integers; None where nothing was quantized, or no engine tells.
        notes: what else to know of it, a sentence each.
    """

    backend: str
    path: str
    size_bytes: int
    options: dict[str, Any] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    tolerance: float | None = None
    verified: list[str] = field(default_factory=list)
    unverified: str = ""
    latency: list[Latency] = field(default_factory=list)
    integers: IntegerShare | None = None
    notes: list[str] = field(default_factory=list)

    @classmethod
    def from_engine(cls, engine: Any, passes: Iterable[PassReport] = ()) -> EngineReport:
        """The account of an engine, from its manifest; ``passes`` tell why layers were left in floating point."""
        manifest = engine.manifest
        found: Mapping[str, Any] = manifest.measurements.get("verification") or {}
        names = [spec.name for spec in manifest.inputs]
        sets = found.get("input_shapes", [])
        integers = manifest.measurements.get("integer_share")
        unverified = str(found.get("skipped", "" if found else "no example inputs, or verify=False"))
        return cls(
            backend=str(manifest.backend),
            path=str(engine.path),
            size_bytes=sum(f.bytes for name, f in manifest.files.items() if not name.startswith("reference.")),
            options=dict(manifest.options),
            errors={name: float(error) for name, error in found.get("relative_error", {}).items()},
            tolerance=found.get("tolerance"),
            verified=[", ".join(f"{n}{list(s)}" for n, s in zip(names, shapes, strict=False)) for shapes in sets],
            unverified=unverified,
            integers=IntegerShare.of(integers, (s for item in passes for s in item.skipped)) if integers else None,
            notes=[str(note) for note in manifest.measurements.get("notes", [])],
        )

    def add_timings(self, result: Any, *, batch: int | None = None) -> None:
        """Take over what ``engine.benchmark(...)`` returned.

        Args:
            result: has ``timings``, each with ``name``, ``median_ms`` and ``p95_ms``.
            batch: size of the batch that was measured.
        """
        self.latency += [Latency(t.name, t.median_ms, t.p95_ms, batch) for t in result.timings]
