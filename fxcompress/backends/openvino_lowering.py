"""What OpenVINO computes wrongly, said in a form that it computes right. Exact, and in place.

OpenVINO moves a factor of a convolution's input into the weights wherever the two broadcast against each other::

    Conv(x · c, W)  ⇒  Conv(x, W · c)        right where c is a number or differs by channel only

Where ``c`` differs along height and width and is just as large as the kernel, or 1, this is another function: the
weights see every place of the image, the factor but one. (Seen in 2026.4.1 with an average of 7 × 7 places, each over
a count of its own, before a kernel of 7 × 7: 4 % off without a word.) A product of one dim more is not recognised::

    Conv(x · c, W)  ⇒  Conv(squeeze(unsqueeze(x) · c), W)
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper

__all__ = ["lower_operators"]

_AXIS = "fxcompress_leading_axis"


def lower_operators(path: Path) -> int:
    """Rewrite an ONNX file in place, its sub-graphs left alone.

    Returns:
        how many products were rewritten; a file without any is not touched.
    """
    model = onnx.load(path, load_external_data=False)
    graph = model.graph
    constants = {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant":
            constants.update((node.output[0], list(a.t.dims)) for a in node.attribute if a.name == "value")
    # What a convolution reads, and how many dims of it are places.
    places = {node.input[0]: _places(node, constants) for node in graph.node if node.op_type == "Conv"}
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        nodes += _apart(node, constants, places) or [node]
    rewritten = (len(nodes) - len(graph.node)) // 2
    if rewritten:
        del graph.node[:]
        graph.node.extend(nodes)
        graph.initializer.append(numpy_helper.from_array(np.array([0]), _AXIS))
        path.write_bytes(model.SerializeToString())
    return rewritten


def _places(node: onnx.NodeProto, constants: dict[str, list[int]]) -> int:
    told = (len(a.ints) for a in node.attribute if a.name in ("strides", "dilations", "kernel_shape"))
    return next(told, len(constants.get(node.input[1], ())) - 2)


def _apart(
    node: onnx.NodeProto, constants: dict[str, list[int]], places: dict[str, int]
) -> list[onnx.NodeProto] | None:
    if node.op_type not in ("Mul", "Div") or node.output[0] not in places:
        return None
    factors = [index for index, name in enumerate(node.input) if name in constants]
    last = max(places[node.output[0]], 0)
    if len(factors) != 1 or all(size == 1 for size in constants[node.input[factors[0]]][-last:]):
        return None
    value, name = 1 - factors[0], node.name or node.output[0]
    wide, product = f"{node.output[0]}_unsqueezed", f"{node.output[0]}_product"
    apart = onnx.NodeProto()
    apart.CopyFrom(node)
    apart.input[value], apart.output[0] = wide, product
    return [
        helper.make_node("Unsqueeze", [node.input[value], _AXIS], [wide], f"{name}/Unsqueeze"),
        apart,
        helper.make_node("Squeeze", [product, _AXIS], [node.output[0]], f"{name}/Squeeze"),
    ]
