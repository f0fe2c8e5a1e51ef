"""Questions that passes ask a graph: who makes this value, who reads it, which layers hold a weight, who shares it.

The functions on nodes are direct. What needs a walk over the graph is answered by a :class:`GraphIndex`, built once
in linear time and valid until the graph is edited::

    index = GraphIndex(graph_module)
    if index.is_tied("decoder.weight"):
        ...
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import fx, nn

from fxcompress.errors import GraphError, OptionError, nearest

__all__ = [
    "GraphIndex",
    "StorageKey",
    "StorageUser",
    "calls_of",
    "consumers",
    "is_tied",
    "layers_of",
    "matching_layers",
    "module_of",
    "only_consumer",
    "producer",
    "storage_users",
]

StorageKey = tuple[str, int]
"""Device, and address of the first byte, of memory that one or several tensors cover."""


@dataclass(frozen=True)
class StorageUser:
    """One name of a piece of memory.

    Attributes:
        path: of the parameter, buffer or constant.
        tensor: what stands at ``path``.
        nodes: which read it, in graph order: the calls of the layer that holds it, and ``get_attr`` nodes.
        span: the memory, and the range of bytes in it from the tensor's first element to its last.
    """

    path: str
    tensor: torch.Tensor
    nodes: tuple[fx.Node, ...]
    span: tuple[str, int, int]


# --- nodes ---------------------------------------------------------------------------------------------------------


def producer(node: fx.Node) -> fx.Node | None:
    """The node that makes the first input of ``node``; None where it has no input."""
    return next(iter(node.all_input_nodes), None)


def consumers(node: fx.Node) -> tuple[fx.Node, ...]:
    """The nodes that read ``node``, in graph order; the output node is one of them."""
    return tuple(sorted(node.users))


def only_consumer(node: fx.Node) -> fx.Node | None:
    """The one node that reads ``node``; None where several do, or none."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def module_of(graph_module: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    """The layer that ``node`` calls; None where it calls none."""
    return graph_module.get_submodule(str(node.target)) if node.op == "call_module" else None


# --- the whole graph -----------------------------------------------------------------------------------------------


class GraphIndex:
    """Who calls which layer and who shares which memory. Built once, in linear time; an edit outdates it.

    Attributes:
        calls: path of a layer → the nodes that call it, in graph order.
        storages: every piece of memory that the graph's tensors cover → its names. Tensors share a piece when the
            bytes they span overlap: the same parameter under two paths, but also a view of it. Slices of one big
            buffer that do not touch each other do not share.
    """

    def __init__(self, graph_module: fx.GraphModule) -> None:
        self.graph_module = graph_module
        self.calls: dict[str, tuple[fx.Node, ...]] = {}
        self.storages: dict[StorageKey, list[StorageUser]] = {}
        self._keys: dict[str, StorageKey] = {}
        self._by_id: dict[int, StorageKey] = {}
        calls: dict[str, list[fx.Node]] = {}
        reads: dict[str, list[fx.Node]] = {}
        for node in graph_module.graph.nodes:
            if node.op in ("call_module", "get_attr"):
                (calls if node.op == "call_module" else reads).setdefault(str(node.target), []).append(node)
        self.calls = {path: tuple(nodes) for path, nodes in calls.items()}
        users = [self._user(path, tensor, calls, reads) for path, tensor in _tensors(graph_module, reads)]
        for key, group in _group(users):
            self.storages[key] = group
            self._keys.update((user.path, key) for user in group)
            self._by_id.update((id(user.tensor), key) for user in group)

    @staticmethod
    def _user(
        path: str, tensor: torch.Tensor, calls: dict[str, list[fx.Node]], reads: dict[str, list[fx.Node]]
    ) -> StorageUser:
        nodes = list(reads.get(path, ()))
        owner = path
        while "." in owner:
            owner = owner.rpartition(".")[0]
            nodes += calls.get(owner, ())
        return StorageUser(path, tensor, tuple(sorted(nodes) if len(nodes) > 1 else nodes), _span(tensor))

    def key(self, tensor: torch.Tensor | str) -> StorageKey:
        """The piece of memory that a tensor of the graph, given itself or by its path, covers.

        Raises:
            GraphError: the graph does not hold it.
        """
        if isinstance(tensor, str):
            if tensor in self._keys:
                return self._keys[tensor]
            raise GraphError(f"the graph holds no tensor {tensor!r}", remedy=nearest(tensor, self._keys))
        if id(tensor) in self._by_id:
            return self._by_id[id(tensor)]
        device, start, end = _span(tensor)
        for key, users in self.storages.items():
            if key[0] == device and any(user.span[1] < end and start < user.span[2] for user in users):
                return key
        raise GraphError(f"the graph does not hold this tensor of shape {list(tensor.shape)}")

    def users_of(self, tensor: torch.Tensor | str) -> tuple[StorageUser, ...]:
        """All names of the memory that ``tensor`` covers, its own among them.

        Raises:
            GraphError: the graph does not hold it.
        """
        return tuple(self.storages[self.key(tensor)])

    def is_tied(self, tensor: torch.Tensor | str) -> bool:
        """Whether the memory has more than one name. A layer called twice is not tied: see :attr:`calls`.

        Raises:
            GraphError: the graph does not hold it.
        """
        return len(self.users_of(tensor)) > 1

    def layers_of(self, tensor: torch.Tensor | str) -> tuple[fx.Node, ...]:
        """The nodes whose layer holds the memory that ``tensor`` covers, in graph order.

        Raises:
            GraphError: the graph does not hold it.
        """
        nodes = {node for user in self.users_of(tensor) for node in user.nodes if node.op == "call_module"}
        return tuple(sorted(nodes))


def storage_users(graph_module: fx.GraphModule) -> dict[StorageKey, list[StorageUser]]:
    """Every piece of memory that the graph's tensors cover → its names and their readers. Linear."""
    return GraphIndex(graph_module).storages


