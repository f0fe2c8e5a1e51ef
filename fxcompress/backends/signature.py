"""What an engine takes and gives: names, shapes, dtypes and pytree structure, read from a captured graph."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from fxcompress.errors import GraphError
from fxcompress.graph.info import info
from fxcompress.graph.structure import Structure

__all__ = ["Signature", "TensorSpec", "dtype_name", "signature_of"]


@dataclass(frozen=True)
class TensorSpec:
    """One input or output of an engine.

    Attributes:
        name: an identifier, unique among inputs and outputs.
        shape: sizes; a dynamic one is its symbol (``"batch"``) or an expression of symbols (``"2*batch"``).
        dtype: as torch calls it: ``"float32"``, ``"bfloat16"``, ``"int64"``, ``"bool"``.
        example: of an input, the sizes that the example had at capture, if there was one.
        low: of an integer input, the least value in the example; random inputs stay within ``low`` and ``high``.
        high: of an integer input, the greatest value in the example.
    """

    name: str
    shape: tuple[int | str, ...]
    dtype: str
    example: tuple[int, ...] | None = None
    low: int | None = None
    high: int | None = None

    def __str__(self) -> str:
        return f"{self.name}: {self.dtype}[{', '.join(map(str, self.shape))}]"


@dataclass(frozen=True)
class Signature:
    """Inputs and outputs in flat order, and the structures that the user sees."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    input_structure: Structure
    output_structure: Structure


def signature_of(graph_module: fx.GraphModule, example_inputs: Sequence[Any] | None = None) -> Signature:
    """The signature of a captured graph.

    Args:
        graph_module: as :func:`fxcompress.capture.capture` makes it.
        example_inputs: one tensor per input, flat, to remember sizes and the range of integers; None if unknown.

    Raises:
        GraphError: the graph was not captured, or has no shapes.
        PreconditionError: inputs or outputs hold what JSON cannot describe.
    """
    facts = info(graph_module)
    placeholders = list(graph_module.graph.find_nodes(op="placeholder"))
    results = graph_module.graph.output_node().args[0]
    results = tuple(results) if isinstance(results, (tuple, list)) else (results,)
    for what, spec, found in (("inputs", facts.in_spec, placeholders), ("outputs", facts.out_spec, results)):
        if spec.num_leaves != len(found):
            raise GraphError(f"the graph has {len(found)} {what}, its structure {spec.num_leaves}")

    fixed_in = {index: _value(node) for index, node in enumerate(placeholders) if not _is_tensor(node)}
    fixed_out = {index: _value(result) for index, result in enumerate(results) if not _is_tensor(result)}
    input_structure = Structure.from_spec(facts.in_spec, fixed_in).with_parameters(facts.parameter_names)
    output_structure = Structure.from_spec(facts.out_spec, fixed_out)

    varying = [node for index, node in enumerate(placeholders) if index not in fixed_in]
    inputs = [_spec(str(node.target), node, facts.dim_names) for node in varying]
    if example_inputs is not None:
        tensors = [value for value in example_inputs if isinstance(value, torch.Tensor)]
        if len(tensors) == len(inputs):
            inputs = [_with_example(spec, tensor) for spec, tensor in zip(inputs, tensors, strict=True)]
    names = output_structure.leaf_names("output", taken=[spec.name for spec in inputs])
    varying_out = [result for index, result in enumerate(results) if index not in fixed_out]
    outputs = [_spec(name, node, facts.dim_names) for name, node in zip(names, varying_out, strict=True)]
    return Signature(tuple(inputs), tuple(outputs), input_structure, output_structure)


def dtype_name(dtype: torch.dtype) -> str:
    """``"float32"`` of ``torch.float32``."""
    return str(dtype).removeprefix("torch.")


def _value(item: Any) -> Any:
    return item.meta.get("val") if isinstance(item, fx.Node) else item


def _is_tensor(item: Any) -> bool:
    return isinstance(_value(item), (torch.Tensor, torch.SymInt))


def _spec(name: str, node: Any, dim_names: dict[str, str]) -> TensorSpec:
    value = _value(node)
    if isinstance(value, torch.SymInt):
        return TensorSpec(name, (), "int64")
    return TensorSpec(name, tuple(_size(size, dim_names) for size in value.shape), dtype_name(value.dtype))


def _size(size: int | torch.SymInt, dim_names: dict[str, str]) -> int | str:
    if isinstance(size, int):
        return size
    if size.node.expr.is_number:
        return int(size.node.expr)
    return re.sub(r"\w+", lambda word: dim_names.get(word[0], word[0]), str(size.node.expr)).replace(" ", "")


def _with_example(spec: TensorSpec, tensor: torch.Tensor) -> TensorSpec:
    spec = replace(spec, example=tuple(tensor.shape))
    integral = not (tensor.dtype.is_floating_point or tensor.dtype.is_complex or tensor.dtype is torch.bool)
    if integral and tensor.numel():
        spec = replace(spec, low=int(tensor.min()), high=int(tensor.max()))
    return spec
