"""Dependencies solved, with a side chosen wherever a view splits channels in two and only one side can shrink."""

from __future__ import annotations

from collections.abc import Callable

from torch import fx

from fxcompress.analysis.dependency.build import build
from fxcompress.analysis.dependency.builder import Builder
from fxcompress.analysis.dependency.labels import Solution

__all__ = ["settle"]

_TRIES = 4


def settle(
    graph_module: fx.GraphModule, asked: Callable[[Builder], dict[str, int]] | None = None
) -> tuple[Builder, Solution]:
    """Walk the graph and solve; where a chosen side turns out to be pinned, take the next larger one and walk again.

    Args:
        graph_module: a captured graph with shapes.
        asked: sides to prefer, by site, told from a first walk; sites that it leaves out take the larger side.
    """
    builder = build(graph_module)
    choices = asked(builder) if asked is not None else {}
    tried: dict[str, set[int]] = {name: {builder.sites[name].live} for name in builder.sites if name not in choices}
    if choices:
        builder = build(graph_module, choices)
    solution = builder.labels.solve()
    for _ in range(_TRIES):
        again = False
        for name, site in builder.sites.items():
            tried.setdefault(name, set()).add(site.live)
            if not solution.removable[solution.class_of[site.labels]].any():
                order = sorted(range(len(site.sizes)), key=lambda side: -site.sizes[side])
                left = [side for side in order if side not in tried[name] and site.sizes[side] > 1]
                if left:
                    choices[name], again = left[0], True
        if not again:
            break
        builder = build(graph_module, choices)
        solution = builder.labels.solve()
    return builder, solution
