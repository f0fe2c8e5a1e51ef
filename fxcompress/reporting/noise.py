"""Signal-to-noise ratios of quantized layers, worst first, as passes told them in ``detail["signal_to_noise_db"]``."""

from __future__ import annotations

from dataclasses import dataclass

from fxcompress.reporting.parts import PassReport

__all__ = ["NoiseLine", "noise_lines"]


@dataclass(frozen=True)
class NoiseLine:
    """One layer.

    Attributes:
        layer: its path.
        decibels: signal-to-noise ratio of its output.
        before: the ratio before the pass, where a pass improves it.
        formats: of weight and activation: ``"int8, per channel · uint8"``.
    """

    layer: str
    decibels: float
    before: float | None = None
    formats: str = ""

    @property
    def percent(self) -> float:
        """The noise relative to the signal, root mean square; at most 100."""
        return min(100.0, 100 * 10.0 ** (-max(self.decibels, 0.0) / 20))

    @property
    def text(self) -> str:
        """``"17.3 dB"``, or ``"12.1 → 17.3 dB"``."""
        before = "" if self.before is None else f"{self.before:.1f} → "
        return f"{before}{self.decibels:.1f} dB"


def noise_lines(item: PassReport) -> list[NoiseLine]:
    """The layers of one pass, the noisiest first; none where the pass quantizes nothing."""
    found = []
    for rewrite in item.rewrites:
        decibels = rewrite.detail.get("signal_to_noise_db")
        if not isinstance(decibels, (int, float)):
            continue
        before = rewrite.detail.get("signal_to_noise_db_before")
        parts = [str(rewrite.detail[name]) for name in ("weight", "activation") if name in rewrite.detail]
        told = float(before) if isinstance(before, (int, float)) else None
        found.append(NoiseLine(rewrite.site, float(decibels), told, " · ".join(parts)))
    return sorted(found, key=lambda line: line.decibels)
