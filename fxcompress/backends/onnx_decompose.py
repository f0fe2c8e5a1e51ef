"""ATen operations that ONNX has no function for, each taken apart alone.

``torch.onnx.export`` decomposes by tracing the whole model once more, forwards and backwards, which is a third of its
time. Nearly every operation of a captured graph has an ONNX function as it stands, so here the graph is kept, and only
a node that needs it is rewritten: by a rule of :mod:`fxcompress.backends.onnx_rules`, or by tracing that one operation
with the decompositions that the exporter asks for. Equal operations on equal shapes are traced once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from fxcompress.backends.onnx_rules import KEEP, ONLY_SOMETIMES, RULES, bound
from fxcompress.errors import GraphError
from fxcompress.graph.lowering import Lowering, to_exported_program
from fxcompress.graph.shapes import where
from fxcompress.graph.trace import trace

__all__ = ["OnnxReadyProgram", "RetracedProgram", "Rewriter"]


class OnnxReadyProgram(ExportedProgram):
    """A program that decomposes node by node.

    ``torch.onnx.export`` calls :meth:`run_decompositions` with its table of the operations that it cannot take.
    """

    source: fx.GraphModule
    decomposed: ExportedProgram | None = None

    @classmethod
    def of(cls, graph_module: fx.GraphModule) -> OnnxReadyProgram:
        """The program of a captured graph."""
        program = to_exported_program(graph_module, program_type=cls)
        assert isinstance(program, cls)
        program.source = graph_module
        return program

    def run_decompositions(self, decomp_table: Any = None, *_: Any, **__: Any) -> ExportedProgram:
        """The program with every operation of ``decomp_table`` taken apart."""
        self.decomposed = to_exported_program(self.source, rewrite=Rewriter(decomp_table or {}))
        return _without_constant_outputs(self.decomposed)


class RetracedProgram(ExportedProgram):
    """A program that decomposes as torch does it: everything at once, by tracing it again."""

    def run_decompositions(self, *args: Any, **kwargs: Any) -> ExportedProgram:
        before = [_value(result) for result in self.graph.output_node().args[0]]
        retraced = super().run_decompositions(*args, **kwargs)
        results = retraced.graph.output_node().args[0]
        for value, result in zip(before, results, strict=True):
            if not _agree(value, _value(result)):
                raise GraphError("a dynamic size becomes a constant when the graph is decomposed")
        return _without_constant_outputs(retraced)


def _value(result: Any) -> Any:
    return result.meta.get("val") if isinstance(result, fx.Node) else result


def _agree(before: Any, after: Any) -> bool:
    """Whether two fake values have the same shape for every size of the batch; what is no tensor agrees."""
    if isinstance(before, (tuple, list)) and isinstance(after, (tuple, list)):
        return len(before) == len(after) and all(map(_agree, before, after))
    if not isinstance(before, torch.Tensor) or not isinstance(after, torch.Tensor):
        return True
    if before.dim() != after.dim():
        return False
    # The same size may be written in two ways, so they are compared as numbers.
    return all(
        _at(old, base) == _at(new, base) for old, new in zip(before.shape, after.shape, strict=True) for base in (7, 30)
    )


def _at(size: int | torch.SymInt, base: int) -> int:
    if isinstance(size, int):
        return size
    symbols = sorted(size.node.expr.free_symbols, key=str)
    return int(size.node.expr.subs({symbol: base + int(str(symbol).strip("su") or 0) % 101 for symbol in symbols}))


def _without_constant_outputs(program: ExportedProgram) -> ExportedProgram:
    """Numbers among the outputs become None, which the exporter leaves out; it does not know numbers."""
    output = program.graph.output_node()
    output.args = (tuple(value if isinstance(value, fx.Node) else None for value in output.args[0]),)
    return program


class Rewriter:
    """Decides for each ATen call whether ONNX takes it as it is; a :data:`fxcompress.graph.lowering.Rewrite`."""

    def __init__(self, table: Mapping[Any, Callable[..., Any]]) -> None:
        self._table = dict(table)
        self._traced: dict[Any, fx.GraphModule] = {}
        self._busy: set[Any] = set()  # operations that are being taken apart

    def __call__(self, lowering: Lowering, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not isinstance(target, torch._ops.OpOverload) or target in self._busy:
            return NotImplemented
        rule = RULES.get(target)
        if rule is not None:
            result = rule(lowering, bound(target, args, kwargs))
            if result is not NotImplemented:
                return NotImplemented if result is KEEP else result
        if target in self._table or _is_alias(target) or target in ONLY_SOMETIMES:
            return self._take_apart(lowering, target, args, kwargs)
        return NotImplemented

    def _take_apart(self, lowering: Lowering, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        leaves, spec = pytree.tree_flatten((args, kwargs))
        operands = [leaf for leaf in leaves if isinstance(leaf, fx.Node)]
        key = target, spec, tuple(map(_leaf_key, leaves))
        if key not in self._traced:

            def operation(*values: Any) -> Any:
                given = iter(values)
                filled = [next(given) if isinstance(leaf, fx.Node) else leaf for leaf in leaves]
                own_args, own_kwargs = pytree.tree_unflatten(filled, spec)
                return target(*own_args, **own_kwargs)

            values = [operand.meta["val"] for operand in operands]
            self._traced[key] = trace(operation, values, lowering.mode, decompositions=self._table)
        recorded = self._traced[key]
        made = map_arg(recorded.graph.output_node().args[0], _value)
        if not _agree(lowering.value, made):
            raise GraphError(
                f"{target} has no ONNX form where a size varies that it loops over",
                where=where(lowering.source) if lowering.source else None,
                remedy="fix that size in dynamic_shapes",
            )
        self._busy.add(target)
        result = lowering.inline(recorded, operands, rewrite=True, origin=str(target))
        self._busy.discard(target)
        return result


def _leaf_key(leaf: Any) -> Any:
    value = leaf.meta["val"] if isinstance(leaf, fx.Node) else leaf
    if isinstance(value, torch.Tensor):
        return value.dtype, tuple(map(str, value.shape))
    return type(leaf), type(value), str(value)


def _is_alias(target: torch._ops.OpOverload) -> bool:
    """Composite operations that may return their argument: tracing never keeps them whole, so exporters skip them."""
    composite = target.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd)
    return composite and any(result.alias_info is not None for result in target._schema.returns)
