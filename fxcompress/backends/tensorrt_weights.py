"""Weights of 4 or 8 bits in the form that TensorRT takes: ``DequantizeLinear`` by blocks, and a plain ``MatMul``.

    MatMulNBits(x, B, s, z, bias)  ⇒  x · DequantizeLinear(B − z, s) + bias        exact

TensorRT knows no zero point of a weight, so z goes into the integers: they stay int4 where z is everywhere the middle
of the range, else 4-bit weights are stored as int8. Of 8-bit weights with another zero point nothing is left to hold
them in; those stay as they are, and the importability check names them.
"""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
from onnx import helper, numpy_helper

__all__ = ["spread_block_weights"]

_OPSET = 21  # the first whose DequantizeLinear knows blocks and int4
_EMBED = 64 << 20  # bytes; a file with more weights keeps them beside it


def spread_block_weights(path: Path) -> int:
    """Rewrite every ``MatMulNBits`` of an ONNX file in place.

    Returns:
        how many; a file without any is not touched.
    """
    model = onnx.load(path, load_external_data=False)
    if not any(node.op_type == "MatMulNBits" for node in model.graph.node):
        return 0
    data = path.with_name(f"{path.name}.data")
    model = onnx.load(path)
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    # What is only another shape of a weight, which simplifiers fold, but not for bfloat16.
    views = {n.output[0]: n.input[0] for n in model.graph.node if n.op_type == "Reshape" and n.input[0] in tensors}
    nodes: list[onnx.NodeProto] = []
    done = 0
    for node in model.graph.node:
        made = _spread(node, tensors, views) if node.op_type == "MatMulNBits" else None
        nodes += made or [node]
        done += made is not None
    if done:
        used = {name for node in nodes for name in node.input} | {value.name for value in model.graph.output}
        nodes = [node for node in nodes if node.output[0] in used or node.output[0] not in views]
        read = {name for node in nodes for name in node.input} | {value.name for value in model.graph.output}
        del model.graph.node[:], model.graph.initializer[:]
        model.graph.node.extend(nodes)
        model.graph.initializer.extend(tensor for name, tensor in tensors.items() if name in read)
        imports = {item.domain: max(item.version, _OPSET if not item.domain else 0) for item in model.opset_import}
        del model.opset_import[:]
        model.opset_import.extend(helper.make_opsetid(domain, version) for domain, version in imports.items())
        data.unlink(missing_ok=True)
        large = sum(len(tensor.raw_data) for tensor in model.graph.initializer) > _EMBED
        onnx.save(model, path, save_as_external_data=large, location=data.name)
    return done


def _spread(
    node: onnx.NodeProto, tensors: dict[str, onnx.TensorProto], views: dict[str, str]
) -> list[onnx.NodeProto] | None:
    told = {attribute.name: attribute.i for attribute in node.attribute}
    inner, outer, bits, block = told["K"], told["N"], told.get("bits", 4), told["block_size"]
    names = [*node.input, "", "", "", ""][:6]
    x, weight, scale, zero, order, bias = names
    scale, zero = (views.get(name, name) for name in (scale, zero))
    if order or inner % block or weight not in tensors or scale not in tensors:
        return None
    blocks = inner // block
    integers = _unpack(tensors[weight], bits).reshape(outer, blocks, block).astype(np.int16)
    middle = 1 << (bits - 1)
    if zero and zero not in tensors:
        return None
    zeros = _unpack(tensors[zero], bits).reshape(outer, -1)[:, :blocks] if zero else np.full((outer, blocks), middle)
    integers = integers - zeros.astype(np.int16)[:, :, None]
    low, high = int(integers.min(initial=0)), int(integers.max(initial=0))
    if low < -128 or high > 127:
        return None
    kind = ml_dtypes.int4 if bits == 4 and low >= -8 and high <= 7 else np.int8
    stored, steps, real = f"{weight}_spread", f"{scale}_spread", f"{weight}_dequantized"
    # Rows are inputs: the axis along which the blocks lie.
    tensors[stored] = numpy_helper.from_array(integers.reshape(outer, inner).T.astype(kind), stored)
    grid = numpy_helper.to_array(tensors[scale]).reshape(outer, blocks).T
    tensors[steps] = numpy_helper.from_array(np.ascontiguousarray(grid), steps)
    prefix = node.name.removesuffix("/MatMulNBits")
    dequantize = helper.make_node(
        "DequantizeLinear", [stored, steps], [real], f"{prefix}/DequantizeLinear", axis=0, block_size=block
    )
    product = f"{node.output[0]}_product" if bias else node.output[0]
    made = [dequantize, helper.make_node("MatMul", [x, real], [product], f"{prefix}/MatMul")]
    return [*made, helper.make_node("Add", [product, bias], [node.output[0]], f"{prefix}/Add")] if bias else made


def _unpack(tensor: onnx.TensorProto, bits: int) -> np.ndarray:
    """The integers of a packed tensor, the low half of a byte first."""
    packed = numpy_helper.to_array(tensor)
    return packed if bits == 8 else np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:-1], -1)
