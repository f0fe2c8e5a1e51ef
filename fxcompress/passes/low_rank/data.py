"""Second moments of what sites read, collected a few sites at a time so that not all lie in memory at once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import fx, nn

from fxcompress.analysis.statistics import MeanAbs, Moments, SecondMoment, collect
from fxcompress.passes.base import PassContext
from fxcompress.passes.low_rank.metric import Metric, data_metric, diagonal_metric, plain_metric
from fxcompress.passes.low_rank.sites import CONVS, TRANSPOSED, Site

__all__ = ["site_metrics", "width"]

_BYTES = 1 << 30  # of second moments that are held at once


def width(layer: Any) -> int:
    """Length of the rows that the layer reads: features, or input channels of a group × kernel."""
    if type(layer) in TRANSPOSED:
        return int(layer.weight[:, :1].numel()) // int(layer.groups)
    return int(layer.weight[0].numel())


def site_metrics(
    graph_module: fx.GraphModule,
    sites: Sequence[Site],
    calibration: Iterable[Any] | None,
    context: PassContext,
    *,
    batches: int | None = None,
    centred: Sequence[bool] = (),
    alpha: float | None = None,
) -> Iterator[tuple[Site, Metric, Moments | None]]:
    """Each site with the metric of its errors, and the moments it is made of; one site at a time.

    Data that can be read again is read once for every gigabyte of moments.

    Args:
        graph_module: as it was before any site changed.
        sites: in graph order.
        calibration: batches; None gives the plain metric.
        context: for the progress.
        batches: most batches to read.
        centred: per site, whether a bias takes up the mean.
        alpha: of ASVD; None is the whitened metric.
    """
    if calibration is None:
        for site in sites:
            yield site, plain_metric(), None
        return
    flags = list(centred) or [False] * len(sites)
    whole = isinstance(calibration, Iterator)  # can be read only once
    for start, stop in _chunks(sites, whole):
        chunk = sites[start:stop]
        requests: dict[str, list[Any]] = {}
        for site in chunk:
            if type(site.layer) is nn.Embedding:
                continue  # it reads no numbers
            kinds: list[Any] = [SecondMoment(), *([] if alpha is None else [_mean_abs(site)])]
            requests |= {node.name: kinds for node in site.nodes}
        found: Any = {}
        if requests:
            found = collect(graph_module, calibration, requests, limit=batches, progress=context.progress)
        for site, flag in zip(chunk, flags[start:stop], strict=True):
            if type(site.layer) is nn.Embedding:
                yield site, plain_metric(), None
                continue
            moments = sum((found[node.name, SecondMoment()] for node in site.nodes[1:]), _first(found, site))
            if alpha is None:
                yield site, data_metric(moments, centred=flag), moments
            else:
                total = sum(found[node.name, _mean_abs(site)] for node in site.nodes) / len(site.nodes)
                yield site, diagonal_metric(moments, total[None], alpha), moments


def _first(found: Any, site: Site) -> Moments:
    moments: Moments = found[site.nodes[0].name, SecondMoment()]
    return moments


def _mean_abs(site: Site) -> MeanAbs:
    layer = site.layer
    return MeanAbs("input", dim=-1 - len(layer.kernel_size) if type(layer) in CONVS else -1)


def _groups(layer: Any) -> int:
    return int(getattr(layer, "groups", 1))


def _chunks(sites: Sequence[Site], whole: bool) -> Iterator[tuple[int, int]]:
    start, held = 0, 0
    for index, site in enumerate(sites):
        size = 0 if type(site.layer) is nn.Embedding else 8 * width(site.layer) ** 2 * _groups(site.layer)
        if index > start and held + size > _BYTES and not whole:
            yield start, index
            start, held = index, 0
        held += size
    if start < len(sites):
        yield start, len(sites)
