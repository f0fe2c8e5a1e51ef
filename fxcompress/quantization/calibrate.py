"""Grids for the stubs of a graph: of weights from the weights, of activations from what data makes of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxcompress.analysis.statistics import collect
from fxcompress.errors import PreconditionError
from fxcompress.graph.copying import copy_graph
from fxcompress.graph.edit import GraphEditor
from fxcompress.quantization.fake_quant import Quantizer
from fxcompress.quantization.layers import QUANTIZED
from fxcompress.quantization.observers import observed_range, statistic_of, weight_range
from fxcompress.quantization.types import parameters_of_range

__all__ = ["Calibrated", "calibrate", "stubs_of"]


@dataclass(frozen=True)
class Calibrated:
    """The grid of one stub.

    Attributes:
        path: of the stub.
        values: names of the nodes that it rounds; of a weight, the layer.
        low: least value that the grid holds.
        high: greatest value.
        scale: of the grid; of a weight with several, the largest.
        zero_point: likewise.
        note: what was unusual, or nothing.
    """

    path: str
    values: tuple[str, ...]
    low: float
    high: float
    scale: float
    zero_point: int
    note: str = ""


def stubs_of(graph_module: fx.GraphModule) -> dict[str, list[fx.Node]]:
    """Stubs of activations: path → the nodes that call it."""
    found: dict[str, list[fx.Node]] = {}
    for node in graph_module.graph.find_nodes(op="call_module"):
        if isinstance(graph_module.get_submodule(str(node.target)), Quantizer):
            found.setdefault(str(node.target), []).append(node)
    return found


def calibrate(
    graph_module: fx.GraphModule,
    data: Iterable[Any],
    *,
    observer: str,
    weight_observer: str = "minmax",
    percentile: float = 99.99,
    limit: int | None = None,
    progress: Callable[[int, int, str], None] | None = None,
    known: dict[str, Any] | None = None,
) -> list[Calibrated]:
    """Set the grid of every stub. Activations are those of the model in floating point.

    Args:
        graph_module: has stubs; it is changed.
        data: batches as for :func:`fxcompress.analysis.statistics.collect`.
        observer: of activations.
        weight_observer: ``minmax`` or ``mse``.
        percentile: for the observer of that name.
        limit: most batches to read.
        progress: called with (done, total, what).
        known: what was seen of values on the same data before, by the name of their node; new ones are added.

    Raises:
        PreconditionError: there are no stubs, the data is empty or does not fit, or an activation is not finite.
    """
    stubs = stubs_of(graph_module)
    layers = _quantized_layers(graph_module)
    if not stubs and not layers:
        raise PreconditionError("the graph has no quantization stubs", remedy="run InsertQuantStubs first, or Quantize")
    floating = _without_rounding(graph_module, stubs, layers)
    statistic = statistic_of(observer)
    known = {} if known is None else known
    wanted = {str(node.args[0]): statistic for nodes in stubs.values() for node in nodes}
    requests = {name: statistic for name in wanted if name not in known}
    if requests or not wanted:
        found = collect(floating, data, requests, limit=limit, progress=progress)
        known.update({name: found[name, statistic] for name in requests})
    told: list[Calibrated] = []
    with GraphEditor(graph_module) as editor:
        for path, nodes in stubs.items():
            values = tuple(str(node.args[0]) for node in nodes)
            quantizer = _fresh(graph_module, path)
            seen = [known[value] for value in values]
            low, high = observed_range(observer, seen, quantizer.kind, percentile)
            grid = parameters_of_range(torch.tensor(low), torch.tensor(high), quantizer.kind)
            quantizer.set(*grid)
            editor.set_module(path, quantizer, reshaped=False)
            note = "all values were zero: any scale serves" if low == high == 0 else ""
            told.append(Calibrated(path, values, low, high, float(grid[0]), int(grid[1]), note))
        for path in layers:
            told.append(_set_weight(graph_module, editor, path, weight_observer))
    return told


def _set_weight(graph_module: fx.GraphModule, editor: GraphEditor, path: str, observer: str) -> Calibrated:
    layer: Any = graph_module.get_submodule(path)
    if not bool(torch.isfinite(layer.weight).all()):
        raise PreconditionError("the weight is not finite", where=path, remedy="repair the checkpoint")
    quantizer = _fresh(graph_module, f"{path}.weight_quantizer")
    low, high = weight_range(layer.weight, quantizer.axis, quantizer.kind, observer)
    scale, zero = parameters_of_range(low, high, quantizer.kind)
    quantizer.set(scale, zero)
    layer.add_module("weight_quantizer", quantizer)
    dead = int((torch.as_tensor(high - low) == 0).sum())
    note = f"{dead} channels are all zero" if dead else ""
    top = int(scale.argmax()) if scale.dim() else 0
    return Calibrated(
        f"{path}.weight_quantizer",
        (path,),
        float(torch.as_tensor(low).min()),
        float(torch.as_tensor(high).max()),
        float(scale.flatten()[top]),
        int(zero.flatten()[top]),
        note,
    )


def _quantized_layers(graph_module: fx.GraphModule) -> list[str]:
    kinds = tuple(QUANTIZED.values())
    paths = dict.fromkeys(str(node.target) for node in graph_module.graph.find_nodes(op="call_module"))
    return [path for path in paths if isinstance(graph_module.get_submodule(path), kinds)]


def _fresh(graph_module: fx.GraphModule, path: str) -> Quantizer:
    """A stub like the one at ``path``, not calibrated."""
    old: Any = graph_module.get_submodule(path)
    return Quantizer(old.kind, old.axis, old.scale.numel() if old.axis is not None else None)


def _without_rounding(graph_module: fx.GraphModule, stubs: Iterable[str], layers: Iterable[str]) -> fx.GraphModule:
    copied = copy_graph(graph_module)
    for path in [*stubs, *(f"{layer}.weight_quantizer" for layer in layers)]:
        quantizer: Any = copied.get_submodule(path)
        quantizer.enabled = False
    return copied
