"""Quantization stubs where an engine wants them; nothing is rounded until ``Calibrate`` has run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import fx

from fxcompress.graph.shapes import require_shapes
from fxcompress.passes.base import Numerics, Pass, PassContext, PassResult, Rewrite, Skip
from fxcompress.quantization.account import layer_details
from fxcompress.quantization.calibrate import stubs_of
from fxcompress.quantization.insert import insert_stubs
from fxcompress.quantization.layer_choice import ignored_by
from fxcompress.quantization.schemes import scheme_of

__all__ = ["InsertQuantStubs"]


@dataclass(frozen=True)
class InsertQuantStubs(Pass):
    """Put quantize/dequantize stubs on weights and activations, as the engine's scheme places them.

    Run ``FuseModules`` first: a convolution with a batch norm behind it is left as it is. For ``onnxruntime`` SiLU and
    hard swish become a gate and a product.

    Attributes:
        scheme: ``onnxruntime``, ``openvino`` or ``tensorrt``.
        ignore: name patterns of layers that stay in floating point.
        ignore_kinds: class names of such layers: ``("Linear",)``.
        ends: ``float`` leaves the first and the last layer.
        weight_bits: 8, or 7 for x64 processors without VNNI; 4 for a float kernel on small weights.
    """

    name: ClassVar[str] = "insert_quant_stubs"
    numerics: ClassVar[Numerics] = Numerics.REASSOCIATED
    scheme: str = "onnxruntime"
    ignore: tuple[str, ...] = ()
    ignore_kinds: tuple[str, ...] = ()
    ends: Literal["quantize", "float"] = "quantize"
    weight_bits: Literal[4, 7, 8] = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        scheme_of(self.scheme)

    def run(self, graph_module: fx.GraphModule, context: PassContext) -> PassResult:
        """Place for the whole graph, then insert all at once."""
        require_shapes(graph_module, self.name)
        if stubs_of(graph_module):
            skip = Skip("all", "already_quantized", "the graph has quantization stubs")
            return PassResult(graph_module, (), (skip,))
        scheme = scheme_of(self.scheme, weight_bits=self.weight_bits)
        choice = ignored_by(graph_module, self.ignore, self.ignore_kinds, self.ends)
        placement = insert_stubs(graph_module, scheme, choice)
        rewrites = [
            Rewrite(path, "weight and inputs quantized", detail)
            for path, detail in layer_details(placement, scheme).items()
        ]
        skipped = [Skip(path, code, reason) for path, (code, reason) in placement.left.items()]
        if not rewrites:
            skipped.append(Skip("all", "nothing_to_quantize", "no layer of this graph can be quantized"))
        return PassResult(graph_module, tuple(rewrites), tuple(skipped))
