"""A flat program as a TorchScript graph, node by node.

Tracing would fix every size that the graph computes with: the operations here are ATen overloads, and the tracer sees
their integers as constants. The two graphs have the same operations, so one is written as the other: each call becomes
a node of the same overload, sizes become integers of the graph, weights its constants.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from fxcompress.errors import BackendError
from fxcompress.graph.shapes import where

__all__ = ["script_graph"]

_ATEN = torch.ops.aten
# Sizes that the captured graph asks for, and arithmetic on them, under the names that TorchScript has for it.
_SIZE_OPERATIONS: dict[Any, str] = {
    _ATEN.sym_size.int: "aten::size",
    _ATEN.sym_numel.default: "aten::numel",
    _ATEN.sym_stride.int: "aten::stride",
    _ATEN.sym_storage_offset.default: "aten::storage_offset",
    operator.add: "aten::add",
    operator.sub: "aten::sub",
    operator.mul: "aten::mul",
    operator.floordiv: "aten::floordiv",
    operator.truediv: "aten::div",
    operator.mod: "aten::remainder",
    operator.pow: "aten::pow",
    operator.neg: "aten::neg",
    operator.eq: "aten::eq",
    operator.ne: "aten::ne",
    operator.lt: "aten::lt",
    operator.le: "aten::le",
    operator.gt: "aten::gt",
    operator.ge: "aten::ge",
    operator.not_: "aten::__not__",
    operator.and_: "aten::__and__",
    operator.or_: "aten::__or__",
    torch.sym_max: "prim::max",
    torch.sym_min: "prim::min",
    torch.sym_float: "aten::Float",
    torch.sym_int: "aten::Int",
    torch.sym_not: "aten::__not__",
    math.floor: "aten::floor",
    math.ceil: "aten::ceil",
    math.trunc: "aten::Int",
    math.sqrt: "aten::sqrt",
}
_MEMORY_FORMATS = {
    torch.contiguous_format: 0,
    torch.preserve_format: 1,
    torch.channels_last: 2,
    torch.channels_last_3d: 3,
}
_RESAMPLINGS = ("upsample_linear", "upsample_nearest", "_upsample_nearest_exact")
# In one dimension a scale that is None fits two overloads; both then go by the size alone.
_FROM_SIZE = {f"aten::{kind}1d.vec": f"aten::{kind}1d" for kind in _RESAMPLINGS}


def script_graph(program: ExportedProgram) -> torch._C.Graph:
    """The TorchScript graph of a flat program: tensors in, one tuple of tensors out; weights are constants.

    Raises:
        BackendError: an operation has no form in TorchScript; names it, its node and its source line.
    """
    graph: torch._C.Graph = _Writer(program).graph
    return graph


class _Writer:
    graph: Any

    def __init__(self, program: ExportedProgram) -> None:
        self.graph = torch._C.Graph()  # torch's stubs leave out most of its methods
        self._values: dict[fx.Node, Any] = {}
        self._constants: dict[Any, Any] = {}
        weights = {**program.state_dict, **program.constants}
        placeholders = program.graph.find_nodes(op="placeholder")
        for node, spec in zip(placeholders, program.graph_signature.input_specs, strict=True):
            if spec.kind is InputKind.USER_INPUT:
                value = self.graph.addInput(str(node.target))
                is_size = not isinstance(node.meta["val"], torch.Tensor)
                self._values[node] = self._insert("aten::Int", [value]) if is_size else value
            else:
                self._values[node] = self.graph.insertConstant(weights[str(spec.target)].detach())
        for node in program.graph.nodes:
            if node.op == "call_function":
                self._values[node] = self._call(node)
        results = [self._result(result) for result in program.graph.output_node().args[0]]
        packed = self._pack("prim::TupleConstruct", results, torch._C.TupleType([v.type() for v in results]))
        self.graph.registerOutput(packed)
        self.graph.lint()

    # --- calls -------------------------------------------------------------------------------------------------

    def _call(self, node: fx.Node) -> Any:
        if node.target is operator.getitem:
            return self._item(node)
        known = _SIZE_OPERATIONS.get(node.target)
        if known is not None:
            return self._guarded(node, lambda: self._insert(known, [self._argument(arg, None) for arg in node.args]))
        if not isinstance(node.target, torch._ops.OpOverload):
            raise _refused(node, "this operation has no form in TorchScript")
        return self._guarded(node, lambda: self._overload(node, node.target))

    def _guarded(self, node: fx.Node, write: Callable[[], Any]) -> Any:
        try:
            return write()
        except (RuntimeError, TypeError, ValueError) as error:
            reason = next((line.strip() for line in str(error).splitlines() if line.strip()), repr(error))
            raise _refused(node, reason) from error

    def _overload(self, node: fx.Node, target: Any) -> Any:
        schema = target._schema
        if target.namespace != "aten":
            raise TypeError("it belongs to another package, whose library the engine would need")
        values, numbers = [], False
        for index, argument in enumerate(schema.arguments):
            if argument.name in node.kwargs:
                given = node.kwargs[argument.name]
            elif index < len(node.args):
                given = node.args[index]
            else:
                given = argument.default_value
            value = self._argument(given, argument)
            numbers |= isinstance(argument.type, torch._C.TensorType) and _is_number(given)
            values.append(value)
        # Not Graph.insert(), which takes no arguments that are keywords only.
        call = self.graph.insertNode(self.graph.create(schema.name, values, len(schema.returns)))
        results = list(call.outputs())
        for result, returned in zip(results, schema.returns, strict=True):
            result.setType(returned.type)
        chosen = call.schema().partition("(")[0]
        wanted = f"{schema.name}.{schema.overload_name}" if schema.overload_name else schema.name
        # A number in the place of a tensor counts as one in ATen; TorchScript has other overloads for that.
        if chosen not in (wanted, _FROM_SIZE.get(wanted)) and not numbers:
            raise TypeError(f"TorchScript takes {chosen} for {wanted}")
        return results[0] if len(results) == 1 else results

    def _item(self, node: fx.Node) -> Any:
        source, index = node.args
        packed = self._values[source]  # type: ignore[index]
        if isinstance(packed, list):
            return packed[index]  # type: ignore[index]
        return self._insert("aten::__getitem__", [packed, self._constant(index)])

    # --- arguments ---------------------------------------------------------------------------------------------

    def _argument(self, given: Any, argument: Any) -> Any:
        """``given`` as a value of the graph, of the type that the schema's argument has."""
        kind = argument.type if argument is not None else None
        if isinstance(kind, torch._C.OptionalType):
            if given is None:
                return self._constant(None)
            kind = kind.getElementType()
        if isinstance(kind, torch._C.ListType):
            element = kind.getElementType()
            size = argument.N or 1
            items = list(given) if isinstance(given, (tuple, list)) else [given] * size
            return self._pack("prim::ListConstruct", [self._element(item, element) for item in items], kind)
        return self._element(given, kind)

    def _element(self, given: Any, kind: Any) -> Any:
        if isinstance(kind, torch._C.OptionalType) and given is not None:
            kind = kind.getElementType()
        if isinstance(given, fx.Node):
            value = self._values[given]
            wants_float = isinstance(kind, torch._C.FloatType) and isinstance(value.type(), torch._C.IntType)
            return self._insert("aten::Float", [value]) if wants_float else value
        if isinstance(kind, torch._C.FloatType) and isinstance(given, (int, bool)):
            given = float(given)
        return self._constant(_MEMORY_FORMATS.get(given, given) if isinstance(given, torch.memory_format) else given)

    def _constant(self, given: Any) -> Any:
        # Read where they are used: one constant per value, made before all calls that read it.
        key = (type(given), str(given))
        if key not in self._constants:
            self._constants[key] = self.graph.insertConstant(given)
        return self._constants[key]

    def _result(self, result: fx.Node) -> Any:
        value = self._values[result]
        if isinstance(result.meta["val"], torch.Tensor):
            return value
        return self._insert("prim::NumToTensor", [value])

    # --- writing -----------------------------------------------------------------------------------------------

    def _insert(self, kind: str, values: Sequence[Any]) -> Any:
        return self.graph.insert(kind, list(values))

    def _pack(self, kind: str, values: Sequence[Any], type_: Any) -> Any:
        value = self.graph.insertNode(self.graph.create(kind, list(values), 1)).output()
        value.setType(type_)
        return value


def _is_number(given: Any) -> bool:
    value = given.meta["val"] if isinstance(given, fx.Node) else given
    return isinstance(value, (int, float, torch.SymInt, torch.SymFloat))


def _refused(node: fx.Node, reason: str) -> BackendError:
    return BackendError(
        f"TorchScript cannot run {node.target}: {reason}",
        where=where(node),
        remedy="write that line of the model with other operations, or use the backend torch_export",
    )
