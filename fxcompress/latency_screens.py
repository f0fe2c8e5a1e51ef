"""What the command line shows of measurements: latencies and memory side by side, and a bundle that was verified."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.text import Text

from fxcompress.deployment import Verified
from fxcompress.footprint import Footprint
from fxcompress.latency import Race
from fxcompress.reporting.figures import size
from fxcompress.screens import pairs, table

__all__ = ["latency_json", "latency_screen", "verified_screen"]


def latency_screen(race: Race, memory: Mapping[str, Footprint], console: Console) -> None:
    """Latencies of all candidates, their ratio to the first, and their memory where it was measured."""
    shown = table("candidate", "", ">median ms", ">p95 ms", ">ratio", "95% interval")
    for index, (t, item) in enumerate(zip(race.result.timings, race.candidates, strict=True)):
        ratio = f"{t.ratio:.3f}" if index else "1"
        interval = f"{t.ratio_low:.3f} to {t.ratio_high:.3f}" if index else ""
        shown.add_row(item.name, item.kind, f"{t.median_ms:.3f}", f"{t.p95_ms:.3f}", ratio, interval)
    console.print(shown)
    result = race.result
    turns = f" of each, in {result.rounds} turns with {result.warmup} more before each"
    console.print(
        f"{result.repetitions} calls{turns if result.rounds > 1 else f' after {result.warmup} to warm up'}, "
        f"batch {race.batch}, {result.threads} thread{'s' * (result.threads != 1)}"
        f"{'; a ratio below 1 is faster than the first' * (len(race.candidates) > 1)}"
    )
    if memory:
        _memory_screen(memory, console)


def _memory_screen(memory: Mapping[str, Footprint], console: Console) -> None:
    shown = table("candidate", ">memory", ">at most", ">whole process")
    for name, found in memory.items():
        taken = (found.resident, found.peak, found.process)
        shown.add_row(name, *("?" if part is None else size(part) for part in taken))
    console.print(shown)
    console.print(
        "memory that a process of its own grew by, to open the candidate and call it: its library is in it, "
        "PyTorch is not; whole process: at most, Python and PyTorch included"
    )
    for name, found in memory.items():
        if found.problem:
            console.print(f"{name}: memory not measured: {found.problem}", soft_wrap=True)


def latency_json(race: Race, memory: Mapping[str, Footprint]) -> dict[str, Any]:
    """The same as JSON values."""
    facts = {"batch": race.batch, "kinds": {item.name: item.kind for item in race.candidates}}
    return race.result.to_dict() | facts | {"memory": {name: vars(found) for name, found in memory.items()}}


def verified_screen(path: str, found: Verified, console: Console) -> None:
    """What a check of a bundle found."""
    facts, t = table(show_header=False), found.latency.timings[0]
    facts.add_row("files", f"{len(found.manifest.files)}, every hash as its manifest says")
    facts.add_row("inputs", ", ".join(map(str, found.input_shapes)))
    facts.add_row("relative error", f"{pairs(found.errors)}; {found.tolerance:g} is allowed")
    facts.add_row("latency", f"median {t.median_ms:.3f} ms, p95 {t.p95_ms:.3f} ms, {found.latency.repetitions} calls")
    console.print(Text.assemble((path, "bold"), f"  {found.manifest.backend} engine, verified"))
    console.print(facts)
