"""What calibration data says of a layer's inputs: the norm of each, or their second moment, within a memory budget."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from torch import fx, nn

from fxcompress.analysis.statistics import MeanSquare, SecondMoment, collect
from fxcompress.passes.sparsity.sites import Site

__all__ = ["as_groups", "from_groups", "input_norms", "second_moments"]

_MOMENT = SecondMoment("input", rows=4096)
_BUDGET = 1 << 29  # bytes of second moments held at once


def input_norms(
    graph_module: fx.GraphModule, sites: Sequence[Site], data: Iterable[Any], limit: int | None
) -> list[torch.Tensor]:
    """For each site the root mean square of every input channel, of a shape that broadcasts to the weight."""
    wanted = {site.path: MeanSquare("input", dim=-1 if isinstance(site.layer, nn.Linear) else 1) for site in sites}
    found = collect(graph_module, data, {n: wanted[site.path] for site in sites for n in site.nodes}, limit=limit)
    norms: list[torch.Tensor] = []
    for site in sites:
        square = sum(found[name, wanted[site.path]] for name in site.nodes) / len(site.nodes)
        norms.append(_broadcast(site, torch.as_tensor(square).sqrt()))
    return norms


def _broadcast(site: Site, norm: torch.Tensor) -> torch.Tensor:
    """``[inputs]`` as the weight counts them: each row of a grouped convolution reads its own group's."""
    weight = site.weight
    if site.dim == 0:  # transposed: [inputs of all groups, outputs of one, kernel]
        return norm.reshape(-1, *([1] * (weight.dim() - 1)))
    groups = int(getattr(site.layer, "groups", 1))
    rows = norm.reshape(groups, -1).repeat_interleave(len(weight) // groups, 0)  # [outputs, inputs of a group]
    return rows.reshape(*rows.shape, *([1] * (weight.dim() - 2)))


def second_moments(
    graph_module: fx.GraphModule, sites: Sequence[Site], data: Iterable[Any], limit: int | None
) -> Iterator[tuple[Site, torch.Tensor]]:
    """Each site with Σ x xᵀ of what it reads, ``[groups, d, d]``; read anew for as many at once as memory allows."""
    again = data if hasattr(data, "__len__") else list(islice(data, limit))
    for part in _parts(sites):
        found = collect(graph_module, again, {name: _MOMENT for site in part for name in site.nodes}, limit=limit)
        for site in part:
            yield site, sum(found[name, _MOMENT].total for name in site.nodes)


def _parts(sites: Sequence[Site]) -> Iterator[list[Site]]:
    part: list[Site] = []
    spent = 0
    for site in sites:
        groups, _, width = as_groups(site).shape
        cost = 8 * groups * width**2
        if part and spent + cost > _BUDGET:
            yield part
            part, spent = [], 0
        part.append(site)
        spent += cost
    if part:
        yield part


def as_groups(site: Site, weight: torch.Tensor | None = None) -> torch.Tensor:
    """The weight as ``[groups, rows, d]``, d in the order of the second moment."""
    weight = site.weight if weight is None else weight
    return weight.reshape(int(getattr(site.layer, "groups", 1)), -1, weight[0].numel())


def from_groups(site: Site, rows: torch.Tensor) -> torch.Tensor:
    """Back from :func:`as_groups`, in the weight's shape and dtype."""
    return rows.reshape(site.weight.shape).to(site.weight.dtype)
