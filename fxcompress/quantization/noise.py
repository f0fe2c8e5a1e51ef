"""How far quantized activations are from floating-point ones, layer by layer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

__all__ = ["Noise", "layer_noise"]


@dataclass(frozen=True)
class Noise:
    """Of one layer's output, both graphs fed the same inputs.

    Attributes:
        signal: mean square of the floating-point output.
        noise: mean square of the difference.
    """

    signal: float
    noise: float

    @property
    def decibels(self) -> float:
        """Signal-to-noise ratio, 10 log₁₀(signal / noise); infinite without noise."""
        if self.noise == 0:
            return math.inf
        return 10 * math.log10(self.signal / self.noise) if self.signal > 0 else -math.inf


def layer_noise(
    floating: fx.GraphModule, quantized: fx.GraphModule, nodes: Mapping[str, str], leaves: Sequence[Any]
) -> dict[str, Noise]:
    """Run both graphs on one batch and compare.

    Args:
        floating: the graph before quantization.
        quantized: the graph after it.
        nodes: layer → name of the node that calls it, the same in both graphs.
        leaves: flat inputs.
    """
    wanted = set(nodes.values())
    reference = _Recorder(floating, wanted)
    reference.run(*leaves)
    found: dict[str, tuple[float, float]] = {}

    def compare(name: str, value: torch.Tensor) -> None:
        signal = reference.kept.pop(name).double()
        found[name] = float(signal.square().mean()), float((value.double() - signal).square().mean())

    comparing = _Recorder(quantized, wanted)
    comparing.take = compare  # type: ignore[method-assign]
    comparing.run(*leaves)
    return {layer: Noise(*found[name]) for layer, name in nodes.items() if name in found}


class _Recorder(fx.Interpreter):
    """Runs a graph in eval mode and keeps what the wanted nodes give."""

    def __init__(self, graph_module: fx.GraphModule, wanted: set[str]) -> None:
        super().__init__(graph_module)
        self.wanted = wanted
        self.kept: dict[str, torch.Tensor] = {}

    def take(self, name: str, value: torch.Tensor) -> None:
        self.kept[name] = value

    def run(self, *leaves: Any) -> None:  # type: ignore[override]
        with torch.no_grad():
            super().run(*leaves, enable_io_processing=False)

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.name in self.wanted and isinstance(value, torch.Tensor):
            self.take(n.name, value)
        return value
