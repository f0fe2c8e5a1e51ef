"""Kinds of layers whose integer kernels do not pay on an engine, found by measuring it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from torch import fx, nn

__all__ = ["Pace", "kinds_of", "quickest"]

_HELPS = 0.98  # of the time; less is within what two measurements of one engine differ by

Kinds: TypeAlias = tuple[str, ...]


@dataclass(frozen=True)
class Pace:
    """A choice of kinds and what it takes.

    Attributes:
        kinds: that stay in floating point.
        milliseconds: of the engine.
    """

    kinds: Kinds
    milliseconds: float


def kinds_of(graph_module: fx.GraphModule, paths: Iterable[str]) -> dict[str, list[str]]:
    """Kind → paths of layers, in the order of the graph.

    Engines have one kernel for each kind, in integers as in floating point, so that what integers gain is much the
    same within a kind: little or less than nothing for groups of few channels, whose products are short.
    """
    found: dict[str, list[str]] = {}
    for path in paths:
        found.setdefault(_kind(graph_module.get_submodule(path)), []).append(path)
    return found


def _kind(layer: nn.Module) -> str:
    if not isinstance(layer, nn.modules.conv._ConvNd):
        return "linear layers"
    if layer.groups == 1:
        return "convolutions"
    return "depthwise convolutions" if layer.groups == layer.in_channels else "grouped convolutions"


def quickest(kinds: Sequence[str], measure: Callable[[Sequence[Kinds]], Sequence[float]]) -> Pace:
    """The kinds to leave in floating point for the least latency: none, one, or all that helped alone.

    Args:
        kinds: of the layers.
        measure: milliseconds with the layers of these kinds in floating point, for several choices; called twice at
            most.
    """
    choices: list[Kinds] = [(), *((kind,) for kind in kinds if len(kinds) > 1)]
    times = list(measure(choices))
    helped = tuple(kind for (kind,), own in zip(choices[1:], times[1:], strict=True) if own < _HELPS * times[0])
    if 1 < len(helped) < len(kinds):
        choices.append(helped)
        times += measure([helped])
    best = min(range(len(times)), key=times.__getitem__)
    return Pace(choices[best], times[best])
