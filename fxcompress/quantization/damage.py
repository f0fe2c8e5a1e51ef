"""How much the rounding of each place in a graph moves the outputs, all places from one walk there and back.

To first order a rounding error Δ at a value moves the outputs by J Δ, J being the Jacobian of the outputs there. With
random signs v on the outputs, E (vᵀ J Δ)² = ‖J Δ‖² (Hutchinson 1989), and vᵀ J for every value of the graph is one
backward pass. So the damage of each stub alone costs a forward and a backward pass in all, not one run for each layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from fxcompress.graph.batches import batches
from fxcompress.graph.copying import copy_graph
from fxcompress.quantization.fake_quant import Quantizer
from fxcompress.quantization.layers import QUANTIZED

__all__ = ["Damage", "measure_damage"]

_LAYERS = tuple(QUANTIZED.values())


@dataclass(frozen=True)
class Damage:
    """Expected squared movement of the outputs, relative to their square.

    Attributes:
        weights: by the rounding of a layer's weight: path → damage.
        stubs: by that of a value: path of its stub → damage.
        layers: of a layer's weight and of the stubs right before and behind it.
    """

    weights: Mapping[str, float]
    stubs: Mapping[str, float]
    layers: Mapping[str, float] = field(default_factory=dict)


def measure_damage(graph_module: fx.GraphModule, data: Iterable[Any], *, samples: int = 32) -> Damage:
    """The damage of every stub of a calibrated graph, each on its own.

    Args:
        graph_module: with calibrated stubs; left as it is.
        data: batches; the first that hold ``samples`` samples are used.
        samples: more make the estimate steadier.

    Raises:
        PreconditionError: the data is empty or does not fit.
    """
    copied = copy_graph(graph_module)
    for module in copied.modules():
        module.training = False
    runner = _Runner(copied)
    generator = torch.Generator().manual_seed(0)
    power, seen = 0.0, 0
    for batch in batches(copied, data):
        power += runner.add(batch.leaves, generator)
        seen += batch.size
        if seen >= samples:
            break
    weights = {path: total / max(power, 1e-30) for path, total in runner.weights.items()}
    stubs = {path: total / max(power, 1e-30) for path, total in runner.stubs.items()}
    return Damage(weights, stubs, _by_layer(copied, weights, stubs))


class _Runner(fx.Interpreter):
    """Runs the graph in floating point with gradients; keeps what each stub would add to its value."""

    def __init__(self, graph_module: fx.GraphModule) -> None:
        super().__init__(graph_module)
        self.weights: dict[str, float] = {}
        self.stubs: dict[str, float] = {}
        self.errors: list[tuple[dict[str, float], str, torch.Tensor, torch.Tensor]] = []

    def add(self, leaves: list[Any], generator: torch.Generator) -> float:
        """Take in one batch; the square of its outputs."""
        self.errors = []
        with torch.enable_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            given = [x.detach().requires_grad_() if _is_real(x) else x for x in leaves]
            outputs = super().run(*given, enable_io_processing=False)
            found = [x for x in _leaves(outputs) if _is_real(x) and x.requires_grad]
            power = sum(float(x.detach().double().square().sum()) for x in found)
            signs = [
                (torch.randint(2, x.shape, generator=generator, dtype=x.dtype) * 2 - 1).to(x.device) for x in found
            ]
            values = [value for *_, value, _ in self.errors]
            gradients = torch.autograd.grad(found, values, signs, allow_unused=True)
        for (totals, path, _, error), gradient in zip(self.errors, gradients, strict=True):
            moved = 0.0
            if gradient is not None:
                product = (gradient * error).double()
                per_sample = product.flatten(1).sum(1) if product.dim() > 1 else product.sum()
                moved = float(per_sample.square().sum())
            totals[path] = totals.get(path, 0.0) + moved
        self.errors = []
        return power

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        layer: Any = self.fetch_attr(target)
        if isinstance(layer, Quantizer):
            value = args[0] * 1  # a value of its own: the stub may serve some of the readers only
            with torch.no_grad():
                self.errors.append((self.stubs, target, value, layer(args[0].detach()) - args[0].detach()))
            return value
        if not isinstance(layer, _LAYERS):
            return super().call_module(target, args, kwargs)
        quantizer: Any = layer.weight_quantizer
        with torch.no_grad():
            rounded = layer(args[0].detach())
        enabled, quantizer.enabled = quantizer.enabled, False
        value = layer(args[0])
        quantizer.enabled = enabled
        self.errors.append((self.weights, target, value, rounded - value.detach()))
        return value


def _by_layer(
    graph_module: fx.GraphModule, weights: Mapping[str, float], stubs: Mapping[str, float]
) -> dict[str, float]:
    """What a layer in floating point would save: its weight, and the stubs beside it, clips in between or not."""
    made: dict[str, float] = {}
    for node in graph_module.graph.find_nodes(op="call_module"):
        path = str(node.target)
        if path not in weights:
            continue
        beside: set[str] = set()
        reads = node.args[0]
        beside.update(_stub(graph_module, reads))
        readers = list(node.users)
        for reader in readers:
            found = _stub(graph_module, reader)
            beside.update(found)
            if not found and reader.op == "call_function":
                beside.update(path for user in reader.users for path in _stub(graph_module, user))
        made[path] = made.get(path, weights[path]) + sum(stubs[stub] for stub in beside)
    return made


def _stub(graph_module: fx.GraphModule, node: Any) -> set[str]:
    if not isinstance(node, fx.Node) or node.op != "call_module":
        return set()
    path = str(node.target)
    return {path} if isinstance(graph_module.get_submodule(path), Quantizer) else set()


def _is_real(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _leaves(outputs: Any) -> list[Any]:
    return list(outputs) if isinstance(outputs, (tuple, list)) else [outputs]
