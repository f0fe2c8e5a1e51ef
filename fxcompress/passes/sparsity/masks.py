"""The new weight of every site, by the method that was asked for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, Protocol

import torch
from torch import fx

from fxcompress.passes.sparsity.data import as_groups, from_groups, input_norms, second_moments
from fxcompress.passes.sparsity.obs import sparsify
from fxcompress.passes.sparsity.select import importance, in_blocks, of_all, of_layer, of_rows
from fxcompress.passes.sparsity.sites import Site

__all__ = ["Request", "own_share", "sparse_weights_of"]


class Request(Protocol):
    """What the options say."""

    @property
    def sparsity(self) -> float: ...
    @property
    def method(self) -> str: ...
    @property
    def scope(self) -> str: ...
    @property
    def sparsities(self) -> Mapping[str, float]: ...
    @property
    def max_sparsity(self) -> float: ...
    @property
    def calibration(self) -> Iterable[Any] | None: ...
    @property
    def batches(self) -> int | None: ...


def own_share(sparsities: Mapping[str, float], site: Site) -> float | None:
    """The least share that a pattern gives one of the site's layers; None if none does."""
    found = [share for pattern, share in sparsities.items() if any(fnmatchcase(path, pattern) for path in site.layers)]
    return min(found) if found else None


def sparse_weights_of(
    graph_module: fx.GraphModule, sites: Sequence[Site], request: Request, pattern: tuple[int, int] | None
) -> Iterator[tuple[Site, torch.Tensor, torch.Tensor | None]]:
    """For each site its new weight, and the second moment that it was fitted by (None without)."""
    own = [own_share(request.sparsities, site) for site in sites]
    shares = [request.sparsity if share is None else share for share in own]
    if request.method == "sparsegpt":
        assert request.calibration is not None
        share_of = {site.path: share for site, share in zip(sites, shares, strict=True)}
        for site, moment in second_moments(graph_module, sites, request.calibration, request.batches):
            yield site, _compensated(site, moment, share_of[site.path], pattern), moment
        return
    norms: Sequence[torch.Tensor | None] = [None] * len(sites)
    if request.method == "wanda":
        assert request.calibration is not None
        norms = input_norms(graph_module, sites, request.calibration, request.batches)
    scores = [importance(site.weight, norm) for site, norm in zip(sites, norms, strict=True)]
    if pattern is not None:
        gone = [in_blocks(score, site.dim, *pattern) for site, score in zip(sites, scores, strict=True)]
    elif request.scope == "global":
        fixed = {index: share for index, share in enumerate(own) if share is not None}
        gone = of_all(scores, request.sparsity, fixed, request.max_sparsity)
    elif request.method == "wanda":  # the paper compares the inputs of one output
        gone = [of_rows(s, share, 1 - site.dim) for site, s, share in zip(sites, scores, shares, strict=True)]
    else:
        gone = [of_layer(score, share) for score, share in zip(scores, shares, strict=True)]
    for site, zero in zip(sites, gone, strict=True):
        yield site, site.weight.masked_fill(zero, 0), None


def _compensated(site: Site, moment: torch.Tensor, share: float, pattern: tuple[int, int] | None) -> torch.Tensor:
    weight = site.weight
    rows = as_groups(site)
    if pattern is None or weight.dim() == 2:
        return from_groups(site, sparsify(rows, moment.to(weight.device), share, pattern))
    # Inputs at one position of the kernel side by side: the pattern lies along them.
    inputs = weight.shape[1]
    order = torch.arange(rows.shape[2]).reshape(inputs, -1).T.reshape(-1).to(weight.device)
    moved = moment.to(weight.device)[:, order][:, :, order]
    made = torch.empty_like(rows, dtype=torch.float64)
    made[..., order] = sparsify(rows[..., order], moved, share, pattern)
    return from_groups(site, made)
