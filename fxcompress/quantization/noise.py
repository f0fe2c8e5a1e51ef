"""How far quantized activations are from floating-point ones, layer by layer.

::

    for item in compare_layers(compiled.module, data):
        print(item)                      # layer4.1.conv2: 17.3 dB, largest error 1.2 of 8.1
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from fxcompress.analysis.statistics.padding import real_positions, without_padding
from fxcompress.errors import PreconditionError
from fxcompress.graph.batches import batches
from fxcompress.graph.copying import copy_graph
from fxcompress.quantization.fake_quant import Quantizer
from fxcompress.quantization.layers import QUANTIZED

__all__ = ["LayerNoise", "Noise", "compare_layers", "layer_noise", "switched_off"]


@dataclass(frozen=True)
class Noise:
    """Of one layer's output, both graphs fed the same inputs.

    Attributes:
        signal: mean square of the floating-point output.
        noise: mean square of the difference.
        largest: largest absolute difference.
        peak: largest absolute floating-point output.
        shift: mean of the difference.
    """

    signal: float
    noise: float
    largest: float = 0.0
    peak: float = 0.0
    shift: float = 0.0

    @property
    def decibels(self) -> float:
        """Signal-to-noise ratio, 10 log₁₀(signal / noise); infinite without noise."""
        if self.noise == 0:
            return math.inf
        return 10 * math.log10(self.signal / self.noise) if self.signal > 0 else -math.inf


@dataclass(frozen=True)
class LayerNoise:
    """One line of a comparison: ``layer``, ``kind`` (``"Conv2d"``), and the :class:`Noise` of its output."""

    layer: str
    kind: str
    noise: Noise

    def __str__(self) -> str:
        found = self.noise
        return f"{self.layer}: {found.decibels:.1f} dB, largest error {found.largest:.3g} of {found.peak:.3g}"


def compare_layers(
    graph_module: fx.GraphModule, data: Iterable[Any], *, limit: int | None = None, reference: Any = None
) -> list[LayerNoise]:
    """Compare what each quantized layer gives with what it gives in floating point, the noisiest first.

    The noise of a layer is its own and that of all layers before it. Memory does not depend on the number of batches.

    Args:
        graph_module: with calibrated stubs: ``compiled.module`` after ``Quantize``.
        data: batches: what the model takes, or that and labels.
        limit: most batches to read; None reads all.
        reference: a graph with the same layers to compare with; by default ``graph_module`` with its stubs switched
            off. Give the graph from before where weights were rounded in place (``RoundAdaptively``).

    Raises:
        PreconditionError: no layer is quantized, or the data is empty or does not fit.
    """
    kinds = {cls: plain.__name__ for plain, cls in QUANTIZED.items()}
    layers = {
        str(node.target): kinds[type(graph_module.get_submodule(str(node.target)))]
        for node in graph_module.graph.find_nodes(op="call_module")
        if type(graph_module.get_submodule(str(node.target))) in kinds
    }
    if not layers:
        raise PreconditionError("no layer of the graph is quantized", remedy="run Quantize first")
    floating = switched_off(graph_module) if reference is None else reference
    found = layer_noise(floating, graph_module, layers, data, limit=limit)
    made = [LayerNoise(path, layers[path], noise) for path, noise in found.items()]
    return sorted(made, key=lambda item: item.noise.decibels)


def switched_off(graph_module: fx.GraphModule) -> fx.GraphModule:
    """A copy that rounds nothing and shares the weights."""
    copied = copy_graph(graph_module)
    for module in copied.modules():
        if isinstance(module, Quantizer):
            module.enabled = False
    return copied


def layer_noise(
    floating: fx.GraphModule,
    quantized: fx.GraphModule,
    layers: Collection[str],
    data: Iterable[Any],
    *,
    limit: int | None = None,
) -> dict[str, Noise]:
    """Run both graphs on data and compare what these layers give; a layer called several times counts as one.

    What linear layers give at positions that a batch's mask says are padding does not count.

    Args:
        floating: the graph before quantization.
        quantized: the graph after it.
        layers: paths, the same in both graphs.
        data: batches.
        limit: most batches to read.
    """
    calls = {
        node.name: str(node.target)
        for node in quantized.graph.find_nodes(op="call_module")
        if str(node.target) in set(layers)
    }
    sums = {path: _Sums() for path in layers}
    linear = {path for path in layers if isinstance(quantized.get_submodule(path), nn.Linear)}
    kept: dict[str, torch.Tensor] = {}

    def compare(name: str, found: torch.Tensor) -> None:
        path = calls[name]
        expected, found = (without_padding(x, real if path in linear else None) for x in (kept.pop(name), found))
        sums[path].add(expected, found)

    for batch in batches(quantized, data, limit=limit):
        real = real_positions(quantized, batch.leaves)
        _Watcher(floating, calls, kept.__setitem__).run(*batch.leaves)
        _Watcher(quantized, calls, compare).run(*batch.leaves)
    return {path: found.noise() for path, found in sums.items()}


class _Sums:
    """Adds up what :class:`Noise` is made of."""

    def __init__(self) -> None:
        self.count = 0
        self.signal = self.error = self.shift = self.largest = self.peak = 0.0

    def add(self, expected: torch.Tensor, found: torch.Tensor) -> None:
        wide, difference = expected.double(), found.double() - expected.double()
        self.count += wide.numel()
        self.signal += float(wide.square().sum())
        self.error += float(difference.square().sum())
        self.shift += float(difference.sum())
        if wide.numel():
            self.largest = max(self.largest, float(difference.abs().max()))
            self.peak = max(self.peak, float(wide.abs().max()))

    def noise(self) -> Noise:
        count = max(1, self.count)
        return Noise(self.signal / count, self.error / count, self.largest, self.peak, self.shift / count)


class _Watcher(fx.Interpreter):
    """Runs a graph in eval mode and hands on what some nodes give."""

    def __init__(
        self, graph_module: fx.GraphModule, names: Collection[str], take: Callable[[str, torch.Tensor], None]
    ) -> None:
        copied = copy_graph(graph_module)
        for module in copied.modules():
            module.training = False
        super().__init__(copied)
        self.names, self.take = names, take

    def run(self, *leaves: Any) -> None:  # type: ignore[override]
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            super().run(*leaves, enable_io_processing=False)

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.name in self.names:
            self.take(n.name, value)
        return value
