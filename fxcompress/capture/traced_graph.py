"""A functional graph that is written without shapes: kinds of values, writes, shared memory, and gradients.

A write into a tensor makes a new value, which every later reader of the tensor gets. Without shapes it is not known
what shares memory: whatever *may* be a view of a written tensor must not be read again, or the model is refused.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.fx.node import map_aggregate

from fxcompress.capture.facts import DtypeOf, Sizes, Unknown
from fxcompress.capture.overloads import Kind, match, result_kind
from fxcompress.graph.shapes import where

__all__ = ["TracedGraph"]

aten = torch.ops.aten

# In eval mode these return their argument itself; their schemas do not say so.
_MAY_RETURN_SELF = {aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default}
_CASTS = {aten.to.dtype, aten.to.other, aten.type_as.default, aten.gt.Scalar, aten.lt.Scalar, aten.eq.Scalar}
# Beside the pointwise ones, operations whose result has as many dims as their argument.
_KEEP_RANK = {
    *(aten.cat.default, aten.slice.Tensor, aten.dropout.default, aten.feature_dropout.default, aten.softmax.int),
    *(aten.max_pool1d.default, aten.max_pool2d.default, aten.max_pool3d.default, aten.pad.default),
    *(aten.avg_pool1d.default, aten.avg_pool2d.default, aten.avg_pool3d.default, aten.contiguous.default),
    *(aten.adaptive_avg_pool1d.default, aten.adaptive_avg_pool2d.default, aten.adaptive_avg_pool3d.default),
    *(aten.upsample_nearest1d.vec, aten.upsample_nearest2d.vec, aten.upsample_nearest3d.vec, aten.layer_norm.default),
    *(aten.upsample_bilinear2d.vec, aten.upsample_bicubic2d.vec, aten.upsample_trilinear3d.vec, aten.to.dtype),
}


class TracedGraph:
    """What the tables of functions write with, by :meth:`call` and :meth:`emit`.

    Args:
        tensors: what ``get_attr`` nodes read.
        device: where the model's tensors are.

    Attributes:
        graph: the new graph, without its output.
        ranks: the number of dims, where it is known.
        notes: what the trace could not carry over.
        origin: the node of the trace that is at work: new nodes get its source line.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor], device: torch.device) -> None:
        self.graph = fx.Graph()
        self.device = device
        self.ranks: dict[fx.Node, int] = {}
        self.notes: list[str] = []
        self.origin: fx.Node | None = None
        self._tensors = tensors
        self._kinds: dict[fx.Node, Kind] = {}
        self._sizes: dict[tuple[fx.Node, int], fx.Node] = {}
        self._memory: dict[fx.Node, set[fx.Node]] = {}  # what may share memory with a tensor, itself included
        self._written: dict[fx.Node, fx.Node] = {}  # a tensor that was written → its value since
        self._stale: dict[fx.Node, str] = {}  # what may have been written through another name → where
        self._cast: set[fx.Node] = set()  # what may have another dtype than the rest
        self._trained: set[fx.Node] = set()  # what depends on parameters
        self._without_gradients: set[fx.Node] = set()
        self._detached: dict[fx.Node, fx.Node] = {}

    # --- facts -------------------------------------------------------------------------------------------------

    def kind(self, node: fx.Node) -> Kind:
        """What a node of the new graph is."""
        return self._kinds[node]

    def is_tensor(self, value: Any) -> bool:
        """Whether a value is a tensor of the new graph."""
        return isinstance(value, fx.Node) and self._kinds[value] == "tensor"

    def is_trained(self, node: fx.Node) -> bool:
        """Whether gradients flow through a node to parameters."""
        return node in self._trained

    def tensor(self, node: fx.Node) -> torch.Tensor | None:
        """The parameter, buffer or constant that a node reads; None for what is computed."""
        return self._tensors[str(node.target)] if node.op == "get_attr" else None

    def size(self, tensor: fx.Node, dim: int) -> Any:
        """``tensor.shape[dim]``: a number for weights, else a node."""
        held = self.tensor(tensor)
        if held is not None:
            return held.shape[dim]
        key = (tensor, dim)
        if key not in self._sizes:
            self._sizes[key] = self.emit(aten.sym_size.int, (tensor, dim))
        return self._sizes[key]

    def current(self, value: Any) -> Any:
        """``value`` as a reader gets it now: a written tensor has another node.

        Raises:
            Unknown: it may have been written through another name.
        """
        if isinstance(value, (tuple, list)):
            items = [self.current(item) for item in value]
            return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
        if not isinstance(value, fx.Node):
            return value
        while value in self._written:
            value = self._written[value]
        if value in self._stale:
            raise Unknown(
                f"it cannot be told whether a tensor that is read shares memory with the one written by "
                f"{self._stale[value]}"
            )
        return value

    # --- nodes -------------------------------------------------------------------------------------------------

    def call(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """Call the overload of ``aten.<name>`` that takes these arguments.

        Raises:
            Unknown: none does.
        """
        found = match(name, args, kwargs, self.kind)
        if found is None:
            raise Unknown(f"{name}{_told(args, kwargs)} cannot be brought to an ATen operation")
        return self.emit(*found)

    def emit(self, target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None) -> Any:
        """A call of an overload, or of an operator on sizes; several results come as a tuple.

        Raises:
            Unknown: an argument may be out of date, or the result is a plain number.
        """
        overload = isinstance(target, torch._ops.OpOverload)
        kind = result_kind(target) if overload else "size"
        if kind is None:
            raise Unknown(f"the value of {target} is not known")
        name = target._schema.name.partition("::")[2].strip("_") if overload else target.__name__.strip("_")
        node = self.create("call_function", target, args, dict(kwargs or {}), name, kind)
        if overload:
            for argument, value in zip(target._schema.arguments, args, strict=False):
                if (argument.alias_info is not None or target in _MAY_RETURN_SELF) and isinstance(value, fx.Node):
                    self.join(node, value)
            self._keep_rank(node, target)
            count = len(target._schema.returns)
            if count > 1:
                items = [self.item(node, index) for index in range(count)]
                type_ = getattr(torch.return_types, name, None)
                return tuple(items) if type_ is None else type_(items)
        return node

    def item(self, node: fx.Node, index: int) -> fx.Node:
        """One of several tensors that a node makes."""
        made = self.create("call_function", operator.getitem, (node, index), {}, "getitem", "tensor")
        self.join(made, node)
        return made

    def read(self, op: str, target: str) -> fx.Node:
        """An input of the graph, or a tensor of the model."""
        node = self.graph.create_node(op, target, name=target.replace(".", "_"))
        self._kinds[node] = "tensor"
        held = self.tensor(node)
        if held is not None:
            node.meta["val"] = held
            self.ranks[node] = held.dim()
            if isinstance(held, nn.Parameter):
                self._trained.add(node)
        return node

    def create(self, op: str, target: Any, args: Any, kwargs: dict[str, Any], name: str, kind: Kind) -> fx.Node:
        """A node of any op; gradients stop where the user stopped them."""
        assert self.origin is not None
        gradients = self.origin.meta.get("gradients", True)
        args, kwargs = map_aggregate((args, kwargs), lambda item: self._readable(item, gradients))
        node = self.graph.create_node(op, target, args, kwargs, name=name)
        kept = ("stack_trace", "nn_module_stack")
        node.meta = {key: self.origin.meta[key] for key in kept if key in self.origin.meta}
        self._kinds[node] = kind
        read = node.all_input_nodes
        if not self._trained.isdisjoint(read) and target is not aten.detach.default:
            self._trained.add(node)
        if not self._cast.isdisjoint(read) or target in _CASTS:
            self._cast.add(node)
        if not gradients:
            self._without_gradients.add(node)
        return node

    def train(self, node: fx.Node) -> None:
        """Say that a node has parameters of its own."""
        self._trained.add(node)

    def join(self, node: fx.Node, source: fx.Node) -> None:
        """Say that a node may share memory with another."""
        shared = self._memory.setdefault(source, {source})
        shared.add(node)
        self._memory[node] = shared

    def write(self, tensor: Any, value: Any) -> Any:
        """Let every later reader of ``tensor`` get ``value``.

        Raises:
            Unknown: a weight would be written.
        """
        if not self.is_tensor(tensor):
            return value
        shared = self._memory.setdefault(tensor, {tensor})
        for other in shared:
            if other.op == "get_attr":
                raise Unknown(f"a write into {other.target!r}, a parameter, buffer or constant, cannot be followed")
            if other.op == "placeholder":
                note = f"the model writes into its input {other.name!r}; the captured graph leaves it alone"
                self.notes += [note] if note not in self.notes else []
        if not self._cast.isdisjoint({tensor, *value.all_input_nodes}) and len(value.all_input_nodes) > 1:
            value = self.emit(aten.to.other, (value, tensor))  # what is written keeps its dtype
        assert self.origin is not None
        self._stale |= dict.fromkeys(shared - {tensor, value}, where(self.origin))
        self._memory[value] = {value}
        self._written[tensor] = value
        return value

    # --- private -----------------------------------------------------------------------------------------------

    def _readable(self, value: Any, gradients: bool) -> Any:
        if isinstance(value, Sizes):
            raise Unknown("the number of dims of a tensor, whose whole shape is read, is not known")
        if isinstance(value, DtypeOf):
            raise Unknown("the dtype of a tensor is not known")
        if not isinstance(value, fx.Node) or not gradients:
            return value
        if value not in self._without_gradients or value not in self._trained:
            return value
        if value not in self._detached:  # computed where gradients were off, read where they are on
            self._detached[value] = self.graph.call_function(aten.detach.default, (value,))
            self._kinds[self._detached[value]] = self._kinds[value]
        return self._detached[value]

    def _keep_rank(self, node: fx.Node, target: Any) -> None:
        if torch.Tag.pointwise in target.tags or target in _KEEP_RANK:
            ranks = [self.ranks.get(item) for item in node.all_input_nodes if self._kinds[item] == "tensor"]
            if ranks and all(rank is not None for rank in ranks):
                self.ranks[node] = max(rank for rank in ranks if rank is not None)


def _told(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
    told = ["…" if isinstance(item, (fx.Node, list, tuple)) else repr(item) for item in args]
    return f"({', '.join(told + [f'{key}=…' for key in kwargs])})"
