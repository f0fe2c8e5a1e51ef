"""Dynamic quantization: linear layers multiply integers, and round their inputs anew in every call."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from fxcompress.graph.edit import GraphEditor
from fxcompress.passes.base import Numerics, Pass, PassContext, PassResult, Rewrite, Skip
from fxcompress.quantization.integer_layers import DynamicLinear
from fxcompress.quantization.layer_choice import linear_sites

__all__ = ["QuantizeDynamic"]


@dataclass(frozen=True)
class QuantizeDynamic(Pass):
    """Give linear layers int8 weights and inputs rounded to uint8 over their range in each call. Needs no data.

    It serves transformers, whose activations vary too much for one range. Convolutions and recurrent layers are left.

    Attributes:
        ignore: name patterns of layers that stay in floating point.
    """

    name: ClassVar[str] = "quantize_dynamic"
    numerics: ClassVar[Numerics] = Numerics.LOSSY
    ignore: tuple[str, ...] = ()

    def run(self, graph_module: fx.GraphModule, context: PassContext) -> PassResult:
        """Replace each linear layer in its place."""
        sites, left = linear_sites(graph_module, self.ignore)
        skipped = [Skip(path, code, reason) for path, (code, reason) in left.items()]
        rewrites = []
        with GraphEditor(graph_module) as editor:
            for path in sites:
                layer: Any = graph_module.get_submodule(path)
                made = DynamicLinear.of(layer)
                editor.set_module(path, made, reshaped=False)
                weight = layer.weight.detach()
                error = torch.linalg.vector_norm(made.weight * made.scale[:, None] - weight)
                detail = {"weight_error": float(error / torch.linalg.vector_norm(weight).clamp_min(1e-30))}
                rewrites.append(Rewrite(path, "int8 weight, inputs rounded in each call", detail))
        if not rewrites:
            skipped.append(Skip("all", "nothing_to_quantize", "no linear layer of this graph can be quantized"))
        return PassResult(graph_module, tuple(rewrites), tuple(skipped))
