"""Second moments of what sites read, or produce, collected a few sites at a time so that not all lie in memory at once.

A linear map with fewer outputs than inputs is measured by its outputs: that moment is the smaller one.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from fxcompress.analysis.statistics import MeanAbs, Moments, PackedMoments, SecondMoment, collect
from fxcompress.analysis.statistics.patches import geometry
from fxcompress.passes.base import PassContext
from fxcompress.passes.low_rank.budget import LARGE
from fxcompress.passes.low_rank.metric import Metric, data_metric, diagonal_metric, output_metric, plain_metric
from fxcompress.passes.low_rank.sites import CONVS, TRANSPOSED, Site
from fxcompress.passes.low_rank.spectra import may_be_crowded

__all__ = ["fits", "site_metrics", "too_wide", "width"]

_BYTES = 1 << 30  # of second moments that are held at once, if not told otherwise
_FROM_INPUTS = 41 / 2  # bytes: a packed moment of inputs, the whole of it and a Gram matrix made of both, by inputs²
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
    held: int | Sequence[int] = _BYTES,
    linear: bool = False,
    folds: bool = False,
    room: int | None = None,
) -> Iterator[tuple[Site, Metric, Moments | PackedMoments | None]]:
    """Each site with the metric of its errors, and the moments it is made of; one site at a time.

    Data that can be read again is read once for every ``held`` bytes of moments, which are let go as soon as the sites
    that need them were handed out. Where the metric is of outputs the moments are theirs, less the bias.

    Args:
        graph_module: as it was before any site changed.
        sites: in graph order.
        calibration: batches; None gives the plain metric.
        context: for the progress.
        batches: most batches to read.
        centred: per site, whether a bias takes up the mean.
        alpha: of ASVD; None is the whitened metric.
        held: bytes of second moments that may be held at once (those of one site at least); or for each site how many
            while it is factored.
        linear: whether sites are taken as matrices, of which outputs tell as much as inputs; their moments are packed.
        folds: with the moments of one half of the samples beside: something is fitted to the data.
        room: bytes that may live beside the model while spectra are computed; where a moment of inputs does not let
            that be done it is of outputs, though others share those inputs.
    """
    if calibration is None:
        for site in sites:
            yield site, plain_metric(), None
        return
    reads = _reads(sites, linear, folds, room)
    flags = list(centred) or [False] * len(sites)
    whole = isinstance(calibration, Iterator)  # can be read only once
    spans = [(0, len(reads))] if whole else list(_chunks(reads, held))
    for start, stop in spans:
        chunk = list(zip(reads[start:stop], flags[start:stop], strict=True))
        requests: dict[str, list[Any]] = {}
        for read, _ in chunk:
            if not read.without:
                kinds = [read.statistic, *([] if alpha is None else [_mean_abs(read.site)])]
                requests |= {node.name: kinds for node in read.site.nodes}
        found: Any = {}
        if requests:
            found = collect(
                graph_module, calibration, requests, limit=batches, padding=False, progress=context.progress
            )
        for read, flag in chunk:
            site = read.site
            if read.without:
                yield site, plain_metric(), None
                continue
            moments = _total([found.pop((node.name, read.statistic)) for node in site.nodes])
            if read.outputs:
                assert isinstance(moments, PackedMoments)
                moments = _less(moments, getattr(site.layer, "bias", None))
                metric = output_metric(moments, width(site.layer), centred=flag)
            else:
                metric = data_metric(moments, centred=flag)
            if alpha is not None:
                total = sum(found[node.name, _mean_abs(site)] for node in site.nodes) / len(site.nodes)
                metric = diagonal_metric(metric, total[None], alpha)
            yield site, metric, moments
            del moments, metric


def _total(each: list[Any]) -> Moments | PackedMoments:
    """Of all calls of a layer."""
    first = each[0]
    if len(each) == 1 or isinstance(first, Moments):
        found: Moments | PackedMoments = sum(each[1:], first)
        return found
    half = first.half.copy()  # others may share it
    for other in each[1:]:
        half.add(other.half)
    return PackedMoments(half, sum(item.sum for item in each), sum(item.count for item in each))


@dataclass(frozen=True)
class _Read:
    """What is collected for a site.

    Attributes:
        site: of the pass.
        outputs: whether it is what the site produces, rather than what it reads.
        packed: whether one half of the moment is held.
        folds: whether the moment of half of the samples is held besides.
    """

    site: Site
    outputs: bool = False
    packed: bool = False
    folds: bool = False

    @property
    def statistic(self) -> SecondMoment:
        return SecondMoment("output" if self.outputs else "input", packed=self.packed, folds=self.folds)

    @property
    def values(self) -> set[Hashable]:
        """Of which values: sites that share one share its moment."""
        if self.outputs:
            return set(self.site.nodes)
        return {(node.args[0], geometry(self.site.layer)) for node in self.site.nodes}

    @property
    def bytes(self) -> int:
        """Of one moment."""
        layer = self.site.layer
        size = layer.weight.shape[0] if self.outputs else width(layer)
        whole = 8 * int(size) ** 2 * int(getattr(layer, "groups", 1))
        return whole * 9 // 16 if self.packed else whole * (1 + self.folds)

    @property
    def without(self) -> bool:
        """An embedding reads no numbers; a moment may be too large."""
        return type(self.site.layer) is nn.Embedding or self.bytes > _MOST


def _reads(sites: Sequence[Site], linear: bool, folds: bool = False, room: int | None = None) -> list[_Read]:
    """By outputs where that takes less memory for all sites that read the same value together, or where it has to."""
    reads = [_Read(site, packed=linear, folds=folds) for site in sites]
    if not linear:
        return reads
    sharing: dict[Hashable, list[_Read]] = defaultdict(list)
    for read in reads:
        sharing[frozenset(read.values)].append(read)
    smaller: set[str] = set()
    for values, members in sharing.items():
        apart = [_Read(read.site, True, True) for read in members]
        cost = sum(read.bytes * len(read.values) for read in apart)
        together = members[0].bytes * len(values)  # type: ignore[arg-type]
        # Of a large square layer the moment of outputs serves as the Gram matrix too.
        less = cost < together or (cost == together and apart[0].site.layer.weight.shape[0] >= LARGE)
        less = less or (room is not None and any(_has_to(read.site, room) for read in apart))
        if all(_exact(read.site) for read in apart) and less:
            smaller.update(read.site.path for read in apart)
    return [_Read(read.site, read.site.path in smaller, True) for read in reads]


def _has_to(site: Site, room: int) -> bool:
    """Whether there is no room for the Gram matrix beside a moment of inputs from which it would be made."""
    rows, inputs = site.layer.weight.shape[0], width(site.layer)
    weight = site.layer.weight.flatten(1)[None]
    return may_be_crowded(weight) and 2 * rows <= 3 * inputs and _FROM_INPUTS * inputs**2 > room


def _exact(site: Site) -> bool:
    """Whether what rounding does to two factors is nothing against what they lose: outputs do not tell it."""
    weight: torch.Tensor = site.layer.weight
    return type(site.layer) in (nn.Linear, *CONVS) and weight.dtype in (torch.float32, torch.float64)


def _less(moments: PackedMoments, bias: torch.Tensor | None) -> PackedMoments:
    """Moments of y − bias from those of y, which are overwritten."""
    if bias is None:
        return moments
    shift = bias.detach().double()
    moments.half.subtract(moments.sum[0] - moments.count / 2 * shift, shift)
    return PackedMoments(moments.half, moments.sum - moments.count * shift, moments.count)


def _mean_abs(site: Site) -> MeanAbs:
    layer = site.layer
    return MeanAbs("input", dim=-1 - len(layer.kernel_size) if type(layer) in CONVS else -1)


def too_wide(sites: Sequence[Site], *, linear: bool = False, folds: bool = False) -> str:
    """A sentence about the sites that go without data because of their size; empty if there are none."""
    reads = _reads(sites, linear, folds)
    wide = [read.site for read in reads if read.without and type(read.site.layer) is not nn.Embedding]
    if not wide:
        return ""
    names = ", ".join(site.path for site in wide)
    return f"What {names} read of the data is too wide for its second moment: factored without data."


def fits(
    sites: Sequence[Site], held: int | Sequence[int] = _BYTES, *, linear: bool = False, room: int | None = None
) -> bool:
    """Whether the data is read once for all sites."""
    return len(list(_chunks(_reads(sites, linear, room=room), held))) <= 1


def _chunks(reads: Sequence[_Read], held: int | Sequence[int]) -> Iterator[tuple[int, int]]:
    """Spans of sites whose moments take no more bytes than may be; layers that read the same value share one."""
    most = [held] * len(reads) if isinstance(held, int) else held
    start, taken = 0, 0
    known: set[Hashable] = set()
    for index, read in enumerate(reads):
        size = 0 if read.without else read.bytes * len(read.values - known)
        if size and index > start and taken + size > min(most[start : index + 1]):
            yield start, index
            start, taken, known = index, 0, set()
            size = 0 if read.without else read.bytes * len(read.values)
        taken += size
        known |= read.values
    if start < len(reads):
        yield start, len(reads)
