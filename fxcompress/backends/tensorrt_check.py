"""Whether TensorRT will import an ONNX file, told before it is tried, layer by layer, with what to do about it.

The rules are those that the parser of TensorRT for RTX 1.7 was seen to apply, and three that it ought to: it takes
float64 as float32 and uint8 quantization as int8 without an error, and other numbers come out. The parser itself has
the last word; it sees more, and says less.

Reference: https://docs.nvidia.com/deeplearning/tensorrt/latest/inference-library/work-quantized-types.html
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto

from fxcompress.backends.tensorrt_graph import Graph, attribute, layer_of, text
from fxcompress.backends.tensorrt_operators import (
    CONTROL_FLOW,
    DATA_DEPENDENT,
    FLOATS_ONLY,
    INTEGER_QUANTIZATION,
    INTEGERS,
    KNOWN_TYPES,
    NO_NUMBERS,
    QDQ,
    QUANTIZED,
    QUANTIZING,
    SCATTERS,
    UNSUPPORTED,
)
from fxcompress.errors import BackendError

__all__ = ["Finding", "check_onnx"]

_MOST_DIMS = 8
_TENSORRT_SCHEME = "quantize with Quantize(scheme='tensorrt'): int8, symmetric, biases left in float"


@dataclass(frozen=True)
class Finding:
    """Something in an ONNX file that TensorRT will not take, or takes for something else.

    Attributes:
        code: stable: ``"unsupported_op"``, ``"integer_bias"``, ``"zero_point"`` …
        node: the ONNX node's name; or the input's, output's or weight's.
        op: the ONNX operator; empty for inputs, outputs and weights.
        layer: the PyTorch layer or module that the node came from; empty where its name does not tell.
        problem: what is wrong, in a sentence.
        remedy: what to do, in a sentence.
        refused: whether a build is refused; otherwise it is only worth knowing.
    """

    code: str
    node: str
    op: str
    layer: str
    problem: str
    remedy: str
    refused: bool = True

    def __str__(self) -> str:
        place = f"{self.op} {self.node!r}" if self.op else repr(self.node)
        return f"{place}{f' of layer {self.layer!r}' if self.layer else ''}: {self.problem}; {self.remedy}"


def check_onnx(path: str | Path) -> list[Finding]:
    """Read an ONNX file against TensorRT's rules. Needs no TensorRT; weights are not read.

    Args:
        path: of the file; weights may lie beside it.

    Returns:
        what was found, in the order of the graph; nothing where TensorRT should import the file.

    Raises:
        BackendError: this is no ONNX file.
    """
    path = Path(path)
    try:
        model = onnx.load(path, load_external_data=False)
    except (OSError, ValueError, onnx.checker.ValidationError) as error:
        raise BackendError(f"the ONNX file cannot be read: {error}", where=str(path)) from error
    except Exception as error:  # protobuf's DecodeError is of no public class
        raise BackendError("this is no ONNX file", where=str(path)) from error
    if not model.graph.value_info:
        with contextlib.suppress(onnx.shape_inference.InferenceError):  # fewer types are known, and fewer rules apply
            model = onnx.shape_inference.infer_shapes(model)
    graph = Graph(model, path.parent)
    return [*_check_ends(graph), *_check_nodes(graph)]


def _check_ends(graph: Graph) -> Iterator[Finding]:
    constants = graph.constants.keys()
    for what, values in (("input", graph.model.graph.input), ("output", graph.model.graph.output)):
        for value in values:
            if value.name in constants:
                continue
            kind = value.type.WhichOneof("value")
            if kind != "tensor_type":
                told = str(kind).removesuffix("_type")
                yield _end("type", value.name, f"the {what} is a {told}, no tensor", "return tensors only")
                continue
            yield from _check_type(value.name, value.type.tensor_type.elem_type, f"the {what}")
            rank = len(value.type.tensor_type.shape.dim)
            if rank > _MOST_DIMS:
                yield _end("rank", value.name, f"the {what} has {rank} dims, TensorRT takes 8", "flatten some of them")
    for name, tensor in graph.constants.items():
        if not graph.readers.get(name, set()) or graph.readers[name] - QDQ:  # of quantization the nodes are told
            yield from _check_type(name, tensor.data_type, "the weight")


def _check_type(name: str, kind: int, what: str) -> Iterator[Finding]:
    if kind == TensorProto.DOUBLE:
        yield _end("float64", name, f"{what} is float64, which TensorRT computes as float32", _TO_FLOAT)
    elif kind and kind not in KNOWN_TYPES:
        remedy = "make numbers of it outside of the engine" if kind in NO_NUMBERS else "cast it to int32 in the model"
        yield _end("type", name, f"{what} is {_type_name(kind)}, which TensorRT lacks", remedy)


_TO_FLOAT = "convert the model with model.float() before it is compiled"


def _check_nodes(graph: Graph) -> Iterator[Finding]:
    checked: set[str] = set()
    for node in graph.nodes:
        for rule in _RULES:
            for code, problem, remedy, refused in rule(graph, node):
                # A zero point or a weight that many nodes read is one mistake.
                key = f"{code} {node.input[2]}" if code in ("zero_point", "uint8") and len(node.input) > 2 else ""
                if not key or key not in checked:
                    yield Finding(
                        code, node.name or node.output[0], node.op_type, graph.layer(node), problem, remedy, refused
                    )
                    checked.add(key)


_Told = Iterator[tuple[str, str, str, bool]]


def _operator(graph: Graph, node: onnx.NodeProto) -> _Told:
    op = node.op_type
    if op == "MatMulNBits":
        problem = "TensorRT takes blocks of integers in another form, without zero points and in whole blocks"
        yield "block_weights", problem, _block_remedy(node), True
    elif node.domain not in ("", "ai.onnx", "trt", "com.microsoft"):
        yield "custom_op", f"{node.domain}::{op} needs a plugin", "write it with operators of ONNX", True
    elif op in INTEGER_QUANTIZATION:
        yield "integer_op", "TensorRT takes QuantizeLinear and DequantizeLinear only", _TENSORRT_SCHEME, True
    elif op in DATA_DEPENDENT:
        problem = "the size of its output depends on the data"
        yield "data_dependent", problem, _OUTSIDE, True
    elif id(node) in graph.sizes:
        source, refused = graph.sizes[id(node)]
        problem = f"the size of its output depends on the values of {source!r}"
        remedy = "make that input a plain number when the model is captured" if refused else _OUTSIDE
        yield "data_dependent", problem, remedy, refused
    elif op in UNSUPPORTED:
        yield "unsupported_op", "TensorRT has no such operator", "write that step with other operators", True
    elif op in CONTROL_FLOW:
        yield "control_flow", "it runs as control flow, which nothing is fused across", "unroll it if it is hot", False
        if op == "Loop" and not node.input[1]:
            yield "loop_condition", "TensorRT's parser wants a condition", "give the loop one that is always true", True


_OUTSIDE = "do this step outside of the engine, or use a mask of fixed size"


def _block_remedy(node: onnx.NodeProto) -> str:
    inner, bits = attribute(node, "K", 0), attribute(node, "bits", 4)
    if inner % attribute(node, "block_size", 32):
        return f"give quantize_weights a block_size that divides the layer's {inner} inputs, or leave it out (ignore)"
    return f"use quantize_weights(bits={bits}, symmetric=True), or leave the layer out (ignore)"


def _attributes(graph: Graph, node: onnx.NodeProto) -> _Told:
    if node.op_type == "Resize" and attribute(node, "antialias", 0):
        yield "antialias", "TensorRT resizes without antialiasing only", "use antialias=False", True
    elif node.op_type == "MaxPool" and len([name for name in node.output if name]) > 1:
        yield "pool_indices", "TensorRT gives no indices of a maximum", "pool without return_indices", True
    elif node.op_type in SCATTERS and text(node, "reduction") not in ("", "none"):
        problem = f"TensorRT scatters without reduction only, not with {text(node, 'reduction')!r}"
        yield "scatter_reduction", problem, "write it as a product with a one-hot matrix", True


def _types(graph: Graph, node: onnx.NodeProto) -> _Told:
    made = {graph.types.get(name, 0) for name in node.output}
    if node.op_type == "Cast":
        made.add(attribute(node, "to", 0))
    if TensorProto.DOUBLE in made and graph.ends.isdisjoint(node.output):
        yield "float64", "it computes in float64, which TensorRT takes for float32", _TO_FLOAT, True
    unknown = [kind for kind in made if kind and kind not in KNOWN_TYPES and kind != TensorProto.DOUBLE]
    if unknown:
        yield "type", f"it gives {_type_name(unknown[0])}, which TensorRT lacks", "cast to int32 instead", True
    if TensorProto.UINT8 in made and node.op_type != "QuantizeLinear" and graph.ends.isdisjoint(node.output):
        yield "uint8", "uint8 is for inputs and outputs only", "cast to int32 instead", True
    kind = graph.type_of(node, 0)
    if node.op_type in FLOATS_ONLY and kind in INTEGERS and not (node.op_type == "Relu" and kind != TensorProto.INT32):
        yield (
            "integer_math",
            f"TensorRT has no {node.op_type} on {_type_name(kind)}",
            "cast its inputs to float32",
            True,
        )
    if node.op_type not in QUANTIZING | {"Identity", "Cast", "Gather", "Reshape", "Transpose"}:
        for index, name in enumerate(node.input):
            if graph.type_of(node, index) == TensorProto.INT8 and name in graph.constants:
                told = "an int8 constant may only go to DequantizeLinear"
                yield "int8_constant", told, "store it as int32", True


def _quantization(graph: Graph, node: onnx.NodeProto) -> _Told:
    if node.op_type not in QDQ:
        return
    if node.name and graph.named[node.name] > 1:
        yield "duplicate_name", "several nodes have this name, which TensorRT refuses", "name each differently", True
    quantizes = node.op_type == "QuantizeLinear"
    default = TensorProto.UINT8 if quantizes else 0
    kind = graph.type_of(node, 2) or attribute(node, "output_dtype", 0) or (default or graph.type_of(node, 0))
    if not quantizes and graph.type_of(node, 0) == TensorProto.INT32:
        problem = "it dequantizes int32, as of a bias, and TensorRT takes int8, int4 and fp8 only"
        yield "integer_bias", problem, f"leave biases in float: {_TENSORRT_SCHEME}", True
    elif kind == TensorProto.UINT8:
        yield "uint8", "TensorRT takes uint8 for int8, which changes the result", _TENSORRT_SCHEME, True
    elif kind not in QUANTIZED and kind:
        yield "type", f"TensorRT has no quantization to {_type_name(kind)}", _TENSORRT_SCHEME, True
    zero, scale = graph.constant(node, 2), graph.constant(node, 1)
    if zero is not None and bool(np.any(zero.astype(np.float32))):
        yield "zero_point", "TensorRT needs zero points of 0", _TENSORRT_SCHEME, True
    if scale is not None and not bool((scale.astype(np.float32) > 0).all()):
        yield "scale", "scales must be positive", "calibrate with data on which the tensor is not constantly 0", True


_RULES: tuple[Callable[[Graph, onnx.NodeProto], _Told], ...] = (_operator, _attributes, _types, _quantization)


def _end(code: str, name: str, problem: str, remedy: str) -> Finding:
    return Finding(code, name, "", layer_of(name), problem, remedy)


def _type_name(kind: int) -> str:
    return str(TensorProto.DataType.Name(kind)).lower()
