"""Figures as people read them: ``11.69 M``, ``46.8 MB``, ``−12.3%``; and skips grouped by reason."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from fxcompress.reporting.parts import PassReport

__all__ = ["SkipGroup", "change", "count", "duration", "error", "grouped_skips", "size", "times_faster"]

_COUNTS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
_SIZES = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))
UNKNOWN = "?"


def count(number: float | None) -> str:
    """``11.69 M`` of a number of things; ``?`` of None."""
    return UNKNOWN if number is None else _scaled(number, _COUNTS, "")


def size(number: float | None) -> str:
    """``46.80 MB`` of a number of bytes (a megabyte has 10⁶); ``?`` of None."""
    return UNKNOWN if number is None else _scaled(number, _SIZES, " B")


def _scaled(number: float, units: Iterable[tuple[float, str]], unit: str) -> str:
    for factor, name in units:
        if abs(number) >= factor * 0.99995:
            scaled = number / factor
            digits = 2 if abs(scaled) < 100 else 1
            return f"{scaled:.{digits}f} {name}"
    return f"{number:g}{unit}"


def change(before: float | None, after: float | None) -> str:
    """``−12.3%``; ``=`` where nothing changed, ``≈`` for less than 0.01%, ``?`` where either is unknown."""
    if before is None or after is None:
        return UNKNOWN
    if before == after:
        return "="
    if before == 0:
        return "new"
    percent = 100 * (after - before) / before
    if abs(percent) < 0.01:
        return "≈"
    digits = 1 if abs(percent) >= 0.1 else 2
    return f"{percent:+.{digits}f}%".replace("-", "−")


def error(value: float | None) -> str:
    """``1.2e-06`` of a relative error; ``0`` of none at all; ``–`` where it was not measured."""
    if value is None:
        return "–"
    return "0" if value == 0 else f"{value:.1e}"


def duration(seconds: float) -> str:
    """``1.6 s``, ``85 ms``, ``12 min``."""
    if seconds < 0.9995:
        return f"{seconds * 1000:.0f} ms"
    return f"{seconds:.1f} s" if seconds < 600 else f"{seconds / 60:.0f} min"


def times_faster(ours: float, theirs: float) -> str:
    """``3.00× faster`` or ``1.50× slower``: how a time of ours compares with one of theirs."""
    if ours <= 0 or theirs <= 0:
        return UNKNOWN
    return f"{theirs / ours:.2f}× faster" if theirs >= ours else f"{ours / theirs:.2f}× slower"


@dataclass
class SkipGroup:
    """The sites that one pass left for one reason.

    Attributes:
        pass_name: of the pass.
        code: the stable reason.
        reason: the sentence of the first site.
        sites: all of them, in order.
    """

    pass_name: str
    code: str
    reason: str
    sites: list[str] = field(default_factory=list)

    def first_sites(self, number: int = 3) -> str:
        """The first few sites: ``conv1, conv2, conv3 and 4 more``."""
        more = len(self.sites) - number
        return ", ".join(self.sites[:number]) + (f" and {more} more" if more > 0 else "")


def grouped_skips(passes: Iterable[PassReport]) -> list[SkipGroup]:
    """Skips by pass, in the order of the passes, and by code, the most frequent first."""
    grouped: list[SkipGroup] = []
    for item in passes:
        groups: dict[str, SkipGroup] = {}
        for skip in item.skipped:
            groups.setdefault(skip.code, SkipGroup(item.name, skip.code, skip.reason)).sites.append(skip.site)
        grouped += sorted(groups.values(), key=lambda group: -len(group.sites))
    return grouped
