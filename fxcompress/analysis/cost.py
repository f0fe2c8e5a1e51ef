"""What a graph costs: parameters, multiply-accumulates, bytes of weights, and bytes of activations alive at once.

Everything is read from the graph and its fake values; nothing runs. One walk, linear in the size of the graph.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import fx, nn

from fxcompress.analysis.macs import macs
from fxcompress.analysis.memory import activation_peak
from fxcompress.analysis.sizes import GraphSizes
from fxcompress.graph.info import tensors_of
from fxcompress.graph.printer import describe_target
from fxcompress.graph.queries import GraphIndex, StorageUser, module_of

__all__ = ["Cost", "NodeCost", "cost", "node_costs"]


@dataclass(frozen=True)
class Cost:
    """What a graph costs.

    Attributes:
        parameters: number of elements of all parameters; a tied one counts once, and a weight that a layer holds as
            integers counts as the parameter that it was.
        macs: multiply-accumulates of one run at the batch size asked for (FLOPs are twice that);
            see :mod:`fxcompress.analysis.macs` for what is counted. None for a graph without shapes.
        bytes: of parameters, buffers and constants; memory shared by several counts once.
        activation_peak_bytes: most bytes of inputs and intermediate results alive at once when nodes run in order;
            see :mod:`fxcompress.analysis.memory`. None for a graph without shapes.
        stored_bytes: of the same as an engine stores them, where that is less than ``bytes``: weights behind
            quantization stubs are integers there, and floating point in PyTorch, where they can still be trained.
    """

    parameters: int
    macs: int | None
    bytes: int
    activation_peak_bytes: int | None
    stored_bytes: int | None = None

    @property
    def engine_bytes(self) -> int:
        """Bytes of weights in an engine."""
        return self.bytes if self.stored_bytes is None else self.stored_bytes


@dataclass(frozen=True)
class NodeCost:
    """One line of :func:`node_costs`.

    Attributes:
        node: its name.
        layer: path of the layer that it calls, or None.
        kind: ``Conv2d``, ``aten.relu``.
        shape: sizes of its result at the batch size asked for; of the first where it makes several.
        macs: multiply-accumulates; None where shapes are unknown.
        parameters: elements of the parameters that this node is the first in the graph to read.
        bytes: of the weights, buffers and constants that this node is the first to read.
        activation_bytes: of its result; 0 for weights and sizes. None where shapes are unknown.
    """

    node: str
    layer: str | None
    kind: str
    shape: tuple[int, ...] | None
    macs: int | None
    parameters: int
    bytes: int
    activation_bytes: int | None


def cost(graph_module: fx.GraphModule, *, batch: int = 1) -> Cost:
    """What ``graph_module`` costs.

    Args:
        graph_module: a captured graph.
        batch: size of the batch, the symbolic dim 0 of the first input. Other symbolic sizes are taken as they were in
            the example inputs. Without effect on a graph with fixed sizes.
    """
    sizes = GraphSizes(graph_module, batch)
    index = GraphIndex(graph_module)
    integers = _held_as_integers(graph_module)
    held = [_held(users, integers) for users in index.storages.values()]
    counted = 0
    for node in graph_module.graph.nodes if sizes.known else ():
        counted += macs(node, module_of(graph_module, node), sizes.of)
    total = sum(length for _, length in held)
    saved = _saved_by_engines(graph_module)
    return Cost(
        parameters=sum(elements for elements, _ in held),
        macs=counted if sizes.known else None,
        bytes=total,
        activation_peak_bytes=activation_peak(graph_module, sizes) if sizes.known else None,
        stored_bytes=total - saved if saved else None,
    )


def _saved_by_engines(graph_module: fx.GraphModule) -> int:
    """Bytes that engines save, as layers say in ``stored_as``: name of a tensor → its dtype there."""
    saved: dict[int, int] = {}
    for module in graph_module.modules():
        for name, dtype in getattr(module, "stored_as", {}).items():
            tensor = getattr(module, name)
            saved[id(tensor)] = tensor.numel() * (tensor.element_size() - dtype.itemsize)
    return sum(saved.values())


def node_costs(graph_module: fx.GraphModule, *, batch: int = 1) -> list[NodeCost]:
    """What each node costs, in graph order; the columns add up to :func:`cost`, activations apart.

    Args:
        graph_module: a captured graph.
        batch: as for :func:`cost`.
    """
    sizes = GraphSizes(graph_module, batch)
    index = GraphIndex(graph_module)
    integers = _held_as_integers(graph_module)
    weights: dict[fx.Node, tuple[int, int]] = {}
    for users in index.storages.values():
        nodes = [node for user in users for node in user.nodes]
        if nodes:
            first = min(nodes)
            elements, length = weights.get(first, (0, 0))
            more, longer = _held(users, integers)
            weights[first] = elements + more, length + longer
    table: list[NodeCost] = []
    for node in graph_module.graph.nodes:
        if node.op == "output":
            continue
        results = tensors_of(node.meta.get("val"))
        module = module_of(graph_module, node)
        elements, length = weights.get(node, (0, 0))
        activations = 0 if node.op == "get_attr" else sum(map(sizes.bytes_of, results))
        table.append(
            NodeCost(
                node=node.name,
                layer=str(node.target) if module is not None else None,
                kind=_kind(node, module),
                shape=sizes.of(results[0]) if results else None,
                macs=macs(node, module, sizes.of) if sizes.known else None,
                parameters=elements,
                bytes=length,
                activation_bytes=activations if sizes.known else None,
            )
        )
    return table


def _kind(node: fx.Node, module: nn.Module | None) -> str:
    if module is not None:
        return type(module).__name__
    return describe_target(node) if node.op in ("call_function", "call_method") else node.op


def _held_as_integers(graph_module: fx.GraphModule) -> dict[int, int]:
    """Buffers that were parameters, as layers say in ``held_as_integers``: id of a tensor → elements of the weight."""
    return {
        id(getattr(module, name)): elements
        for module in graph_module.modules()
        for name, elements in getattr(module, "held_as_integers", {}).items()
    }


def _held(users: Iterable[StorageUser], integers: Mapping[int, int]) -> tuple[int, int]:
    """Elements of the parameters in one piece of memory, and its bytes; what several names share counts once."""
    distinct = {(user.span, user.tensor.shape, user.tensor.stride()): user for user in users}
    spans = [user.span for user in distinct.values()]
    reach = max(end for _, _, end in spans) - min(start for _, start, _ in spans)
    parameters = [user.tensor for user in distinct.values() if isinstance(user.tensor, nn.Parameter)]
    elements = sum(tensor.numel() for tensor in parameters)
    elements += sum(integers.get(id(user.tensor), 0) for user in distinct.values())
    if len(parameters) > 1:
        elements = min(elements, reach // parameters[0].element_size())
    return elements, min(reach, sum(user.tensor.numel() * user.tensor.element_size() for user in distinct.values()))
