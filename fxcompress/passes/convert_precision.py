"""16-bit floating point, with 32 bits where range or sums need them; inputs and outputs keep their dtypes."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, ClassVar, Literal, TypeGuard

import torch
from torch import fx, nn
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from fxcompress.errors import OptionError, PreconditionError, nearest
from fxcompress.graph import shapes
from fxcompress.graph.edit import GraphEditor
from fxcompress.graph.running import nested_inputs, outputs_of
from fxcompress.passes.base import Numerics, Pass, PassContext, PassResult, Rewrite, Skip
from fxcompress.quantization.fake_quant import Quantizer
from fxcompress.quantization.integer_layers import DynamicLinear
from fxcompress.quantization.recurrent_layers import QuantizedLSTM

__all__ = ["ConvertPrecision"]

aten = torch.ops.aten

_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
_NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
# Sums of many terms, and functions that leave the range of 16 bits quickly.
_WIDE = (
    "sum mean var std var_mean std_mean prod cumsum cumprod logsumexp norm linalg_vector_norm softmax log_softmax "
    "_softmax _log_softmax exp exp2 expm1 log log2 log10 log1p pow rsqrt reciprocal layer_norm group_norm rms_norm "
    "batch_norm instance_norm cosh sinh tan acos asin erfinv"
)
_WIDE_OPERATIONS = {
    getattr(getattr(aten, name), overload) for name in _WIDE.split() for overload in getattr(aten, name).overloads()
}
_INTEGERS = {torch.ops.fxcompress.dynamic_matmul.default}
_CASTS = {aten.to.dtype, aten._to_copy.default, aten.to.dtype_layout, aten.type_as.default, aten.to.other}


@dataclass(frozen=True)
class ConvertPrecision(Pass):
    """Compute in ``float16`` or ``bfloat16``; norms, softmax, exponentials and sums stay in float32.

    In a quantized graph so does what stubs stand around: it runs in integers, whose scales are float32.

    Attributes:
        dtype: ``float16`` has the precision, ``bfloat16`` the range.
        keep: name patterns of layers and nodes that stay in float32.
    """

    name: ClassVar[str] = "convert_precision"
    numerics: ClassVar[Numerics] = Numerics.LOSSY
    dtype: Literal["float16", "bfloat16"] = "float16"
    keep: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.keep, (list, str)):
            object.__setattr__(self, "keep", (self.keep,) if isinstance(self.keep, str) else tuple(self.keep))
        super().__post_init__()

    def run(self, graph_module: fx.GraphModule, context: PassContext) -> PassResult:
        """One walk in the order of the graph: each node's inputs are cast to what it computes in.

        Raises:
            PreconditionError: outputs are not finite any more on the example inputs.
        """
        shapes.require_shapes(graph_module, self.name)
        narrow = _DTYPES[self.dtype]
        before = _finite_outputs(graph_module, context)
        wide = self._wide(graph_module, narrow)
        rewrites: list[Rewrite] = []
        with GraphEditor(graph_module) as editor:
            walk = _Walk(editor, narrow, wide)
            for node in list(graph_module.graph.nodes):
                if walk.visit(node) and node.op == "call_module":
                    rewrites.append(Rewrite(str(node.target), self.dtype))
            editor.set_values(walk.values)
        skipped = [Skip(name, code, reason) for name, (code, reason) in wide.items() if code != "operation"]
        if not walk.narrowed:
            if not skipped:
                skipped.append(Skip("all", "nothing_to_convert", "nothing in this graph computes in float32"))
            return PassResult(graph_module, (), tuple(skipped))
        if not rewrites:
            rewrites.append(Rewrite("all", f"{walk.narrowed} operations in {self.dtype}"))
        after = _finite_outputs(graph_module, context)
        if before is True and after is False:
            raise PreconditionError(
                f"outputs are not finite any more in {self.dtype} on the example inputs",
                where=self.name,
                remedy="use bfloat16, or name the layers that overflow in keep",
            )
        note = f"{walk.narrowed} operations in {self.dtype}, {walk.kept} in float32, {walk.casts} casts"
        return PassResult(graph_module, tuple(rewrites), tuple(skipped), note)

    def _wide(self, graph_module: fx.GraphModule, narrow: torch.dtype) -> dict[str, tuple[str, str]]:
        """Nodes that stay in float32, by name, with code and reason; layers are told by their path."""
        found: dict[str, tuple[str, str]] = {}
        names = set()
        limit = torch.finfo(narrow).max
        for node in graph_module.graph.nodes:
            if node.op not in ("call_module", "call_function"):
                continue
            name = str(node.target) if node.op == "call_module" else node.name
            names.add(name)
            layer = graph_module.get_submodule(name) if node.op == "call_module" else None
            if any(fnmatchcase(name, pattern) for pattern in self.keep):
                found[name] = ("kept", "it matches a pattern of keep")
            elif node.target in _INTEGERS or (layer is not None and any(map(_is_quantized, layer.modules()))):
                found[name] = ("quantized", "it rounds to integers by a scale in float32")
            elif any(_is_stub(graph_module, source) for source in node.all_input_nodes):
                found[name] = ("quantized", "it reads quantized values, which integer kernels take")
            elif node.users and all(_is_stub(graph_module, user) for user in node.users):
                found[name] = ("quantized", "all that reads it is quantized, and is part of an integer kernel")
            elif isinstance(layer, _NORMS):
                found[name] = ("norm", "a norm sums over many values")
            elif layer is not None and any(_exceeds(tensor, limit) for tensor in layer.parameters()):
                found[name] = ("range", f"a weight is larger than {limit:g}")
            elif node.target in _WIDE_OPERATIONS:
                found[name] = ("operation", "it sums, or leaves the range quickly")
        for pattern in self.keep:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise OptionError(f"nothing matches {pattern!r}", where="keep", remedy=nearest(pattern, names))
        return found


class _Walk:
    """Casts node by node; values of nodes already visited are up to date."""

    def __init__(self, editor: GraphEditor, narrow: torch.dtype, wide: dict[str, tuple[str, str]]) -> None:
        self.editor, self.narrow, self.wide = editor, narrow, wide
        self.values: dict[fx.Node, Any] = {}
        self.narrowed = self.kept = self.casts = 0
        self._before = {
            node: node.meta["val"].dtype
            for node in editor.graph.nodes
            if isinstance(node.meta.get("val"), torch.Tensor)
        }
        self._cast: dict[tuple[fx.Node, torch.dtype], fx.Node] = {}
        self._made: set[fx.Node] = set()  # casts that were put in
        self._layers: set[str] = set()

    def visit(self, node: fx.Node) -> bool:
        """Bring a node to what it shall compute in; whether that is 16 bits."""
        if node.op == "output":
            self._restore(node)
            return False
        if node.op in ("placeholder", "get_attr"):
            return False
        name = str(node.target) if node.op == "call_module" else node.name
        computes = [n for n in node.all_input_nodes if _is_float(n.meta.get("val"))]
        wanted = torch.float32 if name in self.wide else self.narrow
        before = node.meta.get("val")
        casts = node.target in _CASTS  # says itself what it gives
        if not casts and any(n.meta["val"].dtype != wanted for n in computes):
            self.editor.set_args(node, *self._read(node, wanted))
        layer = self.editor.graph_module.get_submodule(name) if node.op == "call_module" else None
        if layer is not None and wanted == self.narrow and name not in self._layers:
            self._layers.add(name)
            if any(_is_float(tensor) for tensor in (*layer.parameters(), *layer.buffers())):
                self.editor.set_module(name, _narrowed(layer, self.narrow), reshaped=False)
        node.meta["val"] = self.values[node] = shapes.infer(self.editor.graph_module, node)
        if casts or not computes or not any(_is_float(leaf) for leaf in pytree.tree_leaves(before)):
            return False
        self.narrowed += wanted == self.narrow
        self.kept += wanted != self.narrow
        return wanted == self.narrow

    def _read(self, node: fx.Node, wanted: torch.dtype) -> tuple[Any, Any]:
        def cast(source: fx.Node) -> fx.Node:
            value = source.meta.get("val")
            if not _is_float(value) or value.dtype == wanted:
                return source
            return self._to(source, wanted, node)

        return map_arg(node.args, cast), map_arg(node.kwargs, cast)

    def _to(self, source: fx.Node, wanted: torch.dtype, reader: fx.Node) -> fx.Node:
        if source in self._made and source.args[0].meta["val"].dtype == wanted:  # type: ignore[union-attr]
            return source.args[0]  # type: ignore[return-value]
        key = (source, wanted)
        if key not in self._cast:
            self._cast[key] = self.editor.insert_call(aten.to.dtype, (source, wanted), before=reader, like=source)
            self._made.add(self._cast[key])
            self.casts += 1
        return self._cast[key]

    def _restore(self, output: fx.Node) -> None:
        """Outputs get the dtype that they had."""

        def restore(source: fx.Node) -> fx.Node:
            value = source.meta.get("val")
            return (
                self._to(source, torch.float32, output) if _is_float(value) and value.dtype == self.narrow else source
            )

        self.editor.set_args(output, map_arg(output.args, restore))


def _is_quantized(module: nn.Module) -> bool:
    return isinstance(module, (Quantizer, DynamicLinear, QuantizedLSTM))


def _is_stub(graph_module: fx.GraphModule, node: fx.Node) -> bool:
    return node.op == "call_module" and isinstance(graph_module.get_submodule(str(node.target)), Quantizer)


def _narrowed(layer: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy of a layer in another precision; the given one keeps its tensors."""
    fresh = layer.__class__.__new__(layer.__class__)
    for name, value in layer.__dict__.items():
        fresh.__dict__[name] = value.copy() if isinstance(value, (dict, list, set)) else value
    for store in (fresh._parameters, fresh._buffers):
        for name, tensor in store.items():
            if _is_float(tensor):
                assert tensor is not None
                made = tensor.detach().to(dtype)
                store[name] = nn.Parameter(made, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else made  # type: ignore[assignment]
    if isinstance(fresh, nn.RNNBase):
        fresh._flat_weights = [getattr(fresh, name) for name in fresh._flat_weights_names]
    return fresh


def _is_float(value: Any) -> TypeGuard[torch.Tensor]:
    return isinstance(value, torch.Tensor) and value.dtype in (torch.float32, torch.float16, torch.bfloat16)


def _exceeds(tensor: torch.Tensor, limit: float) -> bool:
    return tensor.is_floating_point() and tensor.numel() > 0 and float(tensor.detach().abs().max()) > limit


def _finite_outputs(graph_module: fx.GraphModule, context: PassContext) -> bool | None:
    """Whether all outputs are finite on the example inputs; None where there are none."""
    if context.example_inputs is None:
        return None
    leaves = outputs_of(graph_module, *nested_inputs(graph_module, context.example_inputs), context.seed)
    floats = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()]
    return all(bool(torch.isfinite(leaf).all()) for leaf in floats)
