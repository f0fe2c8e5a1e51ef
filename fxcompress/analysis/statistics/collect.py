"""Runs a captured graph on data and adds up what was asked for at the nodes where it was asked for."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from fxcompress.analysis.statistics.kinds import Accumulator, Statistic
from fxcompress.analysis.statistics.moments import CrossMoment
from fxcompress.analysis.statistics.padding import real_positions, without_padding
from fxcompress.analysis.statistics.patches import is_conv
from fxcompress.errors import FxCompressError, OptionError, PreconditionError, nearest
from fxcompress.graph.batches import batches, usable_device
from fxcompress.graph.copying import copy_graph
from fxcompress.graph.queries import module_of
from fxcompress.graph.shapes import where

__all__ = ["Statistics", "collect"]

Requests = Mapping[str, Sequence[Statistic] | Statistic]


@dataclass(frozen=True)
class Statistics:
    """What was collected: ``statistics[node_name, statistic]``.

    Attributes:
        batches: how many were read.
        samples: how many those held.
    """

    batches: int
    samples: int
    _found: dict[tuple[str, Statistic], Any]

    def __getitem__(self, key: tuple[str, Statistic]) -> Any:
        if key not in self._found:
            raise OptionError(
                f"{key[1]} was not collected at {key[0]!r}", remedy="ask for it in the requests of collect()"
            )
        return self._found[key]

    def __contains__(self, key: object) -> bool:
        return key in self._found

    def pop(self, key: tuple[str, Statistic]) -> Any:
        """Like ``statistics[key]``, and not held here any longer."""
        found = self[key]
        del self._found[key]
        return found


def collect(
    graph_module: fx.GraphModule,
    data: Iterable[Any],
    requests: Requests,
    *,
    limit: int | None = None,
    samples: int | None = None,
    device: torch.device | str | None = None,
    progress: Callable[[int, int, str], None] | None = None,
    beside: fx.GraphModule | None = None,
    padding: bool = True,
) -> Statistics:
    """Statistics of activations over data, in one pass that holds one batch at a time.

    The graph runs in eval mode without gradients, and only as far as the requests need. Nodes that read the same value
    share what they ask for in common: the projections of an attention add up one second moment.

    Args:
        graph_module: a captured graph; left as it is.
        data: batches: tensors, tuples, dicts, or ``(images, labels)`` of a ``DataLoader``: only as much of a batch is
            used as the graph has inputs; see :func:`fxcompress.graph.batches.batches`.
        requests: name of a node → what to collect there. Ask for no more than you need.
        limit: most batches to read; None reads all.
        samples: stop after the batch that reaches this number of samples.
        device: run there, on a copy; None runs where the weights are.
        progress: called with (done, total, what) after each batch; total is 0 where it is not known.
        beside: a second graph with the same inputs, run on the same batches for :class:`CrossMoment`.
        padding: False leaves out of what layers other than convolutions read and produce the positions that the batch's
            mask says are padding; see :mod:`fxcompress.analysis.statistics.padding`.

    Raises:
        OptionError: a request names no node of the graph (the nearest is suggested).
        PreconditionError: the data is empty or exhausted, a batch does not fit or fails, or a value that was asked
            for is not finite or never had an element; names the batch or the node.
    """
    for name, value in (("limit", limit), ("samples", samples)):
        if value is not None and value < 1:
            raise OptionError(f"{name}={value} is below 1", where=name)
    target = usable_device(device) if device is not None else _device(graph_module)
    if target is not None and _device(graph_module) != target:
        graph_module = _moved(graph_module, target)
        beside = None if beside is None else _moved(beside, target)
    plan = _Plan(graph_module, requests, beside)
    total = _length(data, limit)
    done = seen = 0
    with _Eval(graph_module, beside), torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for batch in batches(graph_module, data, limit=limit, device=target):
            try:
                plan.run(batch.leaves, None if padding else real_positions(graph_module, batch.leaves))
            except FxCompressError:
                raise
            except (RuntimeError, IndexError, ValueError) as error:
                raise PreconditionError(
                    f"the model fails on it: {str(error).splitlines()[0] if str(error) else error!r}",
                    where=f"batch {done} of the data",
                    remedy="give data that the model accepts",
                ) from error
            done, seen = done + 1, seen + batch.size
            if progress is not None:
                progress(done, total, "collecting statistics")
            if samples is not None and seen >= samples:
                break
    return Statistics(done, seen, plan.values())


class _Plan:
    """Which nodes have to run, and what is added up after each."""

    def __init__(self, graph_module: fx.GraphModule, requests: Requests, beside: fx.GraphModule | None) -> None:
        nodes = {node.name: node for node in graph_module.graph.nodes}
        others = {} if beside is None else {node.name: node for node in beside.graph.nodes}
        self.of: dict[tuple[str, Statistic], tuple[Accumulator, fx.Node]] = {}
        self.work: list[tuple[Accumulator, fx.Node, fx.Node | None]] = []
        self.spatial: set[fx.Node] = set()  # what convolutions read or produce: positions are not rows
        shared: dict[Hashable, Accumulator] = {}
        for name, wanted in requests.items():
            if name not in nodes:
                raise OptionError(f"there is no node {name!r} in the graph", remedy=nearest(name, nodes))
            for statistic in [wanted] if isinstance(wanted, Statistic) else wanted:
                node = nodes[name]
                source = _source(node) if statistic.of == "input" else node
                other = None
                if isinstance(statistic, CrossMoment):
                    if statistic.with_ not in others:
                        raise OptionError(f"there is no node {statistic.with_!r} in the second graph", where=name)
                    other = others[statistic.with_]
                layer = module_of(graph_module, node)
                if is_conv(layer):
                    self.spatial.add(source)
                key = (source, other, statistic.shared_by(layer))
                if key not in shared:
                    shared[key] = statistic.start(layer)
                    self.work.append((shared[key], source, other))
                self.of[name, statistic] = (shared[key], node)
        self.reached: set[fx.Node] = set()  # gave values on some batch
        self.first = _Runner(graph_module, {source for _, source, _ in self.work})
        self.second = None if beside is None else _Runner(beside, {other for *_, other in self.work if other})

    def run(self, leaves: list[Any], real: torch.Tensor | None) -> None:
        by_node: dict[fx.Node, list[Accumulator]] = {}
        for accumulator, source, other in self.work:
            if other is None:
                by_node.setdefault(source, []).append(accumulator)
        paired = {source for _, source, other in self.work if other is not None}
        kept: dict[fx.Node, torch.Tensor] = {}

        def take(node: fx.Node, value: Any) -> None:
            tensor = _tensor(node, value)
            if node not in self.spatial:
                tensor = without_padding(tensor, real)
            if tensor.numel():
                self.reached.add(node)
            for accumulator in by_node.get(node, ()):
                accumulator.add(tensor)
            if node in paired:
                kept[node] = tensor

        self.first.run(leaves, take)
        if self.second is not None:
            waiting: dict[fx.Node, list[tuple[Accumulator, fx.Node]]] = {}
            for accumulator, source, other in self.work:
                if other is not None:
                    waiting.setdefault(other, []).append((accumulator, source))

            def pair(node: fx.Node, value: Any) -> None:
                for accumulator, source in waiting.get(node, ()):
                    tensor = _tensor(node, value)
                    accumulator.add(kept[source], tensor if source in self.spatial else without_padding(tensor, real))

            self.second.run(leaves, pair)

    def values(self) -> dict[tuple[str, Statistic], Any]:
        for _, source, _ in self.work:
            if source not in self.reached:
                raise PreconditionError(
                    f"the data never reaches {source.name!r}: its value was empty in every batch",
                    where=where(source),
                    remedy="give data that reaches it, or leave out the layers that read it (ignore)",
                )
        made: dict[int, Any] = {}
        found: dict[tuple[str, Statistic], Any] = {}
        for key, (accumulator, node) in self.of.items():
            if id(accumulator) not in made:
                made[id(accumulator)] = accumulator.value()
                _check_finite(node, made[id(accumulator)])
            found[key] = made[id(accumulator)]
        return found


class _Runner(fx.Interpreter):
    """Runs the ancestors of the watched nodes and hands each watched value on as soon as it is there."""

    def __init__(self, graph_module: fx.GraphModule, watched: set[fx.Node]) -> None:
        super().__init__(graph_module)
        self.watched = watched
        self.needed = set(watched)
        for node in reversed(graph_module.graph.nodes):
            if node in self.needed:
                self.needed.update(node.all_input_nodes)
        self.take: Callable[[fx.Node, Any], None] = _nothing

    def run(self, leaves: list[Any], take: Callable[[fx.Node, Any], None]) -> None:  # type: ignore[override]
        self.take = take
        try:
            super().run(*leaves, enable_io_processing=False)
        finally:
            self.take = _nothing  # or what is added up would hold itself, until the next collection of cycles

    def run_node(self, n: fx.Node) -> Any:
        if n not in self.needed and n.op != "placeholder":
            return None  # the output among them
        value = super().run_node(n)
        if n in self.watched:
            self.take(n, value)
        return value


def _nothing(node: fx.Node, value: Any) -> None:
    return None


class _Eval:
    """Layers in eval mode inside the block: statistics of norms are shared with the user's model."""

    def __init__(self, *graphs: fx.GraphModule | None) -> None:
        self.modes = {module: module.training for graph in graphs if graph is not None for module in graph.modules()}

    def __enter__(self) -> None:
        for module in self.modes:
            module.training = False

    def __exit__(self, *_: object) -> None:
        for module, mode in self.modes.items():
            module.training = mode


