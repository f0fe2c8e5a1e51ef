"""The exporter's ONNX graph made ready to be simplified and written: names that users know, no metadata, plain outputs.

A node is called after the PyTorch layer or module that made it, ``layer1.0.conv1/Conv``, so that what an engine says
about a node can be traced back to the model.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import onnx
import onnx_ir as ir
from onnx_ir.passes.common import InlinePass
from torch import fx

__all__ = ["clean_up", "resolve_casts"]


def clean_up(
    model: ir.Model, input_names: Sequence[str], output_names: Sequence[str], dim_names: Mapping[str, str]
) -> dict[str, str]:
    """Inline functions, name nodes, inputs, outputs and sizes, make ``CastLike`` a ``Cast``. Changes ``model``.

    Args:
        model: as ``torch.onnx.export`` made it.
        input_names: one per graph input.
        output_names: one per graph output.
        dim_names: readable names of symbolic sizes, by symbol.

    Returns:
        name of an ONNX node → name of the node of the captured graph that it came from.
    """
    if model.functions:
        InlinePass()(model)
    model.graph.metadata_props.clear()
    _plain_outputs(model.graph)
    _name_ends(model.graph, input_names, output_names)
    taken: dict[str, int] = {}
    sources: dict[str, str] = {}
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        if node.op_type == "CastLike":
            _cast_like(node)
        elif node.op_type == "Split" and len(node.inputs) == 2:
            node.attributes.pop("num_outputs", None)
        node.name = _node_name(node, taken)
        origin = node.meta.get("node")
        if isinstance(origin, fx.Node) and "source" in origin.meta:
            sources[node.name] = origin.meta["source"]
        node.metadata_props.clear()
    for value in _values(model.graph):
        value.metadata_props.clear()
        if value.shape is not None and any(isinstance(size, ir.SymbolicDim) for size in value.shape):
            value.shape = ir.Shape([_size(size, dim_names) for size in value.shape])
    return sources


def _size(size: Any, dim_names: Mapping[str, str]) -> int | str | None:
    if not isinstance(size, ir.SymbolicDim):
        return int(size)
    if size.value is None:
        return None
    return re.sub(r"\w+", lambda word: dim_names.get(word[0], word[0]), str(size.value)).replace(" ", "")


def _cast_like(node: ir.Node) -> None:
    like = node.inputs[1]
    if like is not None and like.dtype is not None:
        node.op_type = "Cast"
        node.resize_inputs(1)
        node.attributes["to"] = ir.AttrInt64("to", int(like.dtype))


def resolve_casts(model: onnx.ModelProto) -> onnx.ModelProto:
    """Make a ``Cast`` of each ``CastLike`` whose type only ONNX itself can tell."""
    if not any(node.op_type == "CastLike" for node in model.graph.node):
        return model
    model = onnx.shape_inference.infer_shapes(model)
    graph = model.graph
    kinds = {value.name: value.type.tensor_type.elem_type for value in (*graph.input, *graph.value_info)}
    kinds |= {tensor.name: tensor.data_type for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "CastLike" and kinds.get(node.input[1]):
            node.op_type = "Cast"
            node.attribute.append(onnx.helper.make_attribute("to", kinds[node.input.pop()]))
    return model


def _node_name(node: ir.Node, taken: dict[str, int]) -> str:
    origin = node.meta.get("node")
    stack = (origin.meta.get("nn_module_stack") or {}) if isinstance(origin, fx.Node) else {}
    scope = str(next(reversed(stack.values()), ("", None))[0]).partition("@")[0] if stack else ""
    if scope.startswith("_empty_nn_module_stack"):  # torch's word for a node outside of modules
        scope = ""
    name = f"{scope}/{node.op_type}" if scope else node.op_type
    count = taken.get(name, 0)
    taken[name] = count + 1
    return f"{name}_{count}" if count or not scope else name


def _plain_outputs(graph: ir.Graph) -> None:
    """Each output is the result of a node of its own: not an input, not a weight, not given twice."""
    seen: set[int] = set()
    for index, output in enumerate(graph.outputs):
        if output.producer() is None or id(output) in seen:
            node = ir.Node("", "Identity", [output], num_outputs=1)
            copy = node.outputs[0]
            copy.shape, copy.type, copy.name = output.shape, output.type, f"{output.name}_output_{index}"
            graph.append(node)
            graph.outputs[index] = copy
        seen.add(id(graph.outputs[index]))


def _name_ends(graph: ir.Graph, input_names: Sequence[str], output_names: Sequence[str]) -> None:
    ends = {id(value): name for value, name in zip(graph.inputs, input_names, strict=True)}
    ends |= {id(value): name for value, name in zip(graph.outputs, output_names, strict=True)}
    values = [value for value in _values(graph) if id(value) not in ends and value.name]  # an unused one has none
    taken = set(ends.values())
    used = taken.union(value.name or "" for value in values)
    for value in values:  # a parameter and an operation may have one name: fx keeps names of nodes apart, no others
        name = value.name or ""
        if name in taken:
            while name in used:
                name += "_"
            _rename(graph, value, name)
        taken.add(name)
        used.add(name)
    # Two steps, for an input may take the name that another one had.
    for value in (*graph.inputs, *graph.outputs):
        value.name = f"{id(value)}"
    for value in (*graph.inputs, *graph.outputs):
        value.name = ends[id(value)]


def _rename(graph: ir.Graph, value: ir.Value, name: str) -> None:
    before = value.name
    held = before is not None and graph.initializers.get(before) is value
    if before is not None and held:
        del graph.initializers[before]
    value.name = name
    if held:
        graph.initializers[name] = value


def _values(graph: ir.Graph) -> Iterator[ir.Value]:
    yield from graph.inputs
    yield from graph.initializers.values()
    for node in ir.traversal.RecursiveGraphIterator(graph):
        yield from node.outputs
