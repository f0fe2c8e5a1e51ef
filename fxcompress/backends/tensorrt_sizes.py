"""Which sizes in an ONNX file come from the values of its inputs, rather than from their shapes."""

from __future__ import annotations

from collections.abc import Sequence

import onnx
from onnx import TensorProto

__all__ = ["sizes_from_values"]

# Inputs of an operator that say how large its output is.
_SIZES = {
    "ConstantOfShape": (0,),
    "Expand": (1,),
    "OneHot": (1,),
    "Pad": (1,),
    "Range": (0, 1, 2),
    "Reshape": (1,),
    "Resize": (2, 3),
    "Slice": (1, 2, 4),
    "Split": (1,),
    "Tile": (1,),
    "TopK": (1,),
}
# Integers that go through these alone from an input to a size make that input a "shape tensor", which is computed with
# before the engine runs, and for which a profile needs ranges of values.
_ARITHMETIC = {"Add", "Cast", "Concat", "Div", "Gather", "Identity", "Max", "Min", "Mul", "Neg", "Reshape", "Slice"}
_ARITHMETIC |= {"Squeeze", "Sub", "Unsqueeze", "Where"}
_SHAPES = {"Shape", "Size"}  # from here on only the shape matters
_INTEGERS = {TensorProto.INT32, TensorProto.INT64}


def sizes_from_values(
    inputs: Sequence[onnx.ValueInfoProto], nodes: Sequence[onnx.NodeProto], constants: set[str]
) -> dict[int, tuple[str, bool]]:
    """Operators whose output's size depends on the values of an input.

    Args:
        inputs: of the graph.
        nodes: in the order in which they run.
        constants: names of weights, of which old files list some among the inputs.

    Returns:
        index of a node → the input, and whether that needs a range of values, without which nothing is built.
    """
    found: dict[int, tuple[str, bool]] = {}
    # name → the input that it depends on, and whether by arithmetic on integers alone
    source: dict[str, tuple[str, bool]] = {
        value.name: (value.name, value.type.tensor_type.elem_type in _INTEGERS)
        for value in inputs
        if value.name not in constants
    }
    for index, node in enumerate(nodes):
        told = [
            source[node.input[at]]
            for at in _SIZES.get(node.op_type, ())
            if node.input[at : at + 1] and node.input[at] in source
        ]
        if told:
            found[index] = told[0]
        if node.op_type not in _SHAPES:
            reached = [source[name] for name in node.input if name in source]
            if reached:
                exact = node.op_type in _ARITHMETIC and any(arithmetic for _, arithmetic in reached)
                source.update(dict.fromkeys(node.output, (reached[0][0], exact)))
    return found