def is_tied(graph_module: fx.GraphModule, tensor: torch.Tensor | str) -> bool:
    """Whether a tensor, given itself or by its path, shares memory with one under another path.

    Raises:
        GraphError: the graph does not hold it.
    """
    return GraphIndex(graph_module).is_tied(tensor)


def layers_of(graph_module: fx.GraphModule, tensor: torch.Tensor | str) -> tuple[fx.Node, ...]:
    """The ``call_module`` nodes whose layer holds a tensor, given itself or by its path.

    Raises:
        GraphError: the graph does not hold it.
    """
    return GraphIndex(graph_module).layers_of(tensor)


def calls_of(graph_module: fx.GraphModule, path: str) -> tuple[fx.Node, ...]:
    """The nodes that call the layer at ``path``, in graph order."""
    return tuple(node for node in graph_module.graph.nodes if node.op == "call_module" and node.target == path)


def matching_layers(graph_module: fx.GraphModule, patterns: Iterable[str]) -> list[str]:
    """Paths of the called layers that a pattern names, in graph order.

    A pattern is a path (``encoder.0.fc``), the path of a container (``encoder`` means all layers in it), or either
    with ``*``, ``?`` and ``[...]`` (``*.fc``); ``*`` crosses dots.

    Raises:
        OptionError: a pattern names no layer; most likely it is misspelt.
    """
    layers = list(dict.fromkeys(str(node.target) for node in graph_module.graph.nodes if node.op == "call_module"))
    found: set[str] = set()
    for pattern in patterns:
        matched = {path for path in layers if any(fnmatchcase(part, pattern) for part in _prefixes(path))}
        if not matched:
            remedy = nearest(pattern, {part for path in layers for part in _prefixes(path)})
            raise OptionError(f"no layer of the graph is called {pattern!r}", where=pattern, remedy=remedy)
        found |= matched
    return [path for path in layers if path in found]


# --- private -------------------------------------------------------------------------------------------------------


def _prefixes(path: str) -> Iterator[str]:
    while path:
        yield path
        path = path.rpartition(".")[0]


def _tensors(graph_module: fx.GraphModule, reads: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
    seen: set[str] = set()
    for tensors in (graph_module.named_parameters, graph_module.named_buffers):
        for path, tensor in tensors(remove_duplicate=False):
            seen.add(path)
            yield path, tensor
    for path in reads:
        if path not in seen:  # a tensor kept as a plain attribute
            owner, _, name = path.rpartition(".")
            held = getattr(graph_module.get_submodule(owner), name)
            if isinstance(held, torch.Tensor):
                yield path, held


def _span(tensor: torch.Tensor) -> tuple[str, int, int]:
    """The memory, and the range of bytes in it from a tensor's first element to its last."""
    length: int = tensor.numel() * tensor.element_size()
    try:
        start, storage = tensor.data_ptr(), tensor.untyped_storage()
    except (NotImplementedError, RuntimeError):  # a class of tensor without a storage of its own: sparse, wrapped
        return f"object {id(tensor)}", 0, length
    if length == 0:
        return f"empty {id(tensor)}", 0, 0
    steps = [(size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)]
    length = (int(sum(steps)) + 1) * tensor.element_size()
    if start == 0 or tensor.device.type == "meta":  # no memory: only the storage object tells tensors apart
        start = int(tensor.storage_offset()) * tensor.element_size()
        return f"{tensor.device} storage {storage._cdata}", start, start + length
    return str(tensor.device), start, start + length


def _group(users: list[StorageUser]) -> Iterator[tuple[StorageKey, list[StorageUser]]]:
    """Users whose spans overlap, together; groups in the order of their first member."""
    spans = [user.span for user in users]
    groups: list[tuple[StorageKey, list[int]]] = []
    device, end = "", -1
    for index in sorted(range(len(users)), key=lambda i: (spans[i], i)):
        if spans[index][0] == device and spans[index][1] < end:
            groups[-1][1].append(index)
            end = max(end, spans[index][2])
        else:
            device, end = spans[index][0], spans[index][2]
            groups.append(((device, spans[index][1]), [index]))
    for key, members in sorted(groups, key=lambda group: min(group[1])):
        yield key, [users[index] for index in sorted(members)]
