"""The last factor of each site, fitted to the original output from what the rewritten layers before it produce."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import fx

from fxcompress.analysis.statistics import CrossMoment, CrossMoments, collect
from fxcompress.errors import OptionError
from fxcompress.graph.edit import GraphEditor
from fxcompress.graph.queries import calls_of
from fxcompress.passes.base import PassContext, Rewrite

__all__ = ["refit_outer", "ridge"]

_RIDGE = 1e-6  # of the mean variance: where the data says nothing, the factor stays as it is


def ridge(cross: torch.Tensor, moment: torch.Tensor, now: torch.Tensor) -> torch.Tensor:
    """A minimising Σ ‖y − A z‖² + λ ‖A − now‖²: ``[…, rows, d]`` from Σ y zᵀ, Σ z zᵀ and the present A."""
    scale = moment.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(1e-300)[..., None, None]
    one = torch.eye(moment.shape[-1], dtype=moment.dtype, device=moment.device)
    strength = _RIDGE * scale
    # In terms of the change of A, so that no rounding enters where nothing has to change.
    gradient = cross - now @ moment
    return now + torch.linalg.solve(moment + strength * one, gradient, left=False)


def refit_outer(
    original: fx.GraphModule,
    graph_module: fx.GraphModule,
    rewrites: Sequence[Rewrite],
    calibration: Iterable[Any],
    batches: int | None,
    context: PassContext,
) -> list[Rewrite]:
    """Fit the second layer of each rewritten site, in graph order, each after those before it.

    Runs both graphs over the data once per site.

    Raises:
        OptionError: the data can be read only once.
    """
    if isinstance(calibration, Iterator):
        raise OptionError(
            "refit reads the data again for every site, and this can be read only once",
            where="calibration",
            remedy="give a list or a DataLoader",
        )
    made: list[Rewrite] = []
    for rewrite in rewrites:
        path = rewrite.detail["layers"][-1]
        last: Any = graph_module.get_submodule(path)
        calls = calls_of(original, rewrite.site)
        layers = calls_of(graph_module, path)
        tied = sum(last.weight is p for p in graph_module.parameters()) > 1 or "tied_with" in rewrite.detail
        if rewrite.detail.get("embedding") or tied or getattr(last, "groups", 1) > 1:
            made.append(rewrite)
            continue
        dim = -1 if last.weight.dim() == 2 else 1
        found: list[CrossMoments] = []
        for call, layer in zip(calls, layers, strict=True):
            source = layer.args[0]
            assert isinstance(source, fx.Node)
            asked = CrossMoment(with_=source.name, dim=dim)
            read = collect(
                original,
                calibration,
                {call.name: asked},
                limit=batches,
                beside=graph_module,
                padding=False,
                progress=context.progress,
            )
            found.append(read[call.name, asked])
        sums = sum(found[1:], found[0])
        cross, moment = sums.cross, sums.moments.total[0]
        if last.bias is not None:
            cross = cross - last.bias.detach().double()[:, None] * sums.moments.sum
        now = last.weight.detach().double().flatten(1)
        fitted = ridge(cross, moment, now).reshape(last.weight.shape)
        with GraphEditor(graph_module) as editor:
            editor.set_tensor(f"{path}.weight", fitted.to(last.weight.dtype))
        made.append(dataclasses.replace(rewrite, detail={**rewrite.detail, "refitted": True}))
    return made
