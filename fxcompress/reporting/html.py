"""A report as one HTML page: no script, no font, no picture from elsewhere. All text is escaped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

from fxcompress.errors import PreconditionError
from fxcompress.reporting import figures
from fxcompress.reporting.charts import HEIGHT, WIDTH, chart
from fxcompress.reporting.model import Report
from fxcompress.reporting.noise import noise_lines
from fxcompress.reporting.parts import Bar

__all__ = ["render_html"]

_ROWS = 200  # rewrites shown per pass
_LAYERS = 25  # layers shown, the most expensive first
_TEXT = 160  # characters of one value of a rewrite's detail

_COLUMNS = (
    ("Parameters", "parameters", figures.count),
    ("MACs", "macs", figures.count),
    ("Weights", "engine_bytes", figures.size),
    ("Activations, peak", "activation_peak_bytes", figures.size),
)


def render_html(report: Report) -> str:
    """The page as text.

    Raises:
        PreconditionError: Jinja2 is not installed.
    """
    try:
        import jinja2
    except ImportError as error:
        raise PreconditionError(
            "the HTML report needs Jinja2, which is not installed",
            remedy="pip install 'fxcompress[report]', or save the report as .json",
        ) from error
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(count=figures.count, size=figures.size, error=figures.error, duration=figures.duration)
    template = environment.from_string(files(__package__).joinpath("templates/report.html").read_text(encoding="utf-8"))
    return template.render(
        report=report,
        totals=_moved(report.before, report.after),
        passes=[_pass(report, index) for index in range(len(report.passes))],
        latency=_latency(report),
        layers=_layers(report),
        box=(WIDTH, HEIGHT),
    )


def _moved(before: Any, after: Any) -> list[dict[str, Any]]:
    """One entry per figure of the cost: its value, and by how much it moved."""
    if before is None or after is None:
        return []
    made: list[dict[str, Any]] = []
    for title, name, tell in _COLUMNS:
        old, new = getattr(before, name), getattr(after, name)
        moved = figures.change(old, new)
        made.append(
            {
                "title": title,
                "old": tell(old),
                "new": tell(new),
                "moved": moved,
                "tone": "down" if moved.startswith("−") else "up" if moved.startswith("+") else "same",
                # The bars are to one scale: the larger of the two figures is the whole.
                "old_percent": _percent(old, max(old or 0, new or 0)),
                "new_percent": _percent(new, max(old or 0, new or 0)),
            }
        )
    return made


def _pass(report: Report, index: int) -> dict[str, Any]:
    item = report.passes[index]
    return {
        "told": item,
        "figures": _moved(item.before, item.after),
        "rewrites": [
            {"site": site.site, "result": site.result, "facts": _facts(site.detail)} for site in item.rewrites[:_ROWS]
        ],
        "more": max(0, len(item.rewrites) - _ROWS),
        "bars": [
            {"title": f"{title} {len(bars)} layers, before and after", "lines": _lines(bars)}
            for title, bars in (("width of", item.widths), ("weights that are not zero in", item.nonzeros))
            if bars
        ],
        "charts": [drawn for drawn in map(chart, item.curves) if drawn is not None],
        "noise": noise_lines(item),
        "steps": item.steps,
        "skips": [{"group": group, "sites": group.first_sites(6)} for group in figures.grouped_skips([item])],
    }


def _lines(bars: Sequence[Bar]) -> list[dict[str, Any]]:
    widest = max(bar.before for bar in bars)
    return [
        {"told": bar, "old_percent": _percent(bar.before, widest), "new_percent": _percent(bar.after, widest)}
        for bar in bars
    ]


def _facts(detail: Mapping[str, Any]) -> list[tuple[str, str]]:
    told: list[tuple[str, str]] = []
    for name, value in detail.items():
        if name == "curves" or value is None:
            continue  # they are drawn; it was not measured
        text = f"{value:.4g}" if isinstance(value, float) else str(value)
        told.append((str(name), text if len(text) <= _TEXT else text[: _TEXT - 1] + "…"))
    return told


def _latency(report: Report) -> list[dict[str, Any]]:
    timings = report.engine.latency if report.engine is not None else []
    slowest = max((item.p95_ms for item in timings), default=0.0)
    made: list[dict[str, Any]] = []
    for item in timings:
        made.append(
            {
                "told": item,
                "percent": _percent(item.median_ms, slowest),
                "p95_percent": _percent(item.p95_ms, slowest),
                "engine_is": "" if item is timings[0] else figures.times_faster(timings[0].median_ms, item.median_ms),
            }
        )
    return made


def _layers(report: Report) -> list[dict[str, Any]]:
    counted = [item for item in report.layers if item.macs or item.parameters]
    counted.sort(key=lambda item: (-(item.macs or 0), -item.parameters))
    macs = sum(item.macs or 0 for item in counted)
    largest = max((item.macs or 0 for item in counted), default=0)
    return [
        {"told": item, "share": _percent(item.macs, macs), "percent": _percent(item.macs, largest)}
        for item in counted[:_LAYERS]
    ]


def _percent(part: float | None, whole: float) -> float:
    return round(100 * (part or 0) / whole, 2) if whole else 0.0
