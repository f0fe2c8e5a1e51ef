"""Weights beside the ONNX graph: taken out before it is worked on, put back when it is written.

Simplifying a graph and serializing it again copies every weight several times; of a graph without them it takes a
tenth of a second. So weights stay the tensors that the model has, and reach the disk once.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import torch
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator

from fxcompress.graph.raw_bytes import raw_bytes

__all__ = ["all_nodes", "fold_weights", "strip_weights", "weights_file", "write_model"]

Weights = dict[str, torch.Tensor]

_SMALL = 1 << 10  # bytes; such a vector may be a shape or an axis, which simplification has to see
_EMBED = 64 << 20  # bytes; with more weights than this they are a file of their own, which engines map into memory
_ALIGNMENT = 4096  # of weights in that file

# Not to be computed beforehand: they only make weights larger. (A quantized weight is stored as integers.)
_KEPT = {"DequantizeLinear", "DynamicQuantizeLinear", "Identity"}


def strip_weights(model: ir.Model) -> Weights:
    """Make every weight of ``model`` a graph input of the same name; gives their tensors. Small vectors stay."""
    weights: Weights = {}
    for name, value in list(model.graph.initializers.items()):
        held = value.const_value
        raw = getattr(held, "raw", None)
        if held is not None and isinstance(raw, torch.Tensor) and (raw.dim() > 1 or held.nbytes > _SMALL):
            weights[name] = raw.detach()
            del model.graph.initializers[name]
            model.graph.inputs.append(value)
    return weights


def fold_weights(graph: onnx.GraphProto, weights: Weights) -> None:
    """Compute what depends on weights and constants alone: the transpose of a weight, its gates in another order.

    A weight that something else reads too (an embedding that is also the last layer) stays as it is, or it would be
    stored twice; beside others that go, it may be read (the scale of a quantized weight) as long as nothing grows.
    ``Constant`` nodes become initializers.
    """
    _lift_constants(graph)
    constants = {tensor.name: tensor for tensor in graph.initializer}
    known = constants.keys() | weights.keys()
    ends = {output.name for output in graph.output}
    fixed, free = [], set(ends)  # nodes that can be computed now; names that others read
    for node in graph.node:
        if _is_computable(node) and known.issuperset(filter(None, node.input)) and ends.isdisjoint(node.output):
            fixed.append(node)
            known.update(node.output)
        else:
            free.update(name for inner in all_nodes([node]) for name in inner.input)
    gone: set[int] = set()
    names: dict[str, str] = {}
    for node in fixed:
        held = [name for name in node.input if name in weights]
        there = all(name in weights or name in constants for name in node.input if name)
        mine = [name for name in held if name not in free]  # these go, with the node
        if there and (mine or not held):
            results = _compute(node, weights, constants)
            if results is not None and (mine == held or _bytes_of(results) <= _bytes_of(weights[n] for n in mine)):
                if held and node.op_type in _SUFFIXES:
                    names[node.output[0]] = f"{names.get(held[0], held[0])}_{_SUFFIXES[node.op_type]}"
                weights.update(zip(node.output, results, strict=True))
                gone.add(id(node))
                continue
        free.update(node.input)
    if gone:
        kept = [node for node in graph.node if id(node) not in gone]
        del graph.node[:]
        graph.node.extend(kept)
        _rename(graph, weights, names)
    _declare(graph, weights)


def _bytes_of(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


# What a weight is called after it went through an operation.
_SUFFIXES = {"Transpose": "transposed", "QuantizeLinear": "quantized"}


def _rename(graph: onnx.GraphProto, weights: Weights, names: Mapping[str, str]) -> None:
    for old, new in names.items():
        weights[new] = weights.pop(old)
    for node in all_nodes(graph.node):
        for index, name in enumerate(node.input):
            if name in names:
                node.input[index] = names[name]


def _is_computable(node: onnx.NodeProto) -> bool:
    return not node.domain and node.op_type not in _KEPT and not any(a.HasField("g") for a in node.attribute)


def _lift_constants(graph: onnx.GraphProto) -> None:
    kept = []
    for node in graph.node:
        tensor = _constant(node) if node.op_type == "Constant" and not node.domain else None
        if tensor is None:
            kept.append(node)
        else:
            tensor.name = node.output[0]
            graph.initializer.append(tensor)
    del graph.node[:]
    graph.node.extend(kept)


def _constant(node: onnx.NodeProto) -> onnx.TensorProto | None:
    (attribute,) = node.attribute
    if attribute.name == "value":
        return attribute.t
    kinds = {"value_float": np.float32, "value_floats": np.float32, "value_int": np.int64, "value_ints": np.int64}
    if attribute.name not in kinds:
        return None
    value = onnx.helper.get_attribute_value(attribute)
    return numpy_helper.from_array(np.array(value, dtype=kinds[attribute.name]))


def _compute(
    node: onnx.NodeProto, weights: Weights, constants: dict[str, onnx.TensorProto]
) -> list[torch.Tensor] | None:
    if node.op_type == "Transpose" and node.input[0] in weights:
        value = weights[node.input[0]]
        order = next((list(a.ints) for a in node.attribute if a.name == "perm"), list(reversed(range(value.dim()))))
        return [value.permute(order)]  # copied when it is written, not before
    if any(weights[name].dtype in _NOT_IN_NUMPY for name in node.input if name in weights):
        return None
    feeds = {
        name: weights[name].numpy(force=True) if name in weights else numpy_helper.to_array(constants[name])
        for name in node.input
        if name
    }
    try:
        arrays = [np.ascontiguousarray(result) for result in ReferenceEvaluator(node).run(None, feeds)]
        results = [torch.from_numpy(array if array.flags.writeable else array.copy()) for array in arrays]
    except (NotImplementedError, RuntimeError, TypeError, ValueError):
        return None
    grows = _bytes_of(results) > 2 * sum(feed.nbytes for feed in feeds.values())
    return None if grows else results


_NOT_IN_NUMPY = {torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2}
_KINDS = {
    torch.float16: onnx.TensorProto.FLOAT16,
    torch.bfloat16: onnx.TensorProto.BFLOAT16,
    torch.float32: onnx.TensorProto.FLOAT,
    torch.float64: onnx.TensorProto.DOUBLE,
    torch.int8: onnx.TensorProto.INT8,
    torch.uint8: onnx.TensorProto.UINT8,
    torch.int16: onnx.TensorProto.INT16,
    torch.int32: onnx.TensorProto.INT32,
    torch.int64: onnx.TensorProto.INT64,
    torch.bool: onnx.TensorProto.BOOL,
    torch.float8_e4m3fn: onnx.TensorProto.FLOAT8E4M3FN,
    torch.float8_e5m2: onnx.TensorProto.FLOAT8E5M2,
}


def _declare(graph: onnx.GraphProto, weights: Weights) -> None:
    """Make graph inputs of the weights that the nodes read, and of no others; drop constants that nobody reads."""
    read = _read(graph)
    inputs = [value for value in graph.input if value.name not in weights]
    types = {value.name: value.type.tensor_type.elem_type for value in (*graph.input, *graph.value_info)}
    for name in [name for name in weights if name not in read]:
        del weights[name]
    for name, tensor in weights.items():
        kind = types.get(name) or _KINDS[tensor.dtype]
        inputs.append(onnx.helper.make_tensor_value_info(name, kind, list(tensor.shape)))
    del graph.input[:]
    graph.input.extend(inputs)
    small = [tensor for tensor in graph.initializer if tensor.name in read]
    del graph.initializer[:]
    graph.initializer.extend(small)
    shapes = [value for value in graph.value_info if value.name not in weights]
    del graph.value_info[:]
    graph.value_info.extend(shapes)


def all_nodes(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    """The nodes, and those of the graphs inside them."""
    for node in nodes:
        yield node
        for attribute in node.attribute:
            for graph in (attribute.g, *attribute.graphs) if attribute.HasField("g") else attribute.graphs:
                yield from all_nodes(graph.node)


def _read(graph: onnx.GraphProto) -> set[str]:
    return {name for node in all_nodes(graph.node) for name in node.input} | {value.name for value in graph.output}


def _restore(graph: onnx.GraphProto, weights: Weights) -> dict[str, onnx.TensorProto]:
    """Turn the graph inputs that stand for weights into initializers without data; gives those that are in use."""
    read = _read(graph)
    inputs, tensors = [], {}
    for value in graph.input:
        if value.name not in weights:
            inputs.append(value)
        elif value.name in read:
            kind = value.type.tensor_type.elem_type
            tensors[value.name] = onnx.TensorProto(name=value.name, data_type=kind, dims=weights[value.name].shape)
    del graph.input[:]
    graph.input.extend(inputs)
    return tensors


def weights_file(path: Path) -> Path:
    """Where the weights of the model in ``path`` are, if they are a file of their own."""
    return path.with_name(path.name + ".data")


def write_model(model: onnx.ModelProto, weights: Weights, path: Path) -> Path | None:
    """Write ``model`` to ``path`` with its weights, each straight from its tensor.

    Returns:
        The file of weights beside it, None where they are few enough to be in the model file.
    """
    tensors = _restore(model.graph, weights)
    total = sum(weights[name].nbytes for name in tensors)
    if total <= _EMBED:
        _write_embedded(model, tensors, weights, path)
        return None
    beside = weights_file(path)
    with beside.open("wb") as file:
        for name, tensor in tensors.items():
            data = raw_bytes(weights[name])
            if data.nbytes >= _ALIGNMENT:
                file.seek(-file.tell() % _ALIGNMENT, os.SEEK_CUR)
            place = {"location": beside.name, "offset": file.tell(), "length": data.nbytes}
            tensor.data_location = onnx.TensorProto.EXTERNAL
            for key, value in place.items():
                tensor.external_data.add(key=key, value=str(value))
            file.write(data.data)
    model.graph.initializer.extend(tensors.values())
    path.write_bytes(model.SerializeToString())
    return beside


def _write_embedded(model: onnx.ModelProto, tensors: dict[str, onnx.TensorProto], weights: Weights, path: Path) -> None:
    """What ``SerializeToString`` gives of the whole model, written without having the weights in memory again.

    A serialized message is its fields one after the other, each a tag, a length and the bytes.
    """
    heads = []
    for name, tensor in tensors.items():
        head, size = tensor.SerializeToString(), weights[name].nbytes
        head += _field(onnx.TensorProto.RAW_DATA_FIELD_NUMBER, size)
        heads.append(_field(onnx.GraphProto.INITIALIZER_FIELD_NUMBER, len(head) + size) + head)
    graph = model.graph.SerializeToString()
    model.ClearField("graph")
    size = len(graph) + sum(map(len, heads)) + sum(weights[name].nbytes for name in tensors)
    with path.open("wb") as file:
        file.write(model.SerializeToString() + _field(onnx.ModelProto.GRAPH_FIELD_NUMBER, size) + graph)
        for name, head in zip(tensors, heads, strict=True):
            file.write(head)
            file.write(raw_bytes(weights[name]).data)


def _field(number: int, length: int) -> bytes:
    """Tag and length of a field of bytes, as protobuf writes them: seven bits per byte, least first."""
    written = bytearray()
    for value in (number << 3 | 2, length):
        while value > 0x7F:
            written.append(value & 0x7F | 0x80)
            value >>= 7
        written.append(value)
    return bytes(written)
