"""Activations that multiply a value by a gate of itself, in two operations that integer kernels exist for.

    silu(x)      =  x · sigmoid(x)
    hardswish(x) =  x · hardsigmoid(x)

Whole, such an activation computes in floating point between a dequantize and a quantize operator. Split, with a stub
between the two, an engine looks the gate up or clips it in 8 bits and multiplies integers.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import fx

from fxcompress.graph.edit import GraphEditor

__all__ = ["GATES", "split_gates"]

aten = torch.ops.aten

GATES = {aten.silu.default: aten.sigmoid.default, aten.hardswish.default: aten.hardsigmoid.default}
"""Activation → its gate."""


def split_gates(graph_module: fx.GraphModule, nodes: Iterable[fx.Node]) -> None:
    """Write each of ``nodes``, which call activations of :data:`GATES`, as a gate and a product."""
    with GraphEditor(graph_module) as editor:
        for node in nodes:
            (x,) = node.all_input_nodes
            gate = editor.insert_call(GATES[node.target], (x,), like=node, after=node)  # type: ignore[index]
            product = editor.insert_call(aten.mul.Tensor, (x, gate), like=node, after=gate)
            editor.replace(node, product)
            editor.erase(node)
