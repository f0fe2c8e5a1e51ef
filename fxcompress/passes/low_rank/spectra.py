"""Spectra alone, from which ranks follow before any layer is factored.

All eigenvectors of a matrix take three times its memory, all eigenvalues twice. Where even those are more than may live
beside a model they are computed in float32, which tells how many components are worth keeping to one or two, and a
moment that was read for them is let go on the way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from fxcompress.passes.low_rank.budget import eigenvectors
from fxcompress.passes.low_rank.grams import gram
from fxcompress.passes.low_rank.metric import Metric
from fxcompress.passes.low_rank.truncate import LARGE

__all__ = ["crowded", "may_be_crowded", "spectra", "spectrum"]

_FLOAT32, _FLOAT64 = 4, 8  # bytes


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


def crowded(weight: torch.Tensor, room: int, measured: bool) -> bool:
    """Whether all eigenvectors of the smaller Gram matrix are more than may live beside a model.

    Args:
        weight: ``[groups, rows, d]``.
        room: bytes that may.
        measured: whether a packed moment lives beside them.
    """
    size = min(weight.shape[-2:])
    moment = measured * _FLOAT64 * size**2 * 9 // 16
    return may_be_crowded(weight) and eigenvectors(size, _FLOAT64) + moment > room


def may_be_crowded(weight: torch.Tensor) -> bool:
    """Whether a weight is large enough for memory to be worth a thought, and float32 enough for it."""
    return len(weight) == 1 and min(weight.shape[-2:]) >= LARGE and weight.dtype != torch.float64
