"""Least-squares refit of the weights that read pruned channels.

A layer computed ``y = W x + b``; of x only the part ``x_K`` is left. With the mean μ and covariance C of x on
calibration data, the weights and bias that come closest to y in the mean square are

    W' = W C[:, K] C[K, K]⁻¹,        b' = b + W μ − W' μ_K

(He et al. 2017 do this for channels of convolutions; here rows of x are what the layer multiplies, im2col patches too.)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import fx, nn

from fxcompress.analysis.statistics import Moments, SecondMoment, collect
from fxcompress.graph.edit import GraphEditor
from fxcompress.passes.pruning.account import Kept

__all__ = ["Refit", "reconstruct"]

_MOMENTS = SecondMoment("input")
_BUDGET = 1 << 29  # bytes of second moments held at once; more layers are taken in further passes over the data
_RIDGE = 1e-6  # of the mean variance; keeps the fit stable where inputs depend on each other


@dataclass(frozen=True)
class Refit:
    """One layer: relative error of its output on the data, with the cut weights and with the fitted ones."""

    layer: str
    before: float
    after: float


def reconstruct(
    original: fx.GraphModule, pruned: fx.GraphModule, kept: Kept, data: Iterable[Any], limit: int | None
) -> list[Refit]:
    """Refit every linear layer and dense convolution of ``pruned`` that lost inputs.

    Args:
        original: the graph before the removal.
        pruned: the graph after it; it is changed.
        kept: weight → dimension → indices of ``original`` that are left.
        data: batches as for :func:`fxcompress.analysis.statistics.collect`.
        limit: most batches to read.

    Raises:
        PreconditionError: the data does not fit the model.
    """
    calls = _readers(original, kept)
    if not hasattr(data, "__len__"):
        data = list(islice(data, limit))  # it may have to be read more than once
    refits: list[Refit] = []
    with GraphEditor(pruned) as editor:
        for group in _affordable(original, calls):
            found = collect(original, data, {name: _MOMENTS for path in group for name in calls[path]}, limit=limit)
            for path in group:
                moments: Moments = found[calls[path][0], _MOMENTS]
                for name in calls[path][1:]:
                    moments = moments + found[name, _MOMENTS]
                refits.append(_refit(original, pruned, path, kept[f"{path}.weight"], moments, editor))
    return refits


def _readers(graph_module: fx.GraphModule, kept: Kept) -> dict[str, list[str]]:
    """Layers that lost inputs and hold their weight alone → the nodes that call them."""
    held: dict[int, int] = {}
    for _, parameter in graph_module.named_parameters(remove_duplicate=False):
        held[id(parameter)] = held.get(id(parameter), 0) + 1
    calls: dict[str, list[str]] = {}
    for node in graph_module.graph.find_nodes(op="call_module"):
        path = str(node.target)
        layer = graph_module.get_submodule(path)
        dense = isinstance(layer, nn.modules.conv._ConvNd) and layer.groups == 1 and not layer.transposed
        if not isinstance(layer, nn.Linear) and not dense:
            continue
        if 1 in kept.get(f"{path}.weight", {}) and held[id(layer.weight)] == 1:
            calls.setdefault(path, []).append(node.name)
    return calls


def _affordable(graph_module: fx.GraphModule, calls: dict[str, list[str]]) -> Iterator[list[str]]:
    group: list[str] = []
    spent = 0
    for path in calls:
        weight: Any = graph_module.get_submodule(path).weight
        cost = 8 * weight[0].numel() ** 2
        if group and spent + cost > _BUDGET:
            yield group
            group, spent = [], 0
        group.append(path)
        spent += cost
    if group:
        yield group


def _refit(
    original: fx.GraphModule,
    pruned: fx.GraphModule,
    path: str,
    kept: dict[int, list[int]],
    moments: Moments,
    editor: GraphEditor,
) -> Refit:
    old: Any = original.get_submodule(path)
    new: Any = pruned.get_submodule(path)
    device = moments.total.device
    weight = old.weight.detach().to(device, torch.float64)
    if 0 in kept:
        weight = weight[kept[0]]
    places = weight[0, 0].numel()
    channels = torch.as_tensor(kept[1], device=device)
    columns = (channels[:, None] * places + torch.arange(places, device=device)).flatten()
    flat = weight.flatten(1)
    with_bias = new.bias is not None
    spread = moments.covariance[0] if with_bias else moments.second[0]
    mean = moments.mean[0]
    inner = spread[columns][:, columns]
    ridge = _RIDGE * float(inner.diagonal().mean()) + torch.finfo(torch.float64).tiny
    inner = inner + ridge * torch.eye(len(columns), dtype=torch.float64, device=device)
    fitted = torch.linalg.solve(inner, spread[columns] @ flat.T).T
    power = float(torch.einsum("oi,ij,oj->", flat, spread, flat))
    padded = torch.zeros_like(flat)
    padded[:, columns] = fitted
    cut = flat.clone()
    cut[:, columns] = 0  # what the cut weights no longer carry
    lost = float(torch.einsum("oi,ij,oj->", cut, spread, cut))
    rest = flat - padded
    left = float(torch.einsum("oi,ij,oj->", rest, spread, rest))
    if left > lost:  # rounding of a nearly singular fit
        return Refit(path, _share(lost, power), _share(lost, power))
    editor.set_tensor(f"{path}.weight", fitted.reshape(new.weight.shape).to(new.weight))
    if with_bias:
        shift = flat @ mean - fitted @ mean[columns]
        editor.set_tensor(f"{path}.bias", (new.bias.detach().to(shift) + shift).to(new.bias))
    return Refit(path, _share(lost, power), _share(left, power))


def _share(error: float, power: float) -> float:
    return (max(error, 0.0) / power) ** 0.5 if power > 0 else 0.0
