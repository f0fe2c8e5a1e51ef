"""Stubs put into a graph where a placement wants them."""

from __future__ import annotations

from collections.abc import Callable

from torch import fx
from torch.fx.node import map_arg

from fxcompress.graph.edit import GraphEditor
from fxcompress.quantization.fake_quant import Quantizer
from fxcompress.quantization.gates import split_gates
from fxcompress.quantization.layers import quantized_layer
from fxcompress.quantization.placement import Placement, place
from fxcompress.quantization.schemes import Scheme

__all__ = ["insert_stubs"]


def insert_stubs(graph_module: fx.GraphModule, scheme: Scheme, ignored: Callable[[str], str | None]) -> Placement:
    """Quantize weights of layers and put stubs on values. Nothing is rounded before the stubs are calibrated.

    Args:
        graph_module: a captured graph with shapes; it is changed.
        scheme: of the engine.
        ignored: why the layer at a path shall stay in floating point, or None.

    Returns:
        what was placed, in terms of the nodes that were there before the stubs.
    """
    placement = place(graph_module, scheme, ignored)
    if placement.gates:
        split_gates(graph_module, placement.gates)
        placement = place(graph_module, scheme, ignored)
    paths: dict[int, str] = {}
    with GraphEditor(graph_module) as editor:
        for path in placement.layers:
            layer = graph_module.get_submodule(path)
            quantized = quantized_layer(layer, scheme.weight, per_channel=scheme.per_channel)
            editor.set_module(path, quantized, reshaped=False)
        for value, number in placement.values.items():
            if number not in paths:
                paths[number] = editor.add_module(f"{value.name}_quantizer", Quantizer(scheme.activation))
            _insert(editor, paths[number], value, placement.readers[value])
    return placement


def _insert(editor: GraphEditor, path: str, value: fx.Node, readers: set[fx.Node] | None) -> None:
    # Inputs stand together; weights that are read directly may stand among them.
    place = value if value.op != "placeholder" else editor.graph.find_nodes(op="placeholder")[-1]
    stub = editor.insert_module(path, (value,), like=value, after=place)
    if readers is None:
        editor.replace(value, stub)
        return
    for reader in readers:
        args, kwargs = map_arg((reader.args, reader.kwargs), lambda node: stub if node is value else node)
        editor.set_args(reader, args, kwargs)
