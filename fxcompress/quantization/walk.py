"""Both forms of a graph, in floating point and rounded, run side by side layer by layer over several batches.

Repairs that need what a layer reads after all layers before it were repaired (bias correction, learned rounding) would
run the graph once for each layer. Here every node runs once for each batch: all batches are at the same node.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_arg

from fxcompress.graph.copying import copy_graph
from fxcompress.quantization.fake_quant import Quantizer
from fxcompress.quantization.layers import QUANTIZED

__all__ = ["Site", "channel_dim", "walk"]

_LAYERS = tuple(QUANTIZED.values())


@dataclass(frozen=True)
class Site:
    """A quantized layer on all batches.

    Attributes:
        path: of the layer.
        node: that calls it.
        layer: a copy that may be changed: what comes after reads what it then gives.
        inputs: what it reads in the rounded graph, one tensor for each batch.
        targets: what it gives in the graph in floating point.
    """

    path: str
    node: fx.Node
    layer: Any
    inputs: list[torch.Tensor]
    targets: list[torch.Tensor]


Visit = Callable[[Site], "list[torch.Tensor] | None"]


def channel_dim(layer: Any, output: torch.Tensor) -> int:
    """The dimension of a layer's output that counts its channels."""
    kernel = getattr(layer, "kernel_size", ())
    return output.dim() - 1 - len(kernel) if kernel else output.dim() - 1


def walk(graph_module: fx.GraphModule, data: Sequence[Sequence[Any]], visit: Visit, paths: Collection[str]) -> None:
    """Call ``visit`` at each of the layers ``paths``, in the order of the graph.

    ``visit`` may change the layer and may return its new outputs, so that they are not computed again. The graph itself
    is left as it is. In memory are the values of all batches that are still to be read: of one place in the graph.

    Args:
        graph_module: with calibrated stubs.
        data: flat inputs of each batch.
        visit: called with a :class:`Site`.
        paths: quantized layers; each is visited at its first call.
    """
    copied = copy_graph(graph_module)
    for module in copied.modules():
        module.training = False
    waiting = set(paths)
    last = _last_readers(copied.graph)
    pairs: dict[fx.Node, list[tuple[Any, Any]]] = {}
    places = iter(range(len(copied.graph.nodes)))
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for node in copied.graph.nodes:
            if node.op == "output":
                break
            if node.op == "placeholder":
                place = next(places)
                pairs[node] = [(leaves[place],) * 2 for leaves in data]
            elif node.op == "call_module" and isinstance(copied.get_submodule(str(node.target)), _LAYERS):
                pairs[node] = _layer(copied, node, pairs, visit, waiting)
            else:
                pairs[node] = [_run(copied, node, pairs, batch) for batch in range(len(data))]
            for done in last.get(node, ()):
                pairs.pop(done, None)


def _layer(
    graph_module: fx.GraphModule,
    node: fx.Node,
    pairs: dict[fx.Node, list[tuple[Any, Any]]],
    visit: Visit,
    waiting: set[str],
) -> list[tuple[Any, Any]]:
    path = str(node.target)
    layer: Any = graph_module.get_submodule(path)
    (source,) = node.args
    assert isinstance(source, fx.Node)
    quantizer, enabled = layer.weight_quantizer, layer.weight_quantizer.enabled
    quantizer.enabled = False
    targets = [layer(floating) for floating, _ in pairs[source]]
    quantizer.enabled = enabled
    inputs = [rounded for _, rounded in pairs[source]]
    outputs = None
    if path in waiting:
        waiting.discard(path)
        outputs = visit(Site(path, node, layer, inputs, targets))
    if outputs is None:
        outputs = [layer(rounded) for rounded in inputs]
    return list(zip(targets, outputs, strict=True))


def _run(
    graph_module: fx.GraphModule, node: fx.Node, pairs: dict[fx.Node, list[tuple[Any, Any]]], batch: int
) -> tuple[Any, Any]:
    if node.op == "get_attr":
        owner, _, name = str(node.target).rpartition(".")
        return (getattr(graph_module.get_submodule(owner), name),) * 2
    target: Any = node.target if node.op == "call_function" else graph_module.get_submodule(str(node.target))
    same = all(pairs[item][batch][0] is pairs[item][batch][1] for item in node.all_input_nodes)
    floating = _call(target, node, pairs, batch, 0, rounds=False)
    if same and not isinstance(target, Quantizer):
        return floating, floating
    return floating, _call(target, node, pairs, batch, 1, rounds=True)


def _call(
    target: Any, node: fx.Node, pairs: dict[fx.Node, list[tuple[Any, Any]]], batch: int, side: int, *, rounds: bool
) -> Any:
    args, kwargs = map_arg((node.args, node.kwargs), lambda item: pairs[item][batch][side])
    if isinstance(target, Quantizer) and not rounds:
        return args[0]
    return target(*args, **kwargs)


def _last_readers(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """Each node → the nodes whose value nobody reads after it."""
    seen: set[fx.Node] = set()
    last: dict[fx.Node, list[fx.Node]] = {}
    for node in reversed(graph.nodes):
        for item in node.all_input_nodes:
            if item not in seen:
                seen.add(item)
                last.setdefault(node, []).append(item)
        if node not in seen:
            last.setdefault(node, []).append(node)
    return last