def _source(node: fx.Node) -> fx.Node:
    found = next((item for item in node.args if isinstance(item, fx.Node)), None)
    if found is None:
        raise OptionError(f"{node.name!r} reads nothing", where=where(node))
    return found


def _tensor(node: fx.Node, value: Any) -> torch.Tensor:
    if isinstance(value, torch.Tensor):
        return value
    raise PreconditionError(
        f"{node.name!r} is a {type(value).__name__}, not a tensor: it has no statistics", where=where(node)
    )


def _check_finite(node: fx.Node, value: Any) -> None:
    if hasattr(value, "__dataclass_fields__"):
        value = [part for part in vars(value).values() if part is not None]
    for leaf in pytree.tree_leaves(value):
        if hasattr(leaf, "__dataclass_fields__"):
            _check_finite(node, leaf)
            continue
        numbers = leaf if isinstance(leaf, torch.Tensor) else torch.tensor(leaf, dtype=torch.float64)
        # The sum needs no memory; only where it is not finite is each number looked at.
        if not bool(numbers.sum().isfinite() or torch.isfinite(numbers).all()):
            raise PreconditionError(
                f"activations at {node.name!r} are not finite on the data",
                where=where(node),
                remedy="look for NaN and infinities in the data and in the weights before it",
            )


def _length(data: Any, limit: int | None) -> int:
    try:
        length = len(data)
    except TypeError:
        return limit or 0
    return length if limit is None else min(length, limit)


def _device(graph_module: fx.GraphModule) -> torch.device | None:
    return next((t.device for t in [*graph_module.parameters(), *graph_module.buffers()]), None)


def _moved(graph_module: fx.GraphModule, device: torch.device) -> fx.GraphModule:
    """A copy on another device; the weights of the given graph, which are the user's, stay where they are."""
    copied = copy_graph(graph_module)
    for module in copied.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(parameter.detach().to(device), parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)
        if isinstance(module, nn.RNNBase):
            module._flat_weights = [getattr(module, name) for name in module._flat_weights_names]
    for node in copied.graph.nodes:
        if node.op == "call_function":
            node.args = pytree.tree_map_only(torch.device, lambda _: device, node.args)
            node.kwargs = pytree.tree_map_only(torch.device, lambda _: device, node.kwargs)
    return copied
