"""Spectra alone, from which ranks follow before any layer is factored.

All eigenvectors of a matrix take three times its memory, all eigenvalues twice. Where even those are more than may live
beside a model they are computed in float32, which tells how many components are worth keeping to one or two, and a
moment that was read for them is let go on the way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from fxcompress.passes.low_rank.budget import LARGE
from fxcompress.passes.low_rank.grams import gram, pieces
from fxcompress.passes.low_rank.metric import Metric

__all__ = ["may_be_crowded", "spectra", "spectrum", "told"]

_FLOAT64 = 8  # bytes
_PRECISE = 30  # times its rounding a sum of eigenvalues has to be, to count
_RANGE = 1e30  # of squares that float32 bears


def spectrum(weight: torch.Tensor, metric: Metric, *, room: int | None = None, spend: bool = False) -> torch.Tensor:
    """Squares of the singular values of W S, falling, float64 ``[groups, min(rows, d)]``.

    Args:
        weight: ``[groups, rows, d]``.
        metric: with the root S.
        room: bytes that it may take; beyond them float32 takes the place of float64 in large matrices.
        spend: whether the metric is needed no more, so that its moment may be let go.
    """
    narrow = (
        room is not None and may_be_crowded(weight) and 2 * _FLOAT64 * min(weight.shape[-2:]) ** 2 + metric.held > room
    )
    if narrow:  # all in float32's range?
        norm = metric.of_outputs.trace if metric.by_moment and metric.of_outputs is not None else _energy(weight)
        narrow = 1 / _RANGE < norm < _RANGE
    if spend and not metric.by_moment and metric.of_outputs is not None:
        metric.of_outputs.bands.clear()  # it only measures
    matrix = gram(weight, metric, torch.float32 if narrow else torch.float64, spend=spend)[0]
    values = torch.linalg.eigvalsh(matrix).double()
    return values.flip(-1).clamp_min(0)[:, : min(weight.shape[-2:])]


def spectra(
    metrics: Iterable[tuple[Any, Metric, Any]],
    matrix_of: Callable[[Any], torch.Tensor],
    room: int,
    root: Callable[[Metric], Metric],
    *,
    spend: bool,
) -> dict[Any, torch.Tensor]:
    """Of each site; one metric lives at a time.

    Args:
        metrics: each site with its metric, and moments that are not looked at.
        matrix_of: the weight of a site.
        room: bytes that may live beside the model.
        root: what of a metric weighs.
        spend: whether the metrics are needed no more.
    """
    found: dict[Any, torch.Tensor] = {}
    for site, metric, moments in metrics:
        found[site] = spectrum(matrix_of(site), root(metric), room=room, spend=spend)
        del metric, moments  # before the next one's are made
    return found


def told(energies: torch.Tensor, rank: int) -> bool:
    """Whether what lies beyond a rank is much more than what float32 may have made of it.

    Args:
        energies: of :func:`spectrum`, ``[n]``.
        rank: that was chosen by them.
    """
    rounding = len(energies) * torch.finfo(torch.float32).eps * float(energies[0])
    return float(energies[max(rank - 1, 0) :].sum()) > _PRECISE * rounding


def may_be_crowded(weight: torch.Tensor) -> bool:
    """Whether a weight is large enough for memory to be worth a thought, and float32 enough for it."""
    return len(weight) == 1 and min(weight.shape[-2:]) >= LARGE and weight.dtype != torch.float64


def _energy(weight: torch.Tensor) -> float:
    return sum(float(rows.double().square().sum()) for rows in weight[0].split(pieces(weight.shape[-1])))
