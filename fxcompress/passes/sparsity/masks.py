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

__all__ = ["Request", "gone_of", "sparse_weights_of"]


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


def sparse_weights_of(
    graph_module: fx.GraphModule, sites: Sequence[Site], request: Request, pattern: tuple[int, int] | None
) -> Iterator[tuple[Site, torch.Tensor, torch.Tensor | None]]:
    """For each site its new weight, and the second moment that it was fitted by (None without)."""
    if request.method == "sparsegpt":
        assert request.calibration is not None
        share_of = dict(zip((site.path for site in sites), _shares(sites, request, 1.0)[1], strict=True))
        for site, moment in second_moments(graph_module, sites, request.calibration, request.batches):
            yield site, _compensated(site, moment, share_of[site.path], pattern), moment
        return
    norms: Sequence[torch.Tensor] | None = None
    if request.method == "wanda":
        assert request.calibration is not None
        norms = input_norms(graph_module, sites, request.calibration, request.batches)
    for site, zero in zip(sites, gone_of(sites, request, pattern, norms), strict=True):
        yield site, site.weight.masked_fill(zero, 0), None


def gone_of(
    sites: Sequence[Site],
    request: Request,
    pattern: tuple[int, int] | None,
    norms: Sequence[torch.Tensor] | None = None,
    part: float = 1.0,
) -> list[torch.Tensor]:
    """For each site where its weight becomes zero.

    Args:
        sites: with the weights as they are.
        request: the options.
        pattern: ``(n, m)``, in place of shares.
        norms: of the inputs, by which weights are multiplied.
        part: of the shares that are asked for.
    """
    scores = [importance(site.weight, None if norms is None else norms[index]) for index, site in enumerate(sites)]
    own, shares = _shares(sites, request, part)
    if pattern is not None:
        return [in_blocks(score, site.dim, *pattern) for site, score in zip(sites, scores, strict=True)]
    if request.scope == "global":
        fixed = {index: share for index, share in enumerate(own) if share is not None}
        return of_all(scores, request.sparsity * part, fixed, request.max_sparsity)
    if norms is not None:  # the inputs of one output are compared, as in the paper
        return [of_rows(s, share, 1 - site.dim) for site, s, share in zip(sites, scores, shares, strict=True)]
    return [of_layer(score, share) for score, share in zip(scores, shares, strict=True)]


def _shares(sites: Sequence[Site], request: Request, part: float) -> tuple[list[float | None], list[float]]:
    """Of each site the share of its own, if it has one, and the share that goes in local scope."""
    own = [_own_share(request.sparsities, site) for site in sites]
    scaled = [None if share is None else share * part for share in own]
    return scaled, [request.sparsity * part if share is None else share for share in scaled]


def _own_share(sparsities: Mapping[str, float], site: Site) -> float | None:
    """The least share that a pattern gives one of the site's layers; None if none does."""
    found = [share for pattern, share in sparsities.items() if any(fnmatchcase(path, pattern) for path in site.layers)]
    return min(found) if found else None


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
