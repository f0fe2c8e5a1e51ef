"""A report for the terminal, and the same as plain text."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias

from rich import box
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from fxcompress.analysis.cost import Cost
from fxcompress.reporting.figures import change, count, duration, error, grouped_skips, size, times_faster
from fxcompress.reporting.integers import IntegerShare
from fxcompress.reporting.model import Report
from fxcompress.reporting.noise import noise_lines
from fxcompress.reporting.parts import EngineReport, PassReport

__all__ = ["format_report", "print_report"]

_NOISY = 8  # layers that are shown
_LOUD = 15  # decibels: more than a sixth of the signal is noise
_Column: TypeAlias = tuple[str, str, Callable[[float | None], str]]
_COLUMNS: tuple[_Column, ...] = (
    ("params", "parameters", count),
    ("MACs", "macs", count),
    ("weights", "engine_bytes", size),
    ("activations", "activation_peak_bytes", size),
)


def print_report(report: Report, console: Console | None = None) -> None:
    """Print a report: what each pass did, what was left and why, and the engine.

    Args:
        report: of a compilation.
        console: where to; standard output if None.
    """
    console = console if console is not None else Console()
    for part in _parts(report, console.width):
        console.print(part)


def format_report(report: Report, width: int = 120) -> str:
    """The same as plain text without colours, ``width`` characters wide."""
    stream = io.StringIO()
    console = Console(file=stream, width=width, color_system=None, force_terminal=False, legacy_windows=False)
    print_report(report, console)
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines()).rstrip()


def _parts(report: Report, width: int) -> Iterator[RenderableType]:
    yield _heading(report)
    if report.passes:
        yield _passes(report, width)
        yield from _sentences(report)
        yield from _storage(report)
        yield from _noise(report)
    skips = _skips(report)
    if skips is not None:
        yield skips
    if report.engine is not None:
        yield _engine(report.engine)
        if report.engine.integers is not None:
            yield _integers(report.engine.integers)
            yield from _floating(report.engine.integers)
        if report.engine.latency:
            yield _latency(report.engine)


def _heading(report: Report) -> Text:
    capture = report.capture
    text = Text.assemble((report.model, "bold"), f"  captured in {duration(capture.seconds)}")
    if capture.nodes:
        text.append(f", {capture.nodes} nodes")
    if capture.errors:
        found = ", ".join(f"{error(value)} at {sizes}" for sizes, value in capture.errors.items())
        text.append(f", relative error {found}")
    for note in capture.notes:
        text.append(f"\n  note: {note}", style="yellow")
    return text


def _passes(report: Report, width: int) -> Table:
    # A column of the cost that does not fit is left out rather than cut.
    columns = _COLUMNS if width >= 100 else _COLUMNS[:3]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True, header_style="bold")
    table.add_column("pass", overflow="fold", min_width=16)
    for name in ("time", "changed", "left", *(heading for heading, _, _ in columns), "error"):
        table.add_column(name, justify="right", no_wrap=True)
    first, last = report.passes[0].before, report.passes[-1].after
    table.add_row(Text("captured", style="dim"), "", "", "", *_figures(columns, None, first), "")
    for item in report.passes:
        changed = Text(str(len(item.rewrites)), style="green" if item.rewrites else "dim")
        left = Text(str(len(item.skipped)), style="yellow" if item.skipped else "dim")
        figures = _figures(columns, item.before, item.after)
        table.add_row(Text(item.text), duration(item.seconds), changed, left, *figures, _error(item))
        for step in item.steps:
            inner = [Text(tell(getattr(step.after, name)), style="dim") for _, name, tell in columns]
            told = (f"  {step.text}", duration(step.seconds), str(len(step.rewrites)), str(len(step.skipped)))
            table.add_row(*(Text(cell, style="dim") for cell in told), *inner, Text(error(step.error), style="dim"))
    if len(report.passes) > 1:
        table.add_section()
        seconds = duration(sum(item.seconds for item in report.passes))
        skips = str(sum(len(item.skipped) for item in report.passes))
        table.add_row("in all", seconds, str(report.rewrites), skips, *_figures(columns, first, last), "", style="bold")
    return table


def _figures(columns: Sequence[_Column], before: Cost | None, after: Cost) -> list[Text]:
    """The figure after a pass, and in the line under it by how much it moved."""
    made: list[Text] = []
    for _, name, tell in columns:
        now = getattr(after, name)
        text = Text(tell(now))
        moved = "=" if before is None else change(getattr(before, name), now)
        if moved != "=":
            style = "green" if moved.startswith("−") else "red" if moved.startswith("+") else "dim"
            text.append(f"\n{moved}", style=style)
        elif before is not None:
            text = Text("=", style="dim")
        made.append(text)
    return made


def _error(item: PassReport) -> Text:
    text = Text(error(item.error))
    if item.tolerance:
        text.append(f"\n≤ {item.tolerance:.0e}", style="dim")
    elif item.numerics == "lossy" and item.error is not None:
        text.append("\nlossy", style="yellow")
    return text


def _sentences(report: Report) -> Iterator[Text]:
    for item in report.passes:
        if item.note:
            yield Text(f"  {item.name}: {item.note}")


def _storage(report: Report) -> Iterator[Text]:
    """Both sizes of quantized weights."""
    last = report.after
    if last is not None and last.stored_bytes is not None:
        told = f"weights: {size(last.stored_bytes)} as engines store them, {size(last.bytes)} in PyTorch (to train on)"
        yield Text(f"  {told}")


def _noise(report: Report) -> Iterator[Table]:
    """The noisiest layers of each pass that quantizes."""
    for item in report.passes:
        lines = noise_lines(item)
        if not lines:
            continue
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
        table.add_column(f"noisiest layers after {item.name}", overflow="fold")
        table.add_column("signal to noise", justify="right", no_wrap=True)
        table.add_column("noise", justify="right", no_wrap=True)
        table.add_column("in", overflow="fold")
        for line in lines[:_NOISY]:
            loud = "red" if line.decibels < _LOUD else ""
            table.add_row(Text(line.layer), Text(line.text, style=loud), f"{line.percent:.2g}%", Text(line.formats))
        if len(lines) > _NOISY:
            rest = f"and {len(lines) - _NOISY} more, from {lines[_NOISY].decibels:.1f} dB on"
            table.add_row(Text(rest, style="dim"), "", "", "")
        yield table


def _skips(report: Report) -> Table | None:
    groups = grouped_skips(report.passes)
    if not groups:
        return None
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    table.add_column("left as it was", no_wrap=True)
    table.add_column("sites", justify="right", no_wrap=True)
    table.add_column("reason", overflow="fold", ratio=3)
    table.add_column("where", overflow="fold", ratio=2)
    many = len({group.pass_name for group in groups}) > 1
    for group in groups:
        code = f"{group.pass_name}: {group.code}" if many else group.code
        table.add_row(
            Text(code, style="yellow"),
            str(len(group.sites)),
            Text(group.reason),
            Text(group.first_sites(), style="dim"),
        )
    return table


def _engine(engine: EngineReport) -> Text:
    text = Text.assemble(("engine ", "bold"), (engine.backend, "bold cyan"), f"  {size(engine.size_bytes)}")
    if engine.errors:
        worst = max(engine.errors, key=lambda name: engine.errors[name])
        text.append(f", relative error {error(engine.errors[worst])}", style="green")
        if engine.tolerance is not None:
            text.append(f" ≤ {engine.tolerance:.0e}")
        if len(engine.errors) > 1:
            text.append(f" (output {worst!r})")
        if engine.verified:
            text.append(f" at {'; '.join(engine.verified)}")
    elif engine.unverified:
        text.append(f", not verified: {engine.unverified}", style="yellow")
    text.append(f"\n  {engine.path}", style="dim")
    for note in engine.notes:
        text.append(f"\n  {note}")
    return text


def _integers(share: IntegerShare) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    table.add_column("in integers", overflow="fold")
    for name in ("runs", "of", "MACs", "of"):
        table.add_column(name, justify="right", no_wrap=True)
    for kind in share.kinds:
        whole = kind.integer == kind.count
        macs = (count(kind.integer_macs), count(kind.macs)) if kind.macs else ("", "")
        table.add_row(
            Text(kind.kind), Text(str(kind.integer), style="green" if whole else "yellow"), str(kind.count), *macs
        )
    if share.macs_share is not None:
        table.add_section()
        table.add_row("share of all MACs", "", "", f"{100 * share.macs_share:.1f}%", "", style="bold")
    return table


def _floating(share: IntegerShare) -> Iterator[Text]:
    """Why the rest is in floating point, reason by reason."""
    for reason, sites in share.reasons().items():
        text = Text.assemble("  in floating point: ", (f"{len(sites)}× ", "yellow"), reason, " (")
        text.append(", ".join(site.site for site in sites[:3]), style="dim")
        text.append(f" and {len(sites) - 3} more)" if len(sites) > 3 else ")")
        yield text


def _latency(engine: EngineReport) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    table.add_column("latency", overflow="fold")
    for name in ("batch", "median", "95%", "engine is"):
        table.add_column(name, justify="right", no_wrap=True)
    for item in engine.latency:
        table.add_row(
            Text(item.name),
            "" if item.batch is None else str(item.batch),
            f"{item.median_ms:.2f} ms",
            f"{item.p95_ms:.2f} ms",
            "" if item is engine.latency[0] else times_faster(engine.latency[0].median_ms, item.median_ms),
        )
    return table
