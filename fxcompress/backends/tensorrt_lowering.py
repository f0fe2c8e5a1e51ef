"""What ONNX knows and TensorRT does not, said with what both know. Exact, and in place.

* ``Einsum``: subscripts in small letters, for TensorRT knows no others.
* ``Col2Im`` (``nn.Fold``, overlapping patches summed up into an image) is the transposed convolution whose kernel k has
  a single one, at the place of the k-th element of a patch::

      Col2Im(x: [N, C·K, L])  ⇒  ConvTranspose(x as [N·C, K, rows, columns], eye(K) as [K, 1, height, width])
"""

from __future__ import annotations

from pathlib import Path
from string import ascii_lowercase

import numpy as np
import onnx
from onnx import helper, numpy_helper

__all__ = ["lower_operators"]


def lower_operators(path: Path) -> None:
    """Rewrite an ONNX file in place; one that has nothing to rewrite is not touched.

    A ``Col2Im`` whose image size or channels depend on the data, or that has not two dims, is left to the importability
    check, which names it.
    """
    model = onnx.load(path, load_external_data=False)
    changed = [_small_letters(node) for node in model.graph.node if node.op_type == "Einsum"]
    if any(node.op_type == "Col2Im" for node in model.graph.node):
        changed.append(_lower_folds(model.graph))
    if any(changed):
        path.write_bytes(model.SerializeToString())


def _small_letters(node: onnx.NodeProto) -> bool:
    for attribute in node.attribute:
        told = attribute.s.decode()
        letters = dict.fromkeys(filter(str.isalpha, told))
        if attribute.name == "equation" and not told.islower() and len(letters) <= len(ascii_lowercase):
            attribute.s = told.translate(str.maketrans(dict(zip(letters, ascii_lowercase, strict=False)))).encode()
            return True
    return False


def _lower_folds(graph: onnx.GraphProto) -> bool:
    constants = {tensor.name: tensor for tensor in graph.initializer}
    values = {value.name: value.type.tensor_type for value in (*graph.value_info, *graph.input)}
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        made = _fold(node, constants, values, graph) if node.op_type == "Col2Im" else None
        nodes += made or [node]
    changed = len(nodes) > len(graph.node)
    del graph.node[:]
    graph.node.extend(nodes)
    return changed


def _fold(
    node: onnx.NodeProto,
    constants: dict[str, onnx.TensorProto],
    values: dict[str, onnx.TypeProto.Tensor],
    graph: onnx.GraphProto,
) -> list[onnx.NodeProto] | None:
    x, *sizes = node.input
    if x not in values or len(values[x].shape.dim) != 3 or not constants.keys() >= set(sizes):
        return None
    image, kernel = (numpy_helper.to_array(constants[name]).astype(np.int64) for name in sizes)
    depth = values[x].shape.dim[1].dim_value
    taps = int(kernel.prod())
    if image.size != 2 or not depth or depth % taps:
        return None
    told = {attribute.name: np.array(attribute.ints) for attribute in node.attribute}
    strides, dilations = (told.get(name, np.ones(2, np.int64)) for name in ("strides", "dilations"))
    pads = told.get("pads", np.zeros(4, np.int64))
    extent = dilations * (kernel - 1) + 1
    places = (image + pads[:2] + pads[2:] - extent) // strides + 1
    rest = image - ((places - 1) * strides - pads[:2] - pads[2:] + extent)
    prefix, dtype = node.name or node.output[0], helper.tensor_dtype_to_np_dtype(values[x].elem_type)
    ones = np.eye(taps, dtype=dtype).reshape(taps, 1, *kernel)
    names = [f"{node.output[0]}_{part}" for part in ("patches", "apart", "weight", "image", "together")]
    shapes = [-1, taps, *places], [-1, depth // taps, *image]
    added = [np.array(shapes[0], np.int64), ones, np.array(shapes[1], np.int64)]
    graph.initializer.extend(
        numpy_helper.from_array(array, name) for array, name in zip(added, (names[0], names[2], names[4]), strict=True)
    )
    convolution = {"strides": strides, "dilations": dilations, "pads": pads, "output_padding": rest}
    return [
        helper.make_node("Reshape", [x, names[0]], [names[1]], f"{prefix}/patches"),
        helper.make_node(
            "ConvTranspose",
            [names[1], names[2]],
            [names[3]],
            f"{prefix}/ConvTranspose",
            **{name: array.tolist() for name, array in convolution.items()},
        ),
        helper.make_node("Reshape", [names[3], names[4]], [node.output[0]], f"{prefix}/image"),
    ]
