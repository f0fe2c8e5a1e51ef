"""How much of a quantized model an engine really computes in integers, and why not the rest."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from fxcompress.passes.base import Skip

__all__ = ["FloatSite", "IntegerKind", "IntegerShare"]


@dataclass
class IntegerKind:
    """One kind of operation.

    Attributes:
        kind: ``convolution``, ``linear``, ``matrix product``, ``recurrent`` or ``residual addition``.
        count: how many the engine has.
        integer: how many of them run in integer kernels.
        macs: multiply-accumulates of all, at batch 1.
        integer_macs: of those in integer kernels.
    """

    kind: str
    count: int
    integer: int
    macs: int
    integer_macs: int


@dataclass
class FloatSite:
    """An operation that runs in floating point.

    Attributes:
        site: the layer, or the node of the graph.
        kind: as in :class:`IntegerKind`.
        macs: at batch 1.
        reason: one sentence.
    """

    site: str
    kind: str
    macs: int
    reason: str


@dataclass
class IntegerShare:
    """Read from the graph that the engine's optimizer made.

    Attributes:
        kinds: the kinds of operations that there are.
        left: what runs in floating point.
    """

    kinds: list[IntegerKind] = field(default_factory=list)
    left: list[FloatSite] = field(default_factory=list)

    @classmethod
    def of(cls, told: Mapping[str, Any], skips: Iterable[Skip] = ()) -> IntegerShare:
        """From the figures in a manifest.

        Args:
            told: with ``kinds`` and ``left``.
            skips: of the passes: where one says why it left a layer, that is the reason.
        """
        known = {skip.site: skip.reason for skip in skips}
        left = [FloatSite(**{**site, "reason": known.get(site["site"], site["reason"])}) for site in told["left"]]
        return cls([IntegerKind(**kind) for kind in told["kinds"]], left)

    @property
    def macs_share(self) -> float | None:
        """Share of all multiply-accumulates that integer kernels compute; None where there are none."""
        macs = sum(kind.macs for kind in self.kinds)
        return sum(kind.integer_macs for kind in self.kinds) / macs if macs else None

    def reasons(self) -> dict[str, list[FloatSite]]:
        """What is left by reason, the most expensive first."""
        grouped: dict[str, list[FloatSite]] = {}
        for site in sorted(self.left, key=lambda site: -site.macs):
            grouped.setdefault(site.reason, []).append(site)
        return grouped
