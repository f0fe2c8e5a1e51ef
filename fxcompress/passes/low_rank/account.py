"""What the report says of a site: rank, cost before and after, and errors that were measured, not predicted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from fxcompress.analysis.macs import macs
from fxcompress.analysis.sizes import GraphSizes
from fxcompress.analysis.statistics import Moments, PackedMoments, Triangle
from fxcompress.graph.queries import module_of
from fxcompress.passes.low_rank.in_place import basis_of
from fxcompress.passes.low_rank.metric import Metric
from fxcompress.passes.low_rank.products import Packed
from fxcompress.passes.low_rank.truncate import product

__all__ = ["costs", "errors", "lost_mean", "macs_of"]

_PIECE = 1 << 18  # bytes of a weight that are compared at once: little beside a layer,
_ROWS = 32  # and rows at least, enough for a product


def macs_of(graph_module: fx.GraphModule, nodes: Sequence[fx.Node]) -> int | None:
    """Multiply-accumulates of layers at batch size 1; None in a graph without shapes."""
    sizes = GraphSizes(graph_module)
    if not sizes.known:
        return None
    return sum(macs(node, module_of(graph_module, node), sizes.of) for node in nodes)


def costs(before: int, after: int, macs_before: int | None, macs_after: int | None) -> dict[str, Any]:
    """The columns of cost, of parameters and of multiply-accumulates."""
    return {
        "parameters_before": before,
        "parameters_after": after,
        "macs_before": macs_before,
        "macs_after": macs_after,
    }


def errors(
    weight: torch.Tensor,
    approximation: torch.Tensor | tuple[torch.Tensor, torch.Tensor],
    metric: Metric,
    *,
    norm: float = 0.0,
) -> dict[str, Any]:
    """Relative error of the weight, and of the output on the data.

    Args:
        weight: ``[groups, rows, d]``.
        approximation: likewise, of the tensors as they stand in the graph now; or two factors, multiplied in pieces.
        metric: of the data; without them there is no ``output_error``. One of outputs takes the two factors for a
            projection of the weight, as :func:`~fxcompress.passes.low_rank.truncate.truncate` makes them.
        norm: square of the weight's, where it is known.
    """
    loss = energy = plain = 0.0
    unknown = not norm
    outer, inner = approximation if isinstance(approximation, tuple) else (approximation, None)
    # Without data float32 is enough for a float32 weight: what its differences round to is no error worth telling.
    moment = metric.of_inputs
    exact = moment is not None or weight.dtype == torch.float64
    wide = torch.float64 if exact else torch.float32
    step = max(_ROWS, _PIECE // wide.itemsize // max(1, weight.shape[-1] * len(weight)))
    packed = None if inner is None else [Packed(part.detach().to(wide).T, step) for part in inner]
    for old, piece in zip(weight.split(step, -2), outer.split(step, -2), strict=True):
        given, made = old.detach().to(wide), piece.detach().to(wide)
        if packed is not None:
            made = torch.stack([part.after(rows) for part, rows in zip(packed, made, strict=True)])
        difference = given - made
        plain, norm = plain + _energy(difference), norm + (_energy(given) if unknown else 0.0)
        if moment is not None:
            loss, energy = loss + _lost(difference, moment), energy + _lost(given, moment)
        del given, made, difference  # before what follows is made
    if metric.of_outputs is not None:
        loss, energy = metric.lost(outer)
    found: dict[str, Any] = {"weight_error": _relative(plain, norm), "output_error": None}
    if metric.measures:
        found |= {"output_error": _relative(loss, energy), "loss": max(loss, 0.0), "calibration_rows": metric.rows}
        found["jitter"] = metric.jitter
    return found


def lost_mean(
    weight: torch.Tensor, factors: tuple[torch.Tensor, torch.Tensor], moments: Moments | PackedMoments, metric: Metric
) -> torch.Tensor:
    """Mean of what the factors leave out of the output, ``[rows]``, of the moments that the metric is made of."""
    outer, inner = factors
    mean = moments.mean[..., None]
    if metric.of_outputs is not None:
        basis = basis_of(outer)
        return (mean - basis @ (basis.mT @ mean))[0, :, 0]
    return (product(weight, mean) - product(outer, product(inner, mean)))[0, :, 0]


def _lost(error: torch.Tensor, moment: torch.Tensor | Triangle) -> float:
    """tr(E C Eᵀ)."""
    if isinstance(moment, Triangle):
        wide = error[0].T
        return float(moment.times(wide).mul_(wide).sum())
    return float(((error @ moment) * error).sum())


def _energy(tensor: torch.Tensor) -> float:
    flat = tensor.reshape(-1)
    return float(flat @ flat)


def _relative(part: float, whole: float) -> float:
    return math.sqrt(max(part, 0.0) / whole) if whole > 0 else 0.0
