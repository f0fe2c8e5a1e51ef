"""Lines of a chart as SVG coordinates; the template draws them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fxcompress.reporting.parts import Curve

__all__ = ["Chart", "chart"]

WIDTH, HEIGHT = 420, 140
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 8, 8, 20  # room for the scales


@dataclass(frozen=True)
class Chart:
    """A curve, ready to draw in a box of :data:`WIDTH` by :data:`HEIGHT`.

    Attributes:
        name: of the curve.
        first: its value at the start, as text.
        last: its value at the end.
        line: points of a polyline.
        scale: ``(height, text)`` of the marks at the left.
        steps: ``(left, text)`` of the marks at the bottom.
    """

    name: str
    first: str
    last: str
    line: str
    scale: tuple[tuple[float, str], ...]
    steps: tuple[tuple[float, str], ...]


def chart(curve: Curve) -> Chart | None:
    """The drawing of a curve; None where fewer than two of its points are finite."""
    points = [(x, y) for x, y in curve.points if math.isfinite(x) and math.isfinite(y)]
    if len(points) < 2:
        return None
    xs, ys = [x for x, _ in points], [y for _, y in points]
    across, up = _Axis(xs, _LEFT, WIDTH - _RIGHT), _Axis(ys, HEIGHT - _BOTTOM, _TOP)
    line = " ".join(f"{across(x):.1f},{up(y):.1f}" for x, y in points)
    return Chart(
        curve.name,
        f"{ys[0]:.4g}",
        f"{ys[-1]:.4g}",
        line,
        tuple((round(up(y), 1), f"{y:.4g}") for y in dict.fromkeys((max(ys), min(ys)))),
        tuple((round(across(x), 1), f"{x:g}") for x in (xs[0], xs[-1])),
    )


class _Axis:
    """Values to places between two ends."""

    def __init__(self, values: Sequence[float], start: float, end: float) -> None:
        self.low, self.span = min(values), (max(values) - min(values)) or 1.0
        self.start, self.end = start, end

    def __call__(self, value: float) -> float:
        return self.start + (self.end - self.start) * (value - self.low) / self.span
