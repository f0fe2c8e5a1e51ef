"""Grids for the stubs of a graph: of weights from the weights, of activations from what data makes of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fxcompress.analysis.statistics import collect
from fxcompress.errors import PreconditionError
from fxcompress.graph.batches import as_batch
from fxcompress.graph.copying import copy_graph
from fxcompress.graph.edit import GraphEditor
from fxcompress.quantization.damage import SAMPLES, NotDifferentiableError, damage_of_grids
from fxcompress.quantization.fake_quant import Quantizer
from fxcompress.quantization.layers import QUANTIZED
from fxcompress.quantization.observers import CANDIDATES, extremes, observed_range, statistic_of, weight_range
from fxcompress.quantization.types import QuantType, parameters_of_range

__all__ = ["Calibrated", "Calibration", "calibrate", "stubs_of"]


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


@dataclass(frozen=True)
class Calibration:
    """The grids, and what they cost.

    Attributes:
        grids: of every stub and weight.
        samples: that ranges were collected on; 0 where all was known before.
        seconds: that it took.
        refined: samples that were run there and back to choose between ranges.
        refining: seconds that it took.
    """

    grids: list[Calibrated]
    samples: int
    seconds: float
    refined: int
    refining: float

    def __str__(self) -> str:
        told = f"calibrated on {self.samples} samples in {self.seconds:.3g} s"
        return f"{told}, ranges refined on {self.refined} of them in {self.refining:.3g} s" if self.refined else told


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
    known: dict[Any, Any] | None = None,
) -> Calibration:
    """Set the grid of every stub. Activations are those of the model in floating point.

    Args:
        graph_module: has stubs; it is changed.
        data: batches as for :func:`fxcompress.analysis.statistics.collect`.
        observer: of activations. ``damage`` reads the first samples again, there and back.
        weight_observer: ``minmax`` or ``mse``.
        percentile: for the observer of that name.
        limit: most batches to read.
        progress: called with (done, total, what).
        known: what was seen of values on the same data before, by the name of their node, and ranges chosen by damage,
            by the names of the nodes that share them; new ones are added.

    Raises:
        PreconditionError: there are no stubs, the data is empty or does not fit, or an activation is not finite or
            never had an element.
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
    read = _Remembered(floating, data) if isinstance(data, Iterator) else data
    samples, started = 0, time.perf_counter()
    if requests or not wanted:
        found = collect(floating, read, requests, limit=limit, progress=progress, padding=False)
        samples = found.samples
        known.update({name: found[name, statistic] for name in requests})
    kinds = {path: _fresh(graph_module, path).kind for path in stubs}
    values = {path: tuple(str(node.args[0]) for node in nodes) for path, nodes in stubs.items()}
    seen = {path: [known[value] for value in values[path]] for path in stubs}
    fallback, refined, collected = "", 0, time.perf_counter()
    if observer == "damage":
        fresh = {path: found for path, found in seen.items() if values[path] not in known}
        chosen, refined, fallback = _least_damage(floating, read, fresh, kinds, percentile, limit)
        known.update({values[path]: ends for path, ends in chosen.items()})
        ranges = {path: known[values[path]] for path in stubs}
    else:
        ranges = {path: observed_range(observer, seen[path], kinds[path], percentile) for path in stubs}
    ready = time.perf_counter()
    told: list[Calibrated] = []
    with GraphEditor(graph_module) as editor:
        for path, (low, high) in ranges.items():
            quantizer = _gridded(graph_module, path, low, high)
            editor.set_module(path, quantizer, reshaped=False)
            scale, zero = float(quantizer.scale), int(quantizer.zero_point)
            told.append(
                Calibrated(path, values[path], low, high, scale, zero, _unusual(*extremes(seen[path])) or fallback)
            )
        for path in layers:
            told.append(_set_weight(graph_module, editor, path, weight_observer))
    return Calibration(told, samples, collected - started, refined, ready - collected)


class _Remembered:
    """An iterator whose first samples can be read again."""

    def __init__(self, graph_module: fx.GraphModule, data: Iterator[Any]) -> None:
        self.graph_module, self.data, self.first = graph_module, data, list[Any]()

    def __iter__(self) -> Iterator[Any]:
        if self.first:
            yield from self.first
            return
        samples = 0
        for batch in self.data:
            yield batch
            if samples < SAMPLES:
                self.first.append(batch)
                samples += as_batch(self.graph_module, batch).size


def _least_damage(
    floating: fx.GraphModule,
    data: Iterable[Any],
    seen: Mapping[str, list[Any]],
    kinds: Mapping[str, QuantType],
    percentile: float,
    limit: int | None,
) -> tuple[dict[str, tuple[float, float]], int, str]:
    """For each stub the range of those that the candidates give which moves the outputs least; samples; why not."""
    ranges = {
        path: list(dict.fromkeys(observed_range(name, found, kinds[path], percentile) for name in CANDIDATES))
        for path, found in seen.items()
    }
    grids = {path: [_gridded(floating, path, *ends) for ends in found] for path, found in ranges.items()}
    open_ = {path: found for path, found in grids.items() if len(found) > 1}
    why, samples = "", 0
    damage: dict[str, list[float]] = {}
    try:
        damage, samples = damage_of_grids(floating, data, open_, limit=limit) if open_ else ({}, 0)
    except NotDifferentiableError as error:
        why = f"by {CANDIDATES[0]} instead: {error.problem}"
    best = {path: min(range(len(found)), key=found.__getitem__) for path, found in damage.items()}
    return {path: found[best.get(path, 0)] for path, found in ranges.items()}, samples, why


def _unusual(low: float, high: float) -> str:
    if low != high:
        return ""
    return "all values were zero: any scale serves" if low == 0 else "all values were the same"


def _set_weight(graph_module: fx.GraphModule, editor: GraphEditor, path: str, observer: str) -> Calibrated:
    layer: Any = graph_module.get_submodule(path)
    if not bool(torch.isfinite(layer.weight).all()):
        raise PreconditionError("the weight is not finite", where=path, remedy="repair the checkpoint")
    quantizer = _fresh(graph_module, f"{path}.weight_quantizer")
    low, high = weight_range(layer.weight, quantizer.axis, quantizer.kind, observer)
    scale, zero = parameters_of_range(low, high, quantizer.kind)
    quantizer.set(scale, zero)
    layer.add_module("weight_quantizer", quantizer)
    layer.restore_bias()  # it made up for another grid
    dead = int((torch.as_tensor(high - low) == 0).sum())
    note = f"{dead} {'channel is' if dead == 1 else 'channels are'} all zero" if dead else ""
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


def _gridded(graph_module: fx.GraphModule, path: str, low: float, high: float) -> Quantizer:
    """A stub like the one at ``path`` with the grid of a range."""
    quantizer = _fresh(graph_module, path)
    quantizer.set(*parameters_of_range(torch.tensor(low), torch.tensor(high), quantizer.kind))
    return quantizer


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
