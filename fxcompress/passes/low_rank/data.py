"""Second moments of what sites read, collected a few sites at a time so that not all lie in memory at once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import fx, nn

from fxcompress.analysis.statistics import MeanAbs, Moments, SecondMoment, collect
from fxcompress.analysis.statistics.patches import geometry
from fxcompress.passes.base import PassContext
from fxcompress.passes.low_rank.metric import Metric, data_metric, diagonal_metric, plain_metric
from fxcompress.passes.low_rank.sites import CONVS, TRANSPOSED, Site

__all__ = ["fits", "site_metrics", "too_wide", "width"]

_BYTES = 1 << 30  # of second moments that are held at once, if not told otherwise
_MOST = 2 << 30  # of the second moment of one site; what needs more goes without data


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
    held: int = _BYTES,
) -> Iterator[tuple[Site, Metric, Moments | None]]:
    """Each site with the metric of its errors, and the moments it is made of; one site at a time.

    Data that can be read again is read once for every ``held`` bytes of moments.

    Args:
        graph_module: as it was before any site changed.
        sites: in graph order.
        calibration: batches; None gives the plain metric.
        context: for the progress.
        batches: most batches to read.
        centred: per site, whether a bias takes up the mean.
        alpha: of ASVD; None is the whitened metric.
        held: bytes of second moments that may be held at once (those of one site at least).
    """
    if calibration is None:
        for site in sites:
            yield site, plain_metric(), None
        return
    flags = list(centred) or [False] * len(sites)
    whole = isinstance(calibration, Iterator)  # can be read only once
    for start, stop in _chunks(sites, None if whole else held):
        chunk = sites[start:stop]
        requests: dict[str, list[Any]] = {}
        for site in chunk:
            if _without(site.layer):
                continue
            kinds: list[Any] = [SecondMoment(), *([] if alpha is None else [_mean_abs(site)])]
            requests |= {node.name: kinds for node in site.nodes}
        found: Any = {}
        if requests:
            found = collect(
                graph_module, calibration, requests, limit=batches, padding=False, progress=context.progress
            )
        for site, flag in zip(chunk, flags[start:stop], strict=True):
            if _without(site.layer):
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


def too_wide(sites: Sequence[Site]) -> str:
    """A sentence about the sites that go without data because of their size; empty if there are none."""
    wide = [site.path for site in sites if type(site.layer) is not nn.Embedding and _moment_bytes(site.layer) > _MOST]
    if not wide:
        return ""
    names = ", ".join(wide)
    return f"What {names} read of the data is too wide for its second moment: factored without data."


def _without(layer: Any) -> bool:
    """An embedding reads no numbers; a moment may be too large."""
    return type(layer) is nn.Embedding or _moment_bytes(layer) > _MOST


def _moment_bytes(layer: Any) -> int:
    return 8 * width(layer) ** 2 * int(getattr(layer, "groups", 1))


def fits(sites: Sequence[Site], held: int = _BYTES) -> bool:
    """Whether the data is read once for all sites."""
    return len(list(_chunks(sites, held))) <= 1


def _chunks(sites: Sequence[Site], most: int | None) -> Iterator[tuple[int, int]]:
    """Spans of sites whose moments take no more bytes than ``most``; layers that read the same value share one."""
    start, taken = 0, 0
    known: set[Any] = set()
    for index, site in enumerate(sites):
        sources = {(node.args[0], geometry(site.layer)) for node in site.nodes}
        size = 0 if _without(site.layer) else _moment_bytes(site.layer) * len(sources - known)
        if most is not None and index > start and taken + size > most:
            yield start, index
            start, taken, known = index, 0, set()
            size = 0 if _without(site.layer) else _moment_bytes(site.layer) * len(sources)
        taken += size
        known |= sources
    if start < len(sites):
        yield start, len(sites)
