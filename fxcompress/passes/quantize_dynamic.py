"""Dynamic quantization: layers multiply integers, and round their inputs anew in every call."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, ClassVar

import torch
from torch import fx, nn

from fxcompress.errors import OptionError, PreconditionError, nearest
from fxcompress.graph.edit import GraphEditor
from fxcompress.passes.base import Numerics, Pass, PassContext, PassResult, Rewrite, Skip
from fxcompress.quantization.integer_layers import DynamicLinear
from fxcompress.quantization.layer_choice import linear_sites
from fxcompress.quantization.products import product_sites
from fxcompress.quantization.recurrent_layers import QuantizedLSTM

__all__ = ["QuantizeDynamic"]

_KINDS = ("linear", "matmul", "lstm")


@dataclass(frozen=True)
class QuantizeDynamic(Pass):
    """Give layers int8 weights and inputs rounded to 8 bits over their range in each call. Needs no data.

    It serves transformers and recurrent models, whose activations vary too much for one range. Convolutions are left:
    engines have no fast kernel for them.

    Attributes:
        kinds: of what is quantized: ``linear`` layers; ``lstm``; ``matmul``, products of two activations, and of an
            activation and a parameter (attention written as one operation stays).
        ignore: name patterns of layers and products that stay in floating point.
    """

    name: ClassVar[str] = "quantize_dynamic"
    numerics: ClassVar[Numerics] = Numerics.LOSSY
    kinds: tuple[str, ...] = ("linear", "lstm")
    ignore: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        for kind in self.kinds:
            if kind not in _KINDS:
                raise OptionError(f"there is no kind {kind!r}", where="kinds", remedy=nearest(kind, _KINDS))

    def run(self, graph_module: fx.GraphModule, context: PassContext) -> PassResult:
        """Replace each layer in its place, then the products."""
        recurrent = _recurrent_calls(graph_module)
        products, not_products = product_sites(graph_module) if "matmul" in self.kinds else ({}, {})
        others = [*recurrent, *products, *not_products]
        sites, left = linear_sites(graph_module, self.ignore, others)
        if "linear" not in self.kinds:
            sites, left = {}, {}
        left |= {path: why for path, why in not_products.items() if not self._ignored(path)}
        rewrites: list[Rewrite] = []
        with GraphEditor(graph_module) as editor:
            for path in sites:
                layer: Any = graph_module.get_submodule(path)
                made = DynamicLinear.of(layer)
                editor.set_module(path, made, reshaped=False)
                weight = layer.weight.detach()
                detail = {"weight_error": _error(made.weight * made.scale[:, None], weight)}
                rewrites.append(Rewrite(path, "int8 weight, inputs rounded in each call", detail))
            for path in recurrent if "lstm" in self.kinds else ():
                why = self._why_not(graph_module, path)
                if why is not None:
                    left[path] = why
                    continue
                editor.set_module(path, QuantizedLSTM.of(graph_module.get_submodule(path)), reshaped=False)  # type: ignore[arg-type]
                rewrites.append(Rewrite(path, "int8 weights, inputs and states rounded in each step"))
            for name, product in products.items():
                if self._ignored(name):
                    left[name] = ("ignored", "it matches a pattern of ignore")
                    continue
                rewrites.append(Rewrite(name, product.write(editor)))
        skipped = [Skip(path, code, reason) for path, (code, reason) in left.items()]
        if not rewrites:
            skipped.append(Skip("all", "nothing_to_quantize", "nothing in this graph can be quantized in this way"))
        return PassResult(graph_module, tuple(rewrites), tuple(skipped))

    def _ignored(self, path: str) -> bool:
        return any(fnmatchcase(path, pattern) for pattern in self.ignore)

    def _why_not(self, graph_module: fx.GraphModule, path: str) -> tuple[str, str] | None:
        layer = graph_module.get_submodule(path)
        if self._ignored(path):
            return "ignored", "it matches a pattern of ignore"
        if type(layer) is not nn.LSTM:
            return "no_kernel", f"ONNX Runtime has an integer kernel for LSTM only, not for {type(layer).__name__}"
        if layer.proj_size:
            return "no_kernel", "the integer kernel knows no projected states"
        weights = [weight for name, weight in layer.named_parameters() if name.startswith("weight")]
        if any(weight.dtype != torch.float32 for weight in weights):
            return "dtype", "it does not compute in float32"
        if not all(bool(torch.isfinite(weight).all()) for weight in weights):
            raise PreconditionError("a weight is not finite", where=path, remedy="repair the checkpoint")
        return None


def _recurrent_calls(graph_module: fx.GraphModule) -> list[str]:
    paths = dict.fromkeys(str(node.target) for node in graph_module.graph.find_nodes(op="call_module"))
    kinds = nn.RNNBase, QuantizedLSTM
    modules = {path: graph_module.get_submodule(path) for path in paths}
    return [path for path, layer in modules.items() if isinstance(layer, kinds[0]) and not isinstance(layer, kinds[1])]


def _error(stored: torch.Tensor, weight: torch.Tensor) -> float:
    error = torch.linalg.vector_norm(stored - weight)
    return float(error / torch.linalg.vector_norm(weight).clamp_min(1e-30))
