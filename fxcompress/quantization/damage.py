"""How much the rounding of each place in a graph moves the outputs, all places from one walk there and back.

To first order a rounding error Δ at a value moves the outputs by J Δ, J being the Jacobian of the outputs there. With
random signs v on the outputs, E (vᵀ J Δ)² = ‖J Δ‖² (Hutchinson 1989), and vᵀ J for every value of the graph is one
backward pass. So the damage of each stub alone costs a forward and a backward pass in all, not one run for each layer,
and several grids for each stub cost hardly more than one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from fxcompress.errors import PreconditionError
from fxcompress.graph.batches import batches, first_samples
from fxcompress.graph.copying import copy_graph
from fxcompress.quantization.fake_quant import Quantizer
from fxcompress.quantization.grid_choice import GridChoice
from fxcompress.quantization.layers import QUANTIZED

__all__ = ["SAMPLES", "Damage", "NotDifferentiableError", "damage_of_grids", "measure_damage"]

_LAYERS = tuple(QUANTIZED.values())
SAMPLES = 32
"""That damage is measured on."""

_Damage = Callable[[torch.Tensor, torch.Tensor], Sequence[float]]
"""Of a value and the gradient there: what each of its roundings does, summed over samples."""


class NotDifferentiableError(PreconditionError):
    """Damage needs gradients, and an operation of the graph has none."""


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


def measure_damage(graph_module: fx.GraphModule, data: Iterable[Any], *, samples: int = SAMPLES) -> Damage:
    """The damage of every stub of a calibrated graph, each on its own.

    Args:
        graph_module: with calibrated stubs; left as it is.
        data: batches; the first that hold ``samples`` samples are used.
        samples: more make the estimate steadier.

    Raises:
        NotDifferentiableError: an operation has no derivative.
        PreconditionError: the data is empty or does not fit.
    """
    runner = _WholeRunner(_frozen(graph_module))
    power, _ = _total_power(runner, data, samples)
    weights = {path: found[0] / power for path, found in runner.weights.items()}
    stubs = {path: found[0] / power for path, found in runner.stubs.items()}
    return Damage(weights, stubs, _by_layer(runner.graph_module, weights, stubs))


def damage_of_grids(
    graph_module: fx.GraphModule,
    data: Iterable[Any],
    grids: Mapping[str, Sequence[Quantizer]],
    *,
    samples: int = SAMPLES,
    limit: int | None = None,
) -> tuple[dict[str, list[float]], int]:
    """What each of several grids for each stub would do to the outputs, all from the same walk.

    Args:
        graph_module: with stubs; what layers do to their weights is left out. Left as it is.
        data: as for :func:`measure_damage`.
        grids: path of a stub → what could stand there.
        samples: likewise.
        limit: most batches to read.

    Returns:
        path → damage of each of its grids, nothing for stubs that the outputs do not depend on; and the number of
        samples that were read.

    Raises:
        NotDifferentiableError: an operation has no derivative.
        PreconditionError: the data is empty or does not fit.
    """
    runner = _GridRunner(_frozen(graph_module), grids)
    power, seen = _total_power(runner, data, samples, limit)
    return {path: [total / power for total in found] for path, found in runner.stubs.items()}, seen


def _total_power(runner: _Runner, data: Iterable[Any], samples: int, limit: int | None = None) -> tuple[float, int]:
    """Walk over the first samples; the square of the outputs, and how many samples there were."""
    generator = torch.Generator().manual_seed(0)
    power, seen = 0.0, 0
    for batch in batches(runner.graph_module, data, limit=limit):
        part = first_samples(runner.graph_module, batch, samples - seen)
        power += runner.add(part.leaves, generator)
        seen += part.size
        if seen >= samples:
            break
    return max(power, 1e-30), seen


def _frozen(graph_module: fx.GraphModule) -> fx.GraphModule:
    """A copy in eval mode, on the same memory, whose weights want no gradients: only values have some."""
    copied = copy_graph(graph_module)
    for module in copied.modules():
        module.training = False
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(parameter.detach(), requires_grad=False)
        if isinstance(module, nn.RNNBase):
            module._flat_weights = [getattr(module, name) for name in module._flat_weights_names]
    return copied


class _Runner(fx.Interpreter):
    """Runs the graph in floating point, there and back; adds up what each place would move as its gradient comes."""

    def __init__(self, graph_module: fx.GraphModule) -> None:
        super().__init__(graph_module)
        self.graph_module = graph_module
        self.stubs: dict[str, list[float]] = {}
        self.sources: list[torch.Tensor] = []  # where differentiation ends

    def add(self, leaves: list[Any], generator: torch.Generator) -> float:
        """Take in one batch; the square of its outputs."""
        with torch.enable_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.sources = []
            given = [x.detach() if isinstance(x, torch.Tensor) else x for x in leaves]
            outputs = [x for x in _leaves(super().run(*given, enable_io_processing=False)) if _is_real(x)]
            moved = [x for x in outputs if x.requires_grad]
            signs = [
                (torch.randint(2, x.shape, generator=generator, dtype=x.dtype) * 2 - 1).to(x.device) for x in moved
            ]
            try:
                if moved:
                    torch.autograd.grad(moved, self.sources, signs, allow_unused=True)
            except RuntimeError as error:
                raise NotDifferentiableError(
                    f"the graph cannot be differentiated: {str(error).splitlines()[0]}",
                    remedy="leave max_drop out",
                ) from error
        self.sources = []
        return sum(float(x.detach().double().square().sum()) for x in outputs)

    def watched(self, totals: dict[str, list[float]], path: str, value: torch.Tensor, damage: _Damage) -> torch.Tensor:
        """The value, to be used in its place: when its gradient comes, ``damage`` adds to the totals of ``path``."""
        if not value.requires_grad:
            value = value.detach().requires_grad_()
            self.sources.append(value)
        held = value.detach()

        def add(gradient: torch.Tensor) -> None:
            with torch.no_grad():
                found = damage(held, gradient)
            totals[path] = [a + b for a, b in zip(totals.get(path, [0.0] * len(found)), found, strict=True)]

        value.register_hook(add)
        return value


class _GridRunner(_Runner):
    """Several grids for each stub; layers do not round their weights."""

    def __init__(self, graph_module: fx.GraphModule, grids: Mapping[str, Sequence[Quantizer]]) -> None:
        super().__init__(graph_module)
        generator = torch.Generator().manual_seed(0)
        self.choices = {path: GridChoice(found, generator) for path, found in grids.items()}

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not isinstance(self.fetch_attr(target), Quantizer):
            return super().call_module(target, args, kwargs)
        if target not in self.choices:
            return args[0]
        # A value of its own, for the stub may serve some of the readers only.
        return self.watched(self.stubs, target, args[0].view_as(args[0]), self.choices[target].damage)


class _WholeRunner(_Runner):
    """The grid that each stub has, and the weights."""

    def __init__(self, graph_module: fx.GraphModule) -> None:
        super().__init__(graph_module)
        self.weights: dict[str, list[float]] = {}

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        layer: Any = self.fetch_attr(target)
        if isinstance(layer, Quantizer):
            return self.watched(self.stubs, target, args[0].view_as(args[0]), _exactly(layer))
        if not isinstance(layer, _LAYERS):
            return super().call_module(target, args, kwargs)
        quantizer: Any = layer.weight_quantizer
        enabled, quantizer.enabled = quantizer.enabled, False
        value = layer(args[0])
        quantizer.enabled = enabled
        read = args[0].detach()
        return self.watched(self.weights, target, value, _exactly(lambda _: layer(read)))


def _exactly(rounded: Callable[[torch.Tensor], torch.Tensor]) -> _Damage:
    def damage(value: torch.Tensor, gradient: torch.Tensor) -> list[float]:
        product = (gradient * (rounded(value) - value)).double()
        per_sample = product.flatten(1).sum(1) if product.dim() > 1 else product.sum()
        return [float(per_sample.square().sum())]

    return damage


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
