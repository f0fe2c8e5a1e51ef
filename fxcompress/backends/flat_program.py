"""A captured graph as a flat program of tensors only, for engines that run PyTorch's own operations.

What the user's structures held beside tensors is in the manifest, so here inputs and outputs are plain: one per tensor
(or size) of the :class:`~fxcompress.backends.signature.Signature`, in its order.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram, ModuleCallEntry, ModuleCallSignature
from torch.export.graph_signature import ExportGraphSignature, InputKind
from torch.utils import _pytree as pytree
from torch.utils._sympy.value_ranges import ValueRanges

from fxcompress.graph.lifting import output_spec
from fxcompress.graph.lowering import Lowering, to_exported_program
from fxcompress.graph.trace import trace

__all__ = ["flat_program"]

_SMALLEST_TRACED = 2  # torch.export takes 0 and 1 for special sizes, and says so in every range


def flat_program(graph_module: fx.GraphModule, example_inputs: Sequence[torch.Tensor] | None = None) -> ExportedProgram:
    """Lower a captured graph to a program whose inputs and outputs are tensors and sizes, no structure, no constants.

    No output shares memory with an input or a weight: whoever writes into an output must not change the engine.

    Args:
        graph_module: a captured graph in eval mode; it is not changed, its weights are shared.
        example_inputs: one tensor per input, to be kept in the program; None keeps none.

    Raises:
        GraphError: a layer cannot be lowered.
        PreconditionError: the graph has no shapes.
    """
    program = to_exported_program(graph_module, rewrite=_taken_apart)
    graph = program.graph
    specs, inputs = [], []
    for node, spec in zip(graph.find_nodes(op="placeholder"), program.graph_signature.input_specs, strict=True):
        if spec.kind is InputKind.USER_INPUT:
            if not _varies(node):  # a value that capture made part of the graph; nothing reads it
                graph.erase_node(node)
                continue
            inputs.append(node.name)
        specs.append(spec)
    output = graph.output_node()
    results = [result for result in output.args[0] if _varies(result)]
    output.args = (tuple(_own_memory(graph, output, result) for result in results),)
    graph.lint()
    signature = ExportGraphSignature(specs, [output_spec(result) for result in output.args[0]])
    in_spec = pytree.tree_structure(((0,) * len(inputs), {}))
    out_spec = pytree.tree_structure((0,) * len(results))
    call = ModuleCallSignature([], [], in_spec, out_spec, inputs)
    return ExportedProgram(
        nn.Module(),
        graph,
        signature,
        program.state_dict,
        {symbol: _from_one(bounds) for symbol, bounds in program.range_constraints.items()},
        [ModuleCallEntry("", call)],
        None if example_inputs is None else (tuple(example_inputs), {}),
        program.constants,
    )


def _taken_apart(lowering: Lowering, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Operators of our own, which no other program knows, as the ATen operators that define them."""
    if not isinstance(target, torch._ops.OpOverload) or target.namespace != "fxcompress":
        return NotImplemented
    leaves, spec = pytree.tree_flatten((args, kwargs))
    operands = [leaf for leaf in leaves if isinstance(leaf, fx.Node)]

    def operation(*values: Any) -> Any:
        given = iter(values)
        own_args, own_kwargs = pytree.tree_unflatten([next(given) if _is_node(x) else x for x in leaves], spec)
        return target(*own_args, **own_kwargs)

    recorded = trace(operation, [operand.meta["val"] for operand in operands], lowering.mode, decompositions={})
    return lowering.inline(recorded, operands, origin=str(target))


def _is_node(value: Any) -> bool:
    return isinstance(value, fx.Node)


def _varies(result: Any) -> bool:
    value = result.meta.get("val") if isinstance(result, fx.Node) else result
    return isinstance(result, fx.Node) and isinstance(value, (torch.Tensor, torch.SymInt))


def _own_memory(graph: fx.Graph, output: fx.Node, result: Any) -> fx.Node:
    """``result``, copied if it may be a view of a placeholder."""
    node = result
    while isinstance(node, fx.Node) and node.op != "placeholder":
        viewed = node.target is operator.getitem or (
            isinstance(node.target, torch._ops.OpOverload) and _may_alias(node.target)
        )
        if not viewed:
            return result
        node = node.args[0] if node.args else None
    if not isinstance(result.meta["val"], torch.Tensor):
        return result
    with graph.inserting_before(output):
        copy = graph.call_function(torch.ops.aten.clone.default, (result,))
    copy.meta["val"] = result.meta["val"]
    return copy


def _may_alias(target: torch._ops.OpOverload) -> bool:
    """Views say so in their schema; composite operations (``reshape``, ``contiguous``, ``to``) may be views unsaid."""
    if any(returned.alias_info is not None for returned in target._schema.returns):
        return True
    return target.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd)


def _from_one(bounds: ValueRanges[Any]) -> ValueRanges[Any]:
    """The same range, open for size 1 where only tracing's convention closes it; engines are verified at that size."""
    return ValueRanges(1, bounds.upper) if bounds.lower == _SMALLEST_TRACED else bounds
