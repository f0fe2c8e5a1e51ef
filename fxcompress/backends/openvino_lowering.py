"""What OpenVINO computes wrongly, said in a form that it computes right. Exact, and in place. Seen in 2026.4.1.

**A factor before a convolution** is moved into the weights wherever the two broadcast against each other::

    Conv(x · c, W)  ⇒  Conv(x, W · c)        right where c is a number or differs by channel only

Where ``c`` differs along height and width and is just as large as the kernel, or 1, this is another function: the
weights see every place of the image, the factor but one. A product of one dim more is not recognised::

    Conv(x · c, W)  ⇒  Conv(squeeze(unsqueeze(x) · c), W)

**A value that a recurrent layer reads**, ``[time, batch, width]``, is transposed for it, and all that shares this
transposition, another recurrent layer or a reduction say, is then given the memory as it was under the new shape. The
layer gets a transposition of its own, in a form that is not shared::

    GRU(x)  ⇒  GRU(transpose(squeeze(transpose(unsqueeze(x)))))

**Circular padding** it has not: dim by dim, the end and the beginning are put before and after::

    Pad(x, before, after, "wrap")  ⇒  Concat(x[-before:], x, x[:after])
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

__all__ = ["lower_operators"]

_AXIS = "fxcompress_leading_axis"
_BATCH_FIRST = [1, 0, 2]
_FAR = np.iinfo(np.int64).max
_RECURRENT = ("GRU", "LSTM", "RNN")


def lower_operators(path: Path) -> int:
    """Rewrite an ONNX file in place, its sub-graphs left alone.

    Returns:
        how many nodes were rewritten; a file without any is not touched.
    """
    model = onnx.load(path, load_external_data=False)
    graph = _Graph(model.graph)
    nodes, rewritten = [], 0
    for node in model.graph.node:
        made = graph.product(node) or graph.recurrent(node) or graph.wrapped(node)
        nodes += made or [node]
        rewritten += made is not None
    if rewritten:
        del model.graph.node[:]
        model.graph.node.extend(nodes)
        model.graph.initializer.append(numpy_helper.from_array(np.array([0]), _AXIS))
        model.graph.initializer.extend(graph.added)
        path.write_bytes(model.SerializeToString())
    return rewritten


class _Graph:
    def __init__(self, graph: onnx.GraphProto) -> None:
        self.added: list[onnx.TensorProto] = []
        self._held = {tensor.name: tensor for tensor in graph.initializer}
        self._sizes = {tensor.name: list(tensor.dims) for tensor in graph.initializer}
        for node in graph.node:
            if node.op_type == "Constant":
                self._sizes |= {output: list(a.t.dims) for output in node.output for a in node.attribute}
        # What a convolution reads, and how many dims of it are places.
        self._places = {node.input[0]: self._rank(node) for node in graph.node if node.op_type == "Conv"}
        self._readers = Counter(name for node in graph.node for name in node.input)
        self._readers.update(value.name for value in graph.output)
        self._copies: dict[str, str] = {}  # of what several recurrent layers read, one made from the other
        self._transposed = {
            node.output[0]
            for node in graph.node
            if node.op_type == "Transpose" and any(list(a.ints) == _BATCH_FIRST for a in node.attribute)
        }

    def _rank(self, convolution: onnx.NodeProto) -> int:
        told = (len(a.ints) for a in convolution.attribute if a.name in ("strides", "dilations", "kernel_shape"))
        return next(told, max(len(self._sizes.get(convolution.input[1], ())) - 2, 0))

    def product(self, node: onnx.NodeProto) -> list[onnx.NodeProto] | None:
        """What stands for a factor that differs from place to place before a convolution; None for other nodes."""
        if node.op_type not in ("Mul", "Div") or node.output[0] not in self._places:
            return None
        factors = [index for index, name in enumerate(node.input) if name in self._sizes]
        if len(factors) != 1:
            return None
        sizes = self._sizes[node.input[factors[0]]]
        if all(size == 1 for size in sizes[max(len(sizes) - self._places[node.output[0]], 0) :]):
            return None
        wide, product = f"{node.output[0]}_unsqueezed", f"{node.output[0]}_product"
        apart = onnx.NodeProto()
        apart.CopyFrom(node)
        apart.input[1 - factors[0]], apart.output[0] = wide, product
        name = node.name or node.output[0]
        return [
            helper.make_node("Unsqueeze", [node.input[1 - factors[0]], _AXIS], [wide], f"{name}/Unsqueeze"),
            apart,
            helper.make_node("Squeeze", [product, _AXIS], [node.output[0]], f"{name}/Squeeze"),
        ]

    def recurrent(self, node: onnx.NodeProto) -> list[onnx.NodeProto] | None:
        """A recurrent layer whose input is read by others too, with a transposition of its own; None for other nodes.

        An input that is itself such a transposition needs none: the two cancel.
        """
        if node.op_type not in _RECURRENT or any(a.name == "layout" and a.i for a in node.attribute):
            return None
        if self._readers[node.input[0]] < 2 or node.input[0] in self._transposed:
            return None
        own = onnx.NodeProto()
        own.CopyFrom(node)
        own.input[0] = self._copies.get(node.input[0], node.input[0])
        made = [*self._through_four_dims(node, own), own]
        self._copies[node.input[0]] = own.input[0]
        return made

    def wrapped(self, node: onnx.NodeProto) -> list[onnx.NodeProto] | None:
        """What stands for a circular padding by constants of 0 or more; None for other nodes."""
        if node.op_type != "Pad" or not any(a.name == "mode" and a.s == b"wrap" for a in node.attribute):
            return None
        pads = [self._held.get(name) for name in (node.input[1], *node.input[3:4])]
        if any(tensor is None or tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in pads):
            return None
        amounts, *axes = (numpy_helper.to_array(tensor).tolist() for tensor in pads if tensor is not None)
        before, after = amounts[: len(amounts) // 2], amounts[len(amounts) // 2 :]
        if min(amounts, default=0) < 0:
            return None
        made: list[onnx.NodeProto] = []
        x, name = node.input[0], node.name or node.output[0]
        padded = [
            dim for dim in zip(axes[0] if axes else range(len(before)), before, after, strict=True) if any(dim[1:])
        ]
        for axis, front, back in padded:
            ends = []
            for part, amount, bounds in (("end", front, (-front, _FAR)), ("start", back, (0, back))):
                if amount:
                    limits = [
                        self._constant(f"{name}_{axis}_{part}_{n}", value) for n, value in enumerate((*bounds, axis))
                    ]
                    ends.append(f"{node.output[0]}_{axis}_{part}")
                    made.append(helper.make_node("Slice", [x, *limits], ends[-1:], f"{name}/Slice_{axis}_{part}"))
            parts = [*(ends[:1] if front else []), x, *(ends[-1:] if back else [])]
            x = node.output[0] if axis == padded[-1][0] else f"{node.output[0]}_{axis}"
            made.append(helper.make_node("Concat", parts, [x], f"{name}/Concat_{axis}", axis=axis))
        return made or [helper.make_node("Identity", [x], [node.output[0]], name)]

    def _constant(self, name: str, value: int) -> str:
        self.added.append(numpy_helper.from_array(np.array([value]), name))
        return name

    @staticmethod
    def _through_four_dims(node: onnx.NodeProto, own: onnx.NodeProto) -> Iterator[onnx.NodeProto]:
        steps: tuple[tuple[str, list[str], dict[str, Any]], ...] = (
            ("Unsqueeze", [_AXIS], {}),
            ("Transpose", [], {"perm": [0, 2, 1, 3]}),
            ("Squeeze", [_AXIS], {}),
            ("Transpose", [], {"perm": _BATCH_FIRST}),
        )
        stem, name = f"{node.output[0] or node.output[1]}_input", node.name or node.op_type
        for number, (kind, axes, attributes) in enumerate(steps):
            made = f"{stem}_{number}"
            yield helper.make_node(kind, [own.input[0], *axes], [made], f"{name}/{kind}_{number}", **attributes)
            own.input[0] = made
