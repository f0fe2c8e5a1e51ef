"""Weight-only quantization: linear layers store their weight in 4 or 8 bits and compute in floating point."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, ClassVar, Literal

import torch
from torch import fx

from fxcompress.analysis.scaling import Factors, apply_factors, scaling
from fxcompress.analysis.statistics import MeanAbs, MeanSquare, SecondMoment, collect
from fxcompress.errors import OptionError
from fxcompress.graph.edit import GraphEditor
from fxcompress.passes.base import Numerics, Pass, PassContext, PassResult, Rewrite, Skip
from fxcompress.quantization.activation_aware import Seen, aware_sites, choose_factors
from fxcompress.quantization.integer_layers import BlockLinear
from fxcompress.quantization.layer_choice import linear_sites
from fxcompress.quantization.rounding import Rounded, gptq, round_to_nearest, stored_values

__all__ = ["QuantizeWeights"]

_MOMENT = SecondMoment("input")
_SEEN = (MeanAbs("input", -1), MeanSquare("input", -1))
_BUDGET = 1 << 29  # bytes of second moments held at once


@dataclass(frozen=True)
class QuantizeWeights(Pass):
    """Store the weights of linear layers as integers, with a scale and a zero point per block of inputs.

    It saves memory, and time where memory is what a layer waits for: large layers, few tokens.

    Attributes:
        bits: 4 or 8.
        block_size: inputs that share a scale: a power of two, 16 or more.
        symmetric: every block is as wide on both sides of 0, so that it needs no zero point. TensorRT stores no zero
            points: of 8-bit weights it takes only these, and 4-bit weights with zero points are int8 there.
        algorithm: ``rtn`` rounds to nearest; ``gptq`` keeps the layer's output on ``calibration`` data; ``awq`` scales
            inputs by how large they are there, and rounds to nearest.
        calibration: batches for ``gptq`` and ``awq``: what the model takes, or that and labels.
        batches: how many to read at most; None reads all.
        ignore: name patterns of layers that stay as they are.
    """

    name: ClassVar[str] = "quantize_weights"
    numerics: ClassVar[Numerics] = Numerics.LOSSY
    bits: Literal[4, 8] = 4
    block_size: int = 32
    symmetric: bool = False
    algorithm: Literal["rtn", "gptq", "awq"] = "rtn"
    calibration: Iterable[Any] | None = None
    batches: int | None = None
    ignore: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block_size < 16 or self.block_size & (self.block_size - 1):
            raise OptionError(
                f"block_size={self.block_size} is no power of two from 16 on", where="block_size", remedy="32 is usual"
            )
        if self.algorithm != "rtn" and self.calibration is None:
            raise OptionError(
                f"algorithm={self.algorithm!r} needs data", where="calibration", remedy="give calibration=<batches>"
            )

    def run(self, graph_module: fx.GraphModule, context: PassContext) -> PassResult:
        """One layer after the other; its second moment, if it takes one, is gone before the next."""
        sites, left = linear_sites(graph_module, self.ignore)
        skipped = [Skip(path, code, reason) for path, (code, reason) in left.items()]
        rewrites: list[Rewrite] = []
        scaled = self._scale(graph_module, sites, context) if self.algorithm == "awq" else {}
        with GraphEditor(graph_module) as editor:
            for path, moment in self._moments(graph_module, sites):
                layer: Any = graph_module.get_submodule(path)
                weight = layer.weight.detach()
                if moment is None:
                    rounded = self._nearest(weight)
                else:
                    rounded = gptq(weight, moment.to(weight.device), self.bits, self.block_size, self.symmetric)
                made = BlockLinear.of(layer, *rounded, self.bits)
                editor.set_module(path, made, reshaped=False)
                detail = _detail(made, weight, rounded, moment) | scaled.get(path, {})
                rewrites.append(Rewrite(path, f"{self.bits}-bit weight", detail))
        if not rewrites:
            skipped.append(Skip("all", "nothing_to_quantize", "no linear layer of this graph can be quantized"))
        return PassResult(graph_module, tuple(rewrites), tuple(skipped))

    def _nearest(self, weight: torch.Tensor) -> Rounded:
        return round_to_nearest(weight, self.bits, self.block_size, self.symmetric)

    def _scale(
        self, graph_module: fx.GraphModule, sites: dict[str, list[str]], context: PassContext
    ) -> dict[str, dict[str, Any]]:
        """Put AWQ's factors into the weights; gives what the report tells of each layer that has some."""
        found = scaling(graph_module)
        aware = aware_sites(found, sites)
        requests = {name: _SEEN for site in aware for path in site.inputs for name in sites[path]}
        if not requests:
            return {}
        assert self.calibration is not None
        statistics = collect(graph_module, self.calibration, requests, limit=self.batches, progress=context.progress)
        factors = Factors(graph_module, found)
        told: dict[str, dict[str, Any]] = {}

        def rounding(weight: torch.Tensor) -> torch.Tensor:
            return stored_values(self._nearest(weight), weight.shape[1])

        for site in aware:
            weights, seen = {}, {}
            for path in site.inputs:
                layer: Any = graph_module.get_submodule(path)
                weights[path] = layer.weight.detach().float()
                figures = [[statistics[name, kind].to(weights[path].device) for name in sites[path]] for kind in _SEEN]
                seen[path] = Seen(*(torch.stack(own).amax(0) for own in figures))
            s, alpha, error = choose_factors(site, weights, seen, rounding)
            factors.values[site.classes] = s
            told.update({path: {"alpha": alpha, "expected_error": error} for path in site.inputs})
        apply_factors(graph_module, found, factors.values)
        return told

    def _moments(
        self, graph_module: fx.GraphModule, sites: dict[str, list[str]]
    ) -> Iterator[tuple[str, torch.Tensor | None]]:
        if self.algorithm != "gptq":
            yield from ((path, None) for path in sites)
            return
        assert self.calibration is not None
        data = (
            self.calibration if hasattr(self.calibration, "__len__") else list(islice(self.calibration, self.batches))
        )
        group: list[str] = []
        spent = 0
        for path in [*sites, None]:
            cost = 8 * _inputs(graph_module, path) ** 2 if path is not None else _BUDGET
            if group and (path is None or spent + cost > _BUDGET):
                requests = {name: _MOMENT for member in group for name in sites[member]}
                found = collect(graph_module, data, requests, limit=self.batches)
                for member in group:
                    yield member, sum(found[name, _MOMENT].total[0] for name in sites[member])
                group, spent = [], 0
            if path is not None:
                group.append(path)
                spent += cost


def _inputs(graph_module: fx.GraphModule, path: str) -> int:
    layer: Any = graph_module.get_submodule(path)
    return int(layer.in_features)


def _detail(made: BlockLinear, weight: torch.Tensor, rounded: Rounded, moment: torch.Tensor | None) -> dict[str, Any]:
    difference = weight.double() - stored_values(rounded, weight.shape[1]).double()
    detail: dict[str, Any] = {
        "bits": made.bits,
        "block_size": made.block,
        "bytes_before": weight.numel() * weight.element_size(),
        "bytes_after": sum(t.numel() * t.element_size() for t in (made.packed, made.scale, made.zero_point)),
        "weight_error": float(difference.norm() / weight.double().norm().clamp_min(1e-30)),
    }
    if moment is not None:
        power = torch.einsum("oi,ij,oj->", weight.double(), moment, weight.double())
        noise = torch.einsum("oi,ij,oj->", difference, moment, difference)
        detail["output_error"] = float((noise / power.clamp_min(1e-30)).sqrt())
    return detail
