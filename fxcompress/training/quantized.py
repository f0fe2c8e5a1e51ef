"""Training of a graph with quantization stubs: grids that learn or follow, then stand still; norms that stop.

Learned grids are those of LSQ (Esser et al. 2020): the scale trains, its zero point stays. Observed ones
(Jacob et al. 2018) follow the values: of a weight its range at every step, of an activation an average over batches.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from typing import Any, Literal

import torch
from torch import fx, nn

from fxcompress.errors import PreconditionError
from fxcompress.graph.batches import batches
from fxcompress.graph.running import nested_inputs
from fxcompress.quantization.fake_quant import Quantizer
from fxcompress.quantization.layers import QUANTIZED
from fxcompress.quantization.observers import weight_range
from fxcompress.quantization.types import parameters_of_range
from fxcompress.training.hooks import Hook, Run

__all__ = ["QuantizedTraining", "norms_of", "quantized_layers", "quantizers_of", "reestimate_norms", "settle"]

_MOMENTUM = 0.05  # of the ranges of activations, per batch


def quantizers_of(graph_module: fx.GraphModule) -> dict[str, Quantizer]:
    """Path → stub, of values and of weights."""
    return {path: module for path, module in graph_module.named_modules() if isinstance(module, Quantizer)}


def quantized_layers(graph_module: fx.GraphModule) -> dict[str, Any]:
    """Path → layer with a stub on its weight."""
    kinds = tuple(QUANTIZED.values())
    return {path: module for path, module in graph_module.named_modules() if isinstance(module, kinds)}


def norms_of(graph_module: fx.GraphModule) -> dict[str, nn.modules.batchnorm._BatchNorm]:
    """Path → batch norm that keeps statistics."""
    found = graph_module.named_modules()
    return {p: m for p, m in found if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats}


class QuantizedTraining(Hook):
    """Acts on the stubs of a graph while it trains.

    Args:
        grids: ``learned`` or ``observed``.
        freeze_grids: share of the run after which they stand still.
        freeze_norms: share after which batch norms keep their statistics.
    """

    name = "quantized_training"

    def __init__(self, grids: Literal["learned", "observed"], *, freeze_grids: float, freeze_norms: float) -> None:
        self._grids, self._freeze_grids, self._freeze_norms = grids, freeze_grids, freeze_norms
        self._handles: list[Any] = []
        self._observing = False
        self._norms_frozen = False
        self._grids_frozen = False

    def start(self, run: Run) -> None:
        """Begin to watch; a run that resumes is where it was."""
        if self._grids == "observed":
            self._observing = True
            for stub in quantizers_of(run.graph_module).values():
                if stub.axis is None:
                    self._handles.append(stub.register_forward_pre_hook(self._observe))
        self.before_step(run)

    def before_step(self, run: Run) -> None:
        """Freeze what is due; let the grids of weights follow them."""
        if self._done(run, self._freeze_norms) and not self._norms_frozen:
            self._norms_frozen = True
            for norm in norms_of(run.graph_module).values():
                norm.eval()
        self._grids_frozen = self._done(run, self._freeze_grids)
        self._observing = self._grids == "observed" and not self._grids_frozen
        if self._observing:
            for layer in quantized_layers(run.graph_module).values():
                stub = layer.weight_quantizer
                low, high = weight_range(layer.weight.detach(), stub.axis, stub.kind, "minmax")
                stub.set(*parameters_of_range(low, high, stub.kind))

    @torch.no_grad()
    def after_step(self, run: Run) -> None:
        """Scales take in what was learned of them; frozen ones are what they were, whatever momentum says."""
        for stub in quantizers_of(run.graph_module).values():
            if stub.gain is None:
                continue
            if self._grids_frozen:
                stub.gain.fill_(1.0)
            stub.absorb()

    def finish(self, run: Run) -> None:
        """Stop watching."""
        for handle in self._handles:
            handle.remove()

    def _done(self, run: Run, share: float) -> bool:
        return run.total is not None and run.step >= share * run.total

    @torch.no_grad()
    def _observe(self, stub: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        if not self._observing or not stub.training or not isinstance(stub, Quantizer):
            return
        x = inputs[0].detach().float()
        if not x.numel():
            return
        low = (stub.kind.minimum - stub.zero_point) * stub.scale
        high = (stub.kind.maximum - stub.zero_point) * stub.scale
        seen_low, seen_high = torch.aminmax(x)
        low, high = low.lerp(seen_low.to(low), _MOMENTUM), high.lerp(seen_high.to(high), _MOMENTUM)
        stub.set(*parameters_of_range(low, high, stub.kind))


@torch.no_grad()
def settle(graph_module: fx.GraphModule) -> dict[str, nn.Parameter]:
    """Make learned scales plain numbers again, and give the weights as their grids hold them.

    A weight beyond its grid is clipped in training, and would be rounded otherwise where an engine's integers reach
    further. Weights on the grid are the same everywhere.

    Returns:
        path of a weight → the weight on its grid, float32.
    """
    for stub in quantizers_of(graph_module).values():
        stub.absorb()
        stub.gain = None
    made: dict[str, nn.Parameter] = {}
    for path, layer in quantized_layers(graph_module).items():
        layer.bias_before = None  # of a network that is no more
        weight = layer.weight_quantizer(layer.weight.detach())
        made[f"{path}.weight"] = nn.Parameter(weight, requires_grad=layer.weight.requires_grad)
    return made


@torch.no_grad()
def reestimate_norms(graph_module: fx.GraphModule, data: Iterable[Any], count: int) -> int:
    """Statistics of batch norms anew, as plain means over ``count`` batches; gives how many were read.

    Raises:
        PreconditionError: the data is empty or does not fit.
    """
    norms = norms_of(graph_module)
    if not norms or not count:
        return 0
    modes = {module: module.training for module in graph_module.modules()}
    momenta = {norm: norm.momentum for norm in norms.values()}
    read = 0
    try:
        graph_module.eval()
        for norm in norms.values():
            norm.reset_running_stats()
            norm.momentum = None  # a cumulative mean
            norm.train()
        for batch in islice(batches(graph_module, data), count):
            args, kwargs = nested_inputs(graph_module, batch.leaves)
            graph_module(*args, **kwargs)
            read += 1
    finally:
        for norm, momentum in momenta.items():
            norm.momentum = momentum
        for module, mode in modes.items():
            module.training = mode
    if not read:
        raise PreconditionError("the data holds no batch to estimate norms on", where="loader")
    return read
