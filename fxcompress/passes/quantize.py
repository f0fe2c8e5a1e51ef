"""Static quantization in one pass: stubs, calibration, and what it costs layer by layer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from typing import Any, ClassVar, Literal

from torch import fx

from fxcompress.errors import OptionError
from fxcompress.graph.batches import batches
from fxcompress.graph.copying import copy_graph
from fxcompress.graph.shapes import require_shapes
from fxcompress.passes.base import Numerics, Pass, PassContext, PassResult, Rewrite, Skip
from fxcompress.quantization.account import layer_details
from fxcompress.quantization.calibrate import calibrate, stubs_of
from fxcompress.quantization.insert import insert_stubs
from fxcompress.quantization.layer_choice import ignored_by
from fxcompress.quantization.noise import layer_noise
from fxcompress.quantization.observers import check_observer
from fxcompress.quantization.schemes import scheme_of

__all__ = ["Quantize"]


@dataclass(frozen=True)
class Quantize(Pass):
    """Quantize weights and activations to 8 bits, placed as the engine wants them, calibrated on data.

    Run ``FuseModules`` first: a convolution with a batch norm behind it is left as it is.

    Attributes:
        data: batches for calibration: what the model takes, or that and labels.
        scheme: ``onnxruntime``, ``openvino`` or ``tensorrt``.
        observer: of activations: ``minmax``, ``moving_average``, ``percentile``, ``mse``, ``entropy``.
        weights: observer of weights: ``minmax`` or ``mse``.
        percentile: share of values that ``percentile`` covers.
        batches: how many to read at most; None reads all.
        ignore: name patterns of layers that stay in floating point.
        ignore_kinds: class names of such layers: ``("Linear",)``.
        ends: ``float`` leaves the first and the last layer.
        weight_bits: 8, or 7 for x64 processors without VNNI.
    """

    name: ClassVar[str] = "quantize"
    numerics: ClassVar[Numerics] = Numerics.LOSSY
    data: Iterable[Any]
    scheme: str = "onnxruntime"
    observer: str = "mse"
    weights: Literal["minmax", "mse"] = "minmax"
    percentile: float = 99.99
    batches: int | None = None
    ignore: tuple[str, ...] = ()
    ignore_kinds: tuple[str, ...] = ()
    ends: Literal["quantize", "float"] = "quantize"
    weight_bits: Literal[7, 8] = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        scheme_of(self.scheme)
        check_observer(self.observer)
        if not 50 < self.percentile <= 100:
            raise OptionError(f"percentile={self.percentile} is outside (50, 100]", where="percentile")

    def run(self, graph_module: fx.GraphModule, context: PassContext) -> PassResult:
        """Stubs, grids, and the noise of each layer on the first batch."""
        require_shapes(graph_module, self.name)
        if stubs_of(graph_module):
            skip = Skip("all", "already_quantized", "the graph has quantization stubs; Calibrate sets them anew")
            return PassResult(graph_module, (), (skip,))
        scheme = scheme_of(self.scheme, weight_bits=self.weight_bits)
        floating = copy_graph(graph_module)
        choice = ignored_by(graph_module, self.ignore, self.ignore_kinds, self.ends)
        placement = insert_stubs(graph_module, scheme, choice)
        skipped = [Skip(path, code, reason) for path, (code, reason) in placement.left.items()]
        if not placement.layers:
            skipped.append(Skip("all", "nothing_to_quantize", "no layer of this graph can be quantized"))
            return PassResult(graph_module, (), tuple(skipped))
        data = self.data if hasattr(self.data, "__len__") else list(islice(self.data, self.batches))
        grids = calibrate(
            graph_module,
            data,
            observer=self.observer,
            weight_observer=self.weights,
            percentile=self.percentile,
            limit=self.batches,
            progress=context.progress,
        )
        first = next(batches(graph_module, data, limit=1))
        calls = {path: floating.graph.find_nodes(op="call_module", target=path)[0].name for path in placement.layers}
        noise = layer_noise(floating, graph_module, calls, first.leaves)
        worst = min(noise, key=lambda path: noise[path].decibels)
        details = layer_details(placement, scheme, grids, noise)
        order = sorted(details, key=lambda path: noise[path].decibels)
        rewrites = [Rewrite(path, f"{noise[path].decibels:.1f} dB", details[path]) for path in order]
        note = (
            f"{len(placement.layers)} layers and {len(placement.operations) - len(placement.layers)} other operations "
            f"for {scheme.name}; the noisiest is {worst!r} with {noise[worst].decibels:.1f} dB"
        )
        return PassResult(graph_module, tuple(rewrites), tuple(skipped), note)
