"""The last factor of each site, fitted to the original output from what the rewritten layers before it produce."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import fx

from fxcompress.analysis.statistics import CrossMoment, CrossMoments, collect
from fxcompress.errors import OptionError
from fxcompress.graph.edit import GraphEditor
from fxcompress.graph.queries import calls_of
from fxcompress.passes.base import PassContext, Rewrite
from fxcompress.passes.low_rank.account import errors
from fxcompress.passes.low_rank.least_squares import Sums, fit
from fxcompress.passes.low_rank.metric import plain_metric

__all__ = ["refit_outer"]


def refit_outer(
    original: fx.GraphModule,
    graph_module: fx.GraphModule,
    rewrites: Sequence[Rewrite],
    calibration: Iterable[Any],
    batches: int | None,
    context: PassContext,
    *,
    held: int = 1 << 30,
    unproven: float | None = None,
) -> list[Rewrite]:
    """Fit the last layer of each rewritten site, in graph order, each after those before it.

    Runs both graphs over the data once for all sites that do not read each other.

    Args:
        original: the graph before.
        graph_module: the graph now.
        rewrites: of it.
        calibration: batches.
        batches: most to read.
        context: for the progress.
        held: bytes of moments that may be held at once.
        unproven: strength of a fit to one sample, which nothing can be held against: see
            :func:`~fxcompress.passes.low_rank.least_squares.fit`.

    Raises:
        OptionError: the data can be read only once.
    """
    if isinstance(calibration, Iterator):
        raise OptionError(
            "refit reads the data again for every site, and this can be read only once",
            where="calibration",
            remedy="give a list or a DataLoader",
        )
    made = list(rewrites)
    for together in _independent(graph_module, _fitted_sites(graph_module, rewrites), held):
        requests: dict[str, list[CrossMoment]] = {}
        pairs: dict[int, list[tuple[str, CrossMoment]]] = {}
        for index in together:
            last, layers = _last(graph_module, rewrites[index])
            dim = 1 - last.weight.dim()  # of features: before those of positions
            pairs[index] = [
                (call.name, CrossMoment(with_=_source(layer).name, dim=dim, folds=True))
                for call, layer in zip(calls_of(original, rewrites[index].site), layers, strict=True)
            ]
            for name, asked in pairs[index]:
                requests.setdefault(name, []).append(asked)
        read = collect(
            original,
            calibration,
            requests,
            limit=batches,
            beside=graph_module,
            padding=False,
            progress=context.progress,
        )
        with GraphEditor(graph_module) as editor:
            for index in together:
                rewrite = rewrites[index]
                last = _last(graph_module, rewrite)[0]
                sums = _of_all([_without_bias(last, read.pop(pair)) for pair in pairs[index]])
                weight, measured = _refitted(last, sums, unproven)
                del sums  # before the next ones are made
                editor.set_tensor(f"{rewrite.detail['layers'][-1]}.weight", weight)
                measured["weight_error"] = _weight_error(original, graph_module, rewrite)
                kept = {key: value for key, value in rewrite.detail.items() if key != "tail"}
                made[index] = dataclasses.replace(rewrite, detail={**kept, **measured, "refitted": True})
    return made


def _last(graph_module: fx.GraphModule, rewrite: Rewrite) -> tuple[Any, Sequence[fx.Node]]:
    path = rewrite.detail["layers"][-1]
    return graph_module.get_submodule(path), calls_of(graph_module, path)


def _source(node: fx.Node) -> fx.Node:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    return source


def _fitted_sites(graph_module: fx.GraphModule, rewrites: Sequence[Rewrite]) -> dict[int, Sequence[fx.Node]]:
    """Calls of the last layer of each site that can be fitted: its weight is its own and it is not grouped."""
    found: dict[int, Sequence[fx.Node]] = {}
    names = Counter(id(p) for _, p in graph_module.named_parameters(remove_duplicate=False))
    for index, rewrite in enumerate(rewrites):
        last, layers = _last(graph_module, rewrite)
        tied = names[id(last.weight)] > 1 or "tied_with" in rewrite.detail
        if not (rewrite.detail.get("embedding") or tied or getattr(last, "groups", 1) > 1):
            found[index] = layers
    return found


def _independent(graph_module: fx.GraphModule, sites: dict[int, Sequence[fx.Node]], held: int) -> Iterator[list[int]]:
    """Sites in order, those together of which none reads what another produces: the projections of an attention.

    Their moments take no more than ``held`` bytes, those of one site apart.
    """
    owner = {node: index for index, nodes in sites.items() for node in nodes}
    depth: dict[fx.Node, int] = {}  # of sites on the way to what a node reads
    reached: dict[int, int] = {}
    for node in graph_module.graph.nodes:
        depth[node] = max((depth[item] for item in node.all_input_nodes), default=0)
        if node in owner:
            reached[owner[node]] = max(reached.get(owner[node], 0), depth[node])
            depth[node] += 1
    order: dict[int, list[int]] = defaultdict(list)
    for index, level in reached.items():
        order[level].append(index)
    for level in sorted(order):
        together: list[int] = []
        taken = 0
        for index in order[level]:
            layer: Any = graph_module.get_submodule(str(sites[index][0].target))
            outputs, inputs = layer.weight.shape[:2]
            size = 2 * 8 * inputs * (outputs + inputs) * len(sites[index])
            if together and taken + size > held:
                yield together
                together, taken = [], 0
            together.append(index)
            taken += size
        yield together


def _refitted(last: Any, sums: Sums, unproven: float | None) -> tuple[torch.Tensor, dict[str, Any]]:
    """The weight of ``last`` with which it comes closest to the original output, and what it then loses."""
    fitted = fit(sums, last.weight.detach().flatten(1), unproven)
    loss = sums.loss(fitted.factor)
    error = math.sqrt(loss / sums.energy) if sums.energy > 0 else 0.0
    return fitted.factor.reshape(last.weight.shape), {"loss": loss, "output_error": error, **fitted.detail}


def _without_bias(last: Any, moments: CrossMoments) -> Sums:
    """Of the output less the bias; written over the moments."""
    energy = moments.energy
    if last.bias is not None:
        bias = last.bias.detach().double()
        moments.cross.addr_(bias, moments.moments.sum[0], alpha=-1)
        energy += float(moments.moments.count * bias.square().sum() - 2 * bias @ moments.sum)
    fold = None if moments.fold is None else _without_bias(last, moments.fold)
    return Sums(moments.cross, moments.moments.total[0], energy, fold)


def _of_all(calls: list[Sums]) -> Sums:
    """Of all calls of a layer, in the place of the first."""
    first = calls[0]
    for other in calls[1:]:
        first += other
    return first


def _weight_error(original: fx.GraphModule, graph_module: fx.GraphModule, rewrite: Rewrite) -> float | None:
    """Of two linear layers; None where something stands between them, so that they are no matrix."""
    layer: Any = original.get_submodule(rewrite.site)
    first: Any = graph_module.get_submodule(rewrite.detail["layers"][0])
    last: Any = graph_module.get_submodule(rewrite.detail["layers"][-1])
    if len(rewrite.detail["layers"]) > 2 or getattr(first, "groups", 1) > 1:
        return None
    given, outer, inner = (item.weight.detach().flatten(1)[None] for item in (layer, last, first))
    return float(errors(given, (outer, inner), plain_metric())["weight_error"])
